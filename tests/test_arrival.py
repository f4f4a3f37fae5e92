"""A byte that has arrived is on its way to the client.

No clock: the test plays both ends in one thread, and the upstream sends the next piece only when
the client has the one before. What is held back anywhere on the way is a deadlock, and fails.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from harness.client import request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Service
    from harness.client import Response
    from harness.upstream import Exchange, Framing

SSE = "text/event-stream"

framed = pytest.mark.parametrize("framing", ["chunked", "length", "close"])
typed = pytest.mark.parametrize(
    "content_type",
    [
        pytest.param(SSE, id="events"),
        pytest.param("text/event-stream; charset=utf-8", id="events-charset"),
        pytest.param("application/json", id="json"),
        pytest.param("application/octet-stream", id="binary"),
        pytest.param("application/x-ndjson", id="ndjson"),
    ],
)

# Event, half events, single bytes, comments, empty lines, line ends cut in two.
PIECES = (
    b"data: one\n\n",
    b"da",
    b"t",
    b"a",
    b": tw",
    b"o\n",
    b"\n",
    b": a comment\n",
    b":\n\n",
    b"\r",
    b"\n",
    b"\0",
    b"\xe2",
    b"\x82\xac",
    b"data: " + b"x" * 100_000,
    b"\n\ndata: [DONE]\n\n",
    b"data: after",
)


@contextmanager
def opened(hop: Service, method: str = "POST") -> Iterator[tuple[Exchange, Callable[[], Response]]]:
    """A request that the upstream has, and has not answered."""
    path = hop.upstream.by_hand()
    connection = hop.client.connection()
    connection.send(method, hop.mount + path, {"Accept": SSE})
    ex = hop.upstream.next(path)
    try:
        yield ex, connection.read_head
    finally:
        ex.finished.set()
        hop.upstream.forget(path)


@framed
def test_each_event_arrives_before_the_next_is_sent(hop: Service, framing: Framing) -> None:
    events = [b"id: %d\ndata: %s\n\n" % (n, b"x" * n) for n in range(100)]
    with opened(hop) as (ex, read_head):
        ex.head(headers=[("Content-Type", SSE)], framing=framing, length=sum(map(len, events)))
        response = read_head()
        for event in events:
            ex.send(event)
            assert response.read_event() == event
        ex.end()
        assert response.finish()[:2] == (b"".join(events), "clean")


@framed
@typed
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_head_arrives_before_the_first_byte_of_the_body(
    hop: Service, method: str, content_type: str, framing: Framing
) -> None:
    with opened(hop, method) as (ex, read_head):
        ex.head(201, "Made", [("Content-Type", content_type), ("X-A", "b")], framing, 3)
        response = read_head()
        assert (response.status, response.header("X-A")) == (201, b"b")
        ex.send(b"abc")
        assert response.read_exactly(3) == b"abc"
        ex.end()
        assert response.finish().ended == "clean"


@framed
@typed
def test_what_has_arrived_does_not_wait_for_more(hop: Service, content_type: str, framing: Framing) -> None:
    """Half an event, a single byte, a comment, half a character: each arrives alone."""
    with opened(hop) as (ex, read_head):
        ex.head(headers=[("Content-Type", content_type)], framing=framing, length=sum(map(len, PIECES)))
        response = read_head()
        for piece in PIECES:
            ex.send(piece)
            assert response.read_exactly(len(piece)) == piece
        ex.end()
        assert response.finish()[:2] == (b"".join(PIECES), "clean")


@typed
def test_half_a_chunk_does_not_wait_for_its_end(hop: Service, content_type: str) -> None:
    """The wire is cut inside sizes, data and line ends; data goes on, framing alone does not."""
    with opened(hop) as (ex, read_head):
        ex.head(headers=[("Content-Type", content_type)])
        response = read_head()
        for wire, body in [
            (b"1", b""),
            (b"4\r", b""),
            (b"\ndata", b"data"),
            (b": ", b": "),
            (b"x", b"x"),
            (b"yyyyyyyyyyyy\n", b"yyyyyyyyyyyy\n"),
            (b"\r\n1\r\n\n", b"\n"),
            (b"\r", b""),
            (b"\n2;ext=1\r\n:", b":"),
            (b"\n\r\n", b"\n"),
        ]:
            ex.raw(wire)
            assert response.read_exactly(len(body)) == body
        ex.raw(b"0\r\n")
        ex.raw(b"\r\n")
        ex.finished.set()
        assert response.finish()[:2] == (b"data: x" + b"y" * 12 + b"\n\n:\n", "clean")


@pytest.mark.parametrize("piece", [b": keep-alive\n\n", b": keep-alive\n", b":\n", b":", b"\n"])
def test_bytes_that_make_no_event_arrive_at_once(hop: Service, piece: bytes) -> None:
    """An upstream's own keep-alives are no use to anybody who gets them late."""
    with opened(hop, "GET") as (ex, read_head):
        ex.head(headers=[("Content-Type", SSE)])
        response = read_head()
        for _ in range(10):
            ex.send(piece)
            assert response.read_exactly(len(piece)) == piece
        ex.end()
        assert response.finish()[:2] == (piece * 10, "clean")


def test_the_first_bytes_arrive_with_the_head_that_they_came_with(hop: Service) -> None:
    """Head and first event in one packet: nothing stays behind in a buffer of the head's reader."""
    with opened(hop) as (ex, read_head):
        ex.raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2"
        )
        response = read_head()
        assert response.read_exactly(16) == b"data: 1\n\ndata: 2"
        ex.raw(b"\n\n\r\n0\r\n\r\n")
        ex.finished.set()
        assert response.finish().ended == "clean"


def test_the_end_arrives_when_it_comes(hop: Service) -> None:
    """And the connection serves the next request, here and upstream."""
    with opened(hop) as (ex, read_head):
        ex.head(headers=[("Content-Type", SSE)])
        response = read_head()
        ex.send(b"data: x\n\n")
        assert response.read_event() == b"data: x\n\n"
        assert response.ended is None
        ex.end()
        assert response.finish().ended == "clean"
        assert response.connection.reusable


@typed
def test_the_answer_may_begin_only_after_a_silence(hop: Service, content_type: str) -> None:
    """A lull before and between pieces (the idle time of a buffer, were there one) changes nothing.

    The silence is the client's: it asks for bytes and gets none, for a fifth of a second.
    """
    with opened(hop) as (ex, read_head):
        ex.head(headers=[("Content-Type", content_type)])
        response = read_head()
        for piece in (b"da", b"ta: x\n", b"\n"):
            _nothing_comes(response)
            ex.send(piece)
            assert response.read_exactly(len(piece)) == piece
        ex.end()
        assert response.finish().ended == "clean"


def _nothing_comes(response: Response) -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.2 s"):
        response.read_some(0.2)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_the_last_bytes_wait_for_nothing(service: Service, framing: Framing, version: str) -> None:
    """Held back for the end of the body they would come 200 ms later, which a hundred answers in a row would show."""
    path = service.upstream.serve(lambda ex: ex.reply(b"data: 1\n\n", framing=framing))
    started = time.monotonic()
    for _ in range(60):
        response = request(service.port, "GET", service.mount + path, version=version)
        assert response.read_until(b"data: 1\n\n")
        response.close()
    assert time.monotonic() - started < 60 * 0.2, "each answer has waited for the kernel's timer"
    service.upstream.forget(path)
