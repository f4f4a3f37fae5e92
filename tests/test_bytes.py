"""The client receives the upstream's body bytes, all of them, in order, unchanged.

Every recorded stream and every edge case, sent in every way: whole, event by event, in random
pieces, byte by byte, and each piece once the one before has arrived; chunked, with a length, until
close; by POST and GET; through gunicorn and through nginx. Cut streams are seen as cut.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from harness import cases
from harness.client import Body, Client, Response
from harness.own_cases import OWN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Service
    from harness.cases import Case
    from harness.upstream import Exchange, Framing, Handler

FRAMINGS: tuple[Framing, ...] = ("chunked", "length", "close")
LARGE = 1 << 20  # bodies from here on go by one framing for each delivery
BYTE_BY_BYTE = 5000  # the longest body that is sent so
IN_LOCK_STEP = 200  # most pieces that wait for one another

_ERROR_FRAME = re.compile(rb"event: error\ndata: ([^\r\n]+)\n\n")


def deliveries(case: Case) -> Iterator[tuple[str, list[bytes] | None]]:
    """A name for each way to send the case, and its pieces; None: its own, in lock-step."""
    seed = zlib.crc32(case.name.encode())
    yield "whole", cases.whole(case.body)
    if len(events := cases.by_events(case.body)) > 1:
        yield "events", events
    if len(case.body) > 1:
        yield f"random-{seed}", cases.at_random(case.body, seed)
    if 1 < len(case.body) <= BYTE_BY_BYTE:
        yield "bytes", cases.by_bytes(case.body)
    if 1 < len(case.pieces) <= IN_LOCK_STEP:
        yield "lock-step", None


def table(found: list[Case], missing: str = "") -> list[Any]:
    """Parameters for each case and each way to send it; one that is skipped if there are no cases."""
    if not found:
        return [pytest.param(None, None, id="missing", marks=pytest.mark.skip(reason=f"needs {missing}"))]
    return [pytest.param(case, pieces, id=f"{case.name}-{name}") for case in found for name, pieces in deliveries(case)]


def framings(case: Case, pieces: list[bytes] | None) -> list[Framing]:
    """All of them; for a large body one, another for each way of sending it."""
    if len(case.body) < LARGE:
        return list(FRAMINGS)
    if pieces is None:
        return ["chunked"]
    return ["length" if len(pieces) == 1 else "close"]


def play(hop: Service, case: Case, pieces: list[bytes] | None, framing: Framing, method: str) -> Body:
    """Send the case through the relay; check status and type; give what came."""
    body = b'{"stream": true}' if method == "POST" else b""
    headers = {"Content-Type": "application/json"} if body else {}

    def head(ex: Exchange) -> None:
        missing = 7 if case.end == "abort" else 0
        ex.head(case.status, "So", case.headers, framing, len(case.body) + missing)

    def end(ex: Exchange) -> None:
        if case.end == "clean":
            ex.end()
        elif framing == "close":
            ex.reset()
        else:
            ex.abort()

    def handler(ex: Exchange) -> None:
        head(ex)
        for piece in pieces or ():
            ex.send(piece)
        end(ex)

    # A close-delimited body can be cut by a reset only (a FIN is its end), and a reset may destroy
    # what is still on its way: there too the client must have it first.
    lock_step = pieces is None or (case.end == "abort" and framing == "close")
    path = hop.upstream.by_hand() if lock_step else hop.upstream.serve(handler)
    try:
        connection = hop.client.connection()
        connection.send(method, hop.mount + path, headers, body)
        if lock_step:
            ex = hop.upstream.next(path)
            head(ex)
            response = connection.read_head()
            for piece in case.pieces if pieces is None else pieces:
                ex.send(piece)
                assert response.read_exactly(len(piece)) == piece
            end(ex)
        else:
            response = connection.read_head()
        received = response.finish(30)
        (ex,) = hop.upstream.seen(path)
        assert (ex.method, ex.body) == (method.encode(), body)
    finally:
        hop.upstream.forget(path)
    assert response.status == case.status
    assert response.all("Content-Type") == ([case.content_type.encode()] if case.headers else [])
    return received


def same(received: Body, case: Case) -> None:
    """Equal, or a message that says where not instead of 10 MiB of it."""
    if received.sha256 == case.sha256:
        return
    pairs = zip(received.data, case.body, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(received.data), len(case.body)))
    raise AssertionError(
        f"{len(received.data)} bytes came, {len(case.body)} were sent, the first difference is at"
        f" {at}: came {received.data[at : at + 60]!r}, sent {case.body[at : at + 60]!r}"
    )


def assert_cut(received: Body, case: Case) -> None:
    """Every byte, then perhaps an error frame where one may stand, then no clean end."""
    assert received.ended == "cut", "a cut stream was ended as if it were whole"
    sent, added = received.data[: len(case.body)], received.data[len(case.body) :]
    same(Body(sent, "cut", ""), case)
    if not added:
        return
    assert case.is_event_stream, f"added to what is no event stream: {added!r}"
    assert cases.at_event_boundary(case.body), f"added inside an event: {added!r}"
    frame = _ERROR_FRAME.fullmatch(added)
    assert frame, f"added, and no error frame: {added!r}"
    error = json.loads(frame[1])["error"]
    assert all(error[name] for name in ("message", "type", "code", "request_id"))


def relayed(hop: Service, case: Case, pieces: list[bytes] | None) -> None:
    """By every framing, with the case's own method and the other one in turn."""
    other = "GET" if case.method == "POST" else "POST"
    for i, framing in enumerate(framings(case, pieces)):
        received = play(hop, case, pieces, framing, (case.method, other)[i % 2])
        if case.end == "abort":
            assert_cut(received, case)
        else:
            same(received, case)
            assert received.ended == "clean", f"{framing}: {received.why}"


@pytest.mark.parametrize(("case", "pieces"), table(cases.recorded(), "../shared/streams"))
def test_a_recorded_stream_comes_through_unchanged(hop: Service, case: Case, pieces: list[bytes] | None) -> None:
    relayed(hop, case, pieces)


@pytest.mark.parametrize(("case", "pieces"), table(cases.edge_cases(), "../shared/edge-cases"))
def test_an_edge_case_comes_through_unchanged(hop: Service, case: Case, pieces: list[bytes] | None) -> None:
    relayed(hop, case, pieces)


@pytest.mark.parametrize(("case", "pieces"), table(list(OWN)))
def test_a_case_of_our_own_comes_through_unchanged(hop: Service, case: Case, pieces: list[bytes] | None) -> None:
    relayed(hop, case, pieces)


def _wire(pieces: list[bytes], *, whole: bool) -> Handler:
    """A handler that writes pieces of an answer as they are, and closes if they are not a whole one."""

    def handler(ex: Exchange) -> None:
        for piece in pieces:
            ex.raw(piece)
        if whole:
            ex.finished.set()  # closing now would race with the next request
        else:
            ex.abort()

    return handler


def _get(hop: Service, path: str) -> tuple[Response, Body]:
    try:
        response = hop.client.request("GET", hop.mount + path)
        return response, response.finish()
    finally:
        hop.upstream.forget(path)


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "framed",
    [
        pytest.param(b"D\r\ndata: hello\n\n\r\n0\r\n\r\n", id="plain"),
        pytest.param(b"00d\r\ndata: hello\n\n\r\n000\r\n\r\n", id="leading-zeros"),
        pytest.param(b'd;a=b;c="d"\r\ndata: hello\n\n\r\n0;e\r\n\r\n', id="extensions"),
        pytest.param(b"d\r\ndata: hello\n\n\r\n0\r\nX-Sum: 1\r\nX-B: 2\r\n\r\n", id="trailers"),
        pytest.param(b"1\r\nd\r\n1\r\na\r\n1\r\nt\r\nA\r\na: hello\n\n\r\n0\r\n\r\n", id="small-chunks"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_chunk_framing_cut_anywhere_yields_the_same_body(hop: Service, framed: bytes, step: int) -> None:
    wire = _CHUNKED + framed
    pieces = [wire[i : i + step] for i in range(0, len(wire), step)]
    _, received = _get(hop, hop.upstream.serve(_wire(pieces, whole=True)))
    assert received == (b"data: hello\n\n", "clean", "last chunk")


@pytest.mark.parametrize(
    ("framed", "delivered"),
    [
        pytest.param(b"64\r\ndata: he", b"data: he", id="inside-a-chunk"),
        pytest.param(b"8\r\ndata: he", b"data: he", id="after-a-chunks-data"),
        pytest.param(b"8\r\ndata: he\r", b"data: he", id="inside-a-chunks-line-end"),
        pytest.param(b"8\r\ndata: he\r\n", b"data: he", id="between-chunks"),
        pytest.param(b"8\r\ndata: he\r\n1", b"data: he", id="inside-a-size"),
        pytest.param(b"8\r\ndata: he\r\n10\r\n", b"data: he", id="after-a-size"),
        pytest.param(b"8\r\ndata: he\r\n0", b"data: he", id="inside-the-last-chunk"),
        pytest.param(b"8\r\ndata: heXX\r\n0\r\n\r\n", b"data: he", id="garbage-after-a-chunk"),
        pytest.param(b"8\r\ndata: he\r\nxyz\r\n", b"data: he", id="no-size"),
        pytest.param(b"8\r\ndata: he\r\n-1\r\n", b"data: he", id="negative-size"),
        pytest.param(b"8\r\ndata: he\r\n\r\n", b"data: he", id="empty-size"),
    ],
)
def test_broken_chunk_framing_delivers_every_byte_and_never_ends_clean(
    hop: Service, framed: bytes, delivered: bytes
) -> None:
    response, received = _get(hop, hop.upstream.serve(_wire([_CHUNKED, framed], whole=False)))
    assert response.status == 200
    assert received[:2] == (delivered, "cut")


@pytest.mark.parametrize(
    ("framed", "body"),
    [
        pytest.param(b"Content-Length: 9\r\n\r\ndata: x\n\n", b"data: x\n\n", id="length"),
        pytest.param(
            b"Transfer-Encoding: chunked\r\n\r\n9\r\ndata: x\n\n\r\n0\r\n\r\n",
            b"data: x\n\n",
            id="chunked",
        ),
    ],
)
def test_bytes_after_the_end_of_a_body_reach_nobody(hop: Service, framed: bytes, body: bytes) -> None:
    """An upstream that sends a second answer unasked cannot answer somebody else's request."""
    stray = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"

    def handler(ex: Exchange) -> None:
        ex.raw(_HEAD + framed + stray)
        ex.finished.set()  # and keeps the connection open

    path = hop.upstream.serve(handler)
    for _ in range(3):
        response = hop.client.request("GET", hop.mount + path)
        assert response.finish()[:2] == (body, "clean")
    hop.upstream.forget(path)
    other = hop.upstream.serve(lambda ex: ex.reply(b"own"))
    assert _get(hop, other)[1].data == b"own"


def test_streams_at_the_same_time_do_not_mix(hop: Service) -> None:
    """Thirty at once, each in pieces of its own, each by another framing."""
    bodies = [b"".join(b"data: %d/%d\n\n" % (n, i) for i in range(300)) for n in range(30)]
    received: dict[int, Body] = {}
    together = threading.Barrier(len(bodies))

    def handler(ex: Exchange) -> None:
        n = int(ex.target.partition(b"?")[2])
        ex.head(headers=[("Content-Type", "text/event-stream")], framing=FRAMINGS[n % 3], length=len(bodies[n]))
        together.wait(10)
        for piece in cases.at_random(bodies[n], n, 60):
            ex.send(piece)
        ex.end()

    path = hop.upstream.serve(handler)

    def read(n: int) -> None:
        with Client(hop.port) as client:
            received[n] = client.request("GET", f"{hop.mount}{path}?{n}").finish()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    hop.upstream.forget(path)
    for n, body in enumerate(bodies):
        assert received[n][:2] == (body, "clean")


def test_an_answer_to_an_http_1_0_client_is_whole_or_visibly_cut(service: Service) -> None:
    """There the connection's end is the body's end: FIN for a whole one, a reset for a cut one."""
    for end in ("clean", "abort"):

        def handler(ex: Exchange, end: str = end) -> None:
            ex.head(headers=[("Content-Type", "text/event-stream")])
            ex.send(b"data: x\n\ndata: y")
            ex.end() if end == "clean" else ex.abort()

        path = service.upstream.serve(handler)
        with service.client.connection() as connection:
            response = connection.request("GET", service.mount + path, version="HTTP/1.0")
            assert response.framing == "close"
            received = response.finish()
        service.upstream.forget(path)
        assert received[:2] == (b"data: x\n\ndata: y", "clean" if end == "clean" else "cut")
