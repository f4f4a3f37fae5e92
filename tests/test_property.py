"""Whatever the bytes, the type, the pieces and the framing: what comes is what was sent.

The input space is bytes, so hypothesis searches it; real sockets, through a real gunicorn.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import SEED
from harness.cases import Case
from harness.client import Chunked, Connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bytes import assert_cut, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Service
    from harness.client import Body, Response
    from harness.upstream import Exchange, Framing, Handler

# What an event stream's parser stumbles over, more often than random bytes would hit it.
_TOKENS = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r\n", b"\n\r"),
        *(b"data", b"data: ", b"data:x", b"id: 1\n", b"id", b"event: error\n", b"retry: 1\n", b": c", b":", b" "),
        *(b"data: [DONE]\n\n", b"{}", b"0", b"5\r\n"),
        *(b"\0", b"\xef\xbb\xbf", b"\xe2\x82\xac", b"\xf0\x9f", b"\xff"),
    ]
)
_BODIES = st.one_of(
    st.lists(_TOKENS, max_size=40).map(b"".join),
    st.binary(max_size=3000),
    st.builds(lambda a, n, b: a + b * n, st.binary(max_size=20), st.integers(0, 70_000), _TOKENS),
)
_TYPES = st.sampled_from(
    ["text/event-stream"] * 3
    + ["text/event-stream; charset=utf-8", "TEXT/Event-Stream", "text/event-streams"]
    + ["application/json", "application/octet-stream", "text/plain", "application/x-ndjson", ""]
)
_FRAMINGS: st.SearchStrategy[Framing] = st.sampled_from(["chunked", "length", "close"])


@dataclass(frozen=True)
class Sending:
    """A response, where it is cut into pieces, and how it is framed."""

    case: Case
    cuts: tuple[int, ...]
    framing: Framing
    method: str

    @property
    def pieces(self) -> list[bytes]:
        return _cut(self.case.body, self.cuts)


def _cut(data: bytes, cuts: tuple[int, ...]) -> list[bytes]:
    marks = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


@st.composite
def _sendings(draw: Any) -> Sending:
    body = draw(_BODIES)
    cut = st.integers(0, len(body))
    return Sending(
        Case("random", (body,), draw(_TYPES), draw(st.sampled_from([200, 200, 200, 400, 503]))),
        tuple(draw(st.lists(cut, max_size=25))),
        draw(_FRAMINGS),
        draw(st.sampled_from(["GET", "POST"])),
    )


_settings = settings(
    deadline=None,  # the watchdog's business
    derandomize=bool(SEED),
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
#: Cuts at a time: the relay waits for a quarter of a second before each.
_TOGETHER = 4


def _together(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, min_size=_TOGETHER, max_size=_TOGETHER)


@contextlib.contextmanager
def _begun(service: Service, method: str, handler: Handler) -> Iterator[Callable[[], Response]]:
    """A request, on a connection of its own, to an upstream that answers so; call it to have the answer's head."""
    path = service.upstream.serve(handler)
    try:
        with Connection(service.port) as connection:
            connection.send(method, service.mount + path)
            yield connection.read_head
    finally:
        service.upstream.forget(path)


def _cut_short(sending: Sending, missing: int) -> Handler:
    """`missing`: the bytes that are promised and never sent."""

    def handler(ex: Exchange) -> None:
        case = sending.case
        ex.head(case.status, "", case.headers, sending.framing, len(case.body) + missing)
        for piece in sending.pieces:
            ex.send(piece)
        ex.abort()

    return handler


def has_its_head(response: Response, case: Case) -> None:
    assert response.status == case.status
    assert response.all("Content-Type") == ([case.content_type.encode()] if case.headers else [])


def _relay(service: Service, sending: Sending) -> Body:
    """Through the relay."""
    case = sending.case

    def handler(ex: Exchange) -> None:
        ex.head(case.status, "", case.headers, sending.framing, len(case.body))
        for piece in sending.pieces:
            ex.send(piece)
        ex.end()

    path = service.upstream.serve(handler)
    try:
        response = service.client.request(sending.method, service.mount + path)
        received = response.finish()
    finally:
        service.upstream.forget(path)
    has_its_head(response, case)
    return received


@settings(_settings, max_examples=200)
@given(_sendings())
def test_any_body_in_any_pieces_comes_through_unchanged(service: Service, sending: Sending) -> None:
    received = _relay(service, sending)
    same(received, sending.case)
    assert received.ended == "clean"


_CUT_SENDINGS = st.tuples(_sendings().filter(lambda sending: sending.framing != "close"), st.integers(1, 100_000))


@settings(_settings, max_examples=200 // _TOGETHER)
@given(_together(_CUT_SENDINGS))
def test_any_body_cut_anywhere_never_ends_clean(service: Service, cuts: list[tuple[Sending, int]]) -> None:
    with contextlib.ExitStack() as stack:
        begun = [
            stack.enter_context(_begun(service, sending.method, _cut_short(sending, missing)))
            for sending, missing in cuts
        ]
        for (sending, _), answer in zip(cuts, begun, strict=True):
            response = answer()
            has_its_head(response, sending.case)
            assert_cut(response.finish(), sending.case)


@st.composite
def _wires(draw: Any) -> tuple[bytes, list[bytes]]:
    """A chunked body with its framing, and the pieces in which it is written, chunk sizes cut in two and all."""
    body = draw(_BODIES)
    wire = b""
    for chunk in _cut(body, tuple(draw(st.lists(st.integers(0, len(body)), max_size=10)))):
        size = draw(st.sampled_from(["{:x}", "{:X}", "00{:x}", "{:x};a", '{:x};a="b"'])).format(len(chunk))
        wire += size.encode() + b"\r\n" + chunk + b"\r\n"
    wire += draw(st.sampled_from([b"0\r\n\r\n", b"000;x\r\n\r\n", b"0\r\nX-Sum: 1\r\nB:\r\n\r\n"]))
    return body, _cut(wire, tuple(draw(st.lists(st.integers(0, len(wire)), max_size=25))))


def _written(content_type: str, pieces: list[bytes], *, whole: bool) -> Handler:
    def handler(ex: Exchange) -> None:
        ex.head(headers=[("Content-Type", content_type)])
        for piece in pieces:
            ex.raw(piece)
        if whole:
            ex.finished.set()  # closing now would race with the next request
        else:
            ex.abort()

    return handler


_RELAYED_TYPES = st.sampled_from(["text/event-stream", "application/json"])


@settings(_settings, max_examples=200)
@given(_wires(), _RELAYED_TYPES)
def test_any_chunk_framing_written_in_any_pieces_yields_the_same_body(
    service: Service, written: tuple[bytes, list[bytes]], content_type: str
) -> None:
    body, pieces = written
    path = service.upstream.serve(_written(content_type, pieces, whole=True))
    try:
        received = service.client.request("GET", service.mount + path).finish()
    finally:
        service.upstream.forget(path)
    same(received, Case("random", (body,)))
    assert received.ended == "clean"


@st.composite
def _stopped_wires(draw: Any) -> tuple[list[bytes], Case]:
    """The pieces of such framing up to where it stops, and what of the body has come by then."""
    wire = b"".join(draw(_wires())[1])
    # As likely in the framing at the end as in all the rest.
    stop = draw(st.one_of(st.integers(0, len(wire) - 1), st.integers(max(0, len(wire) - 12), len(wire) - 1)))
    arrived = bytearray()
    Chunked().decode(bytearray(wire[:stop]), arrived)
    pieces = _cut(wire[:stop], tuple(draw(st.lists(st.integers(0, stop), max_size=20))))
    return pieces, Case("random", (bytes(arrived),), draw(_RELAYED_TYPES), end="abort")


@settings(_settings, max_examples=200 // _TOGETHER)
@given(_together(_stopped_wires()))
def test_chunk_framing_that_stops_anywhere_delivers_what_came_and_never_ends_clean(
    service: Service, stopped: list[tuple[list[bytes], Case]]
) -> None:
    with contextlib.ExitStack() as stack:
        begun = [
            stack.enter_context(_begun(service, "GET", _written(case.content_type, pieces, whole=False)))
            for pieces, case in stopped
        ]
        for (_, case), answer in zip(stopped, begun, strict=True):
            assert_cut(answer().finish(), case)
