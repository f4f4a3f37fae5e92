"""Where events end and what may be added there, against an independent reading of the standard."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from relay import errors
from relay.wire import sse

BOM = b"\xef\xbb\xbf"

# --- the reference: whole streams, read line by line as WHATWG HTML 9.2.6 has it ----------------------------------


def lines_of(stream: bytes) -> tuple[list[bytes], bytes]:
    """The lines that have ended, and what has come of the next."""
    *lines, rest = re.split(rb"\r\n|\n|\r", stream.removeprefix(BOM))
    return lines, rest


def stands_at_boundary(stream: bytes) -> bool:
    lines, rest = lines_of(stream)
    return stream != BOM and not rest and (not lines or not lines[-1])


def has_carried_id(stream: bytes) -> bool:
    lines, rest = lines_of(stream)
    return any(line.partition(b":")[0] == b"id" for line in lines) or rest.startswith(b"id:")


def blocks_ended(stream: bytes) -> int:
    lines, _ = lines_of(stream)
    return sum(1 for before, line in zip([b"", *lines], lines, strict=False) if before and not line)


def blank_lines(stream: bytes) -> int:
    lines, _ = lines_of(stream)
    return lines.count(b"")


def events_of(stream: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """What an EventSource dispatches: type, data, last event ID."""
    events = []
    last_id = event = b""
    data: list[bytes] = []
    for line in lines_of(stream)[0]:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                events.append((event or b"message", b"\n".join(data), last_id))
            event, data = b"", []
        elif name == b"data":
            data.append(value)
        elif name == b"event":
            event = value
        elif name == b"id" and b"\0" not in value:
            last_id = value
    return events


def tracker_after(*pieces: bytes) -> sse.Tracker:
    tracker = sse.Tracker()
    for piece in pieces:
        tracker.feed(piece)
    return tracker


def known(tracker: sse.Tracker) -> tuple[bool, bool, int]:
    return tracker.at_boundary, tracker.id_seen, tracker.events


def expected(stream: bytes) -> tuple[bool, bool, int]:
    return stands_at_boundary(stream), has_carried_id(stream), blocks_ended(stream)


# What decides anything, far more often than random bytes would.
TOKENS = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r", b"\r\r\n", b"\n\n\n"),
        *(b"id", b"id:", b"id: 7", b"i", b"d", b":", b"data: x", b"data: id:1", b"idx: 1", b": id: 1", b"\nid\n"),
        *(b"data: one line\n\n", b"data: one line\r\n\r\n", b"data: one line\r\r", b"event: a\ndata: b\n\n"),
        *(BOM, BOM[:1], BOM[1:], b"\xbf", b"\xc2\xbf", b"\0", b"x"),
    ]
)
STREAMS = st.one_of(
    st.lists(TOKENS, max_size=30).map(b"".join),
    st.lists(TOKENS, max_size=12).map(lambda tokens: BOM + b"".join(tokens)),
    st.lists(st.sampled_from([b"\r", b"\n", b"i", b"d", b":"]), max_size=12).map(b"".join),
    st.binary(max_size=60),
)


@st.composite
def split(draw: st.DrawFn, streams: st.SearchStrategy[bytes] = STREAMS) -> list[bytes]:
    stream = draw(streams)
    cuts = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


# --- the tracker --------------------------------------------------------------------------------------------------


@given(split())
@example([BOM[:1], BOM[1:], b"i", b"d\r", b"\n"])
@example([b"x\r\n\r", b"\n", b"y\r", b"\n\r", b"\n"])
@example([b"\n\n", b"\xef\xbb\xbfid: 1\n"])
def test_in_any_pieces_it_knows_what_a_parser_of_the_whole_knows(pieces: list[bytes]) -> None:
    tracker = sse.Tracker()
    so_far = b""
    for piece in pieces:
        tracker.feed(piece)
        so_far += piece
        assert known(tracker) == expected(so_far), so_far


@given(STREAMS)
def test_byte_by_byte_it_knows_the_same(stream: bytes) -> None:
    tracker = sse.Tracker()
    for i in range(len(stream)):
        tracker.feed(stream[i : i + 1])
        assert known(tracker) == expected(stream[: i + 1])


BOUNDARIES = [
    pytest.param(b"", True, 0, id="start"),
    pytest.param(b"data: x", False, 0, id="in-a-line"),
    pytest.param(b"data: x\n", False, 0, id="lf"),
    pytest.param(b"data: x\r", False, 0, id="cr"),
    pytest.param(b"data: x\r\n", False, 0, id="crlf-is-one-line-end"),
    pytest.param(b"data: x\n\n", True, 1, id="lf-lf"),
    pytest.param(b"data: x\r\r", True, 1, id="cr-cr"),
    pytest.param(b"data: x\r\n\r\n", True, 1, id="crlf-crlf"),
    pytest.param(b"data: x\r\n\r", True, 1, id="crlf-cr"),
    pytest.param(b"data: x\n\r", True, 1, id="lf-cr"),
    pytest.param(b"data: x\n\r\n", True, 1, id="lf-crlf"),
    pytest.param(b"data: x\r\n\n", True, 1, id="crlf-lf"),
    pytest.param(b"data: x\r\r\n", True, 1, id="cr-crlf"),
    pytest.param(b"data: x\n\n\n\n", True, 1, id="more-blank-lines-end-nothing-more"),
    pytest.param(b"\n\n\n", True, 0, id="blank-lines-alone-end-nothing"),
    pytest.param(b": comment\n\n", True, 1, id="a-comment-is-a-block"),
    pytest.param(b"data: a\n\ndata: b\r\n\r\ndata: c\r\r", True, 3, id="three-kinds"),
    pytest.param(b"data: a\n\ndata: b", False, 1, id="half-an-event"),
    pytest.param(b"data: \\n\\n", False, 0, id="escaped-line-ends-are-text"),
    pytest.param("data: x\u2028\u2029\x85\x0b\x0c\n\n".encode(), True, 1, id="unicode-line-ends-are-text"),
    pytest.param("data: x\u0085\u0085".encode(), False, 0, id="nel-ends-nothing"),
    pytest.param(BOM, False, 0, id="a-byte-order-mark-is-no-line"),
    pytest.param(BOM + b"\n", True, 0, id="a-blank-line-after-a-byte-order-mark"),
    pytest.param(BOM[:2], False, 0, id="half-a-byte-order-mark"),
    pytest.param(BOM + BOM, False, 0, id="only-one-byte-order-mark"),
    pytest.param(b"\xff\xfe\0\n\n", True, 1, id="not-utf-8"),
]


@pytest.mark.parametrize(("stream", "at_boundary", "events"), BOUNDARIES)
@pytest.mark.parametrize("step", [pytest.param(1, id="byte-by-byte"), pytest.param(10_000, id="whole")])
@pytest.mark.parametrize("before", [pytest.param(b"", id="first"), pytest.param(b"data: 0\n\n", id="later")])
def test_where_an_event_ends(stream: bytes, at_boundary: bool, events: int, step: int, before: bytes) -> None:
    if before and stream.startswith(BOM[:2]):
        at_boundary, events = False, 0  # in the middle of a stream it is text
    tracker = tracker_after(before, *(stream[i : i + step] for i in range(0, len(stream), step)))
    assert (tracker.at_boundary, tracker.events) == (at_boundary, events + bool(before))


@pytest.mark.parametrize(("stream", "at_boundary", "events"), BOUNDARIES)
def test_a_tail_takes_it_away_from_the_boundary(stream: bytes, at_boundary: bool, events: int) -> None:
    tracker = tracker_after(stream, b"data: tail")
    assert not tracker.at_boundary
    assert tracker.events == events


@pytest.mark.parametrize(
    ("stream", "seen"),
    [
        pytest.param(b"id: 1\n", True, id="lf"),
        pytest.param(b"id: 1\r", True, id="cr"),
        pytest.param(b"id: 1\r\n", True, id="crlf"),
        pytest.param(b"id:1\n", True, id="no-space"),
        pytest.param(b"id:\n", True, id="empty"),
        pytest.param(b"id\n", True, id="no-colon"),
        pytest.param(b"id\r\n", True, id="no-colon-crlf"),
        pytest.param(BOM + b"id: 1\n", True, id="behind-a-byte-order-mark"),
        pytest.param(b"data: x\nid: 1\n", True, id="second-line"),
        pytest.param(b"data: x\rid: 1\r", True, id="second-line-cr"),
        pytest.param(b"data: x\n\n\nid: 1\n", True, id="after-more-blank-lines"),
        pytest.param(b"data: x\n\n" * 9 + b"id: 9\n\n", True, id="after-many-events"),
        pytest.param(b"data: id: 1\n\n", False, id="in-data"),
        pytest.param(b'data: {"id":"chatcmpl-1","grid:":1}\n\n', False, id="in-json"),
        pytest.param(b": id: 1\n\n", False, id="in-a-comment"),
        pytest.param(b" id: 1\n\n", False, id="after-a-space"),
        pytest.param(b"ID: 1\n\n", False, id="upper-case"),
        pytest.param(b"idx: 1\n\n", False, id="longer-name"),
        pytest.param(b"i\nd: 1\n\n", False, id="torn-by-a-line-end"),
        pytest.param("data: \u00bfid: 1\n\n".encode(), False, id="text-byte-of-a-byte-order-mark"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 3, 10_000])
@pytest.mark.parametrize("before", [b"", b"data: 0\n\n", b"data: 0\r\n\r\n", b"data: 0\r\r"])
def test_an_id_field_is_seen(stream: bytes, seen: bool, step: int, before: bytes) -> None:
    if before and stream.startswith(BOM):
        seen = False  # in the middle of a stream the mark is a part of the field's name
    tracker = tracker_after(before, *(stream[i : i + step] for i in range(0, len(stream), step)))
    assert tracker.id_seen is seen


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_events_in_one_piece_or_in_many_are_counted_alike(end: bytes) -> None:
    stream = b"".join(b"data: %d%s" % (number, end) for number in range(1000))
    assert tracker_after(stream).events == 1000
    assert tracker_after(*(stream[i : i + 7] for i in range(0, len(stream), 7))).events == 1000
    assert tracker_after(*re.findall(rb".*?" + end, stream, re.DOTALL)).events == 1000


# --- what may be added --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "heartbeat"),
    [
        pytest.param(b"", b": keep-alive\n\n", id="start"),
        pytest.param(b"data: x\n\n", b": keep-alive\n\n", id="boundary"),
        pytest.param(b"data: x\r\n\r\n", b": keep-alive\n\n", id="boundary-crlf"),
        pytest.param(b"data: x\r\n\r", b": keep-alive\n\n", id="a-lf-may-follow"),
        pytest.param(b"data: x\n", b"", id="within-an-event"),
        pytest.param(b"data: x", b"", id="within-a-line"),
        pytest.param(b"id: 1\ndata: x\n", b"", id="within-an-event-with-an-id"),
        pytest.param(b"id: 1\ndata: x\n\n", b": keep-alive\n", id="after-an-id"),
        pytest.param(b"id: 1\n\ndata: x\n\n", b": keep-alive\n", id="long-after-an-id"),
        pytest.param(b"id: 1\r\n\r\n", b": keep-alive\n", id="after-an-id-crlf"),
        pytest.param(b"id: 1\r\n\r", b"", id="after-an-id-a-lf-may-follow"),
        pytest.param(b"id: 1\r\r", b": keep-alive\n", id="after-an-id-cr"),
    ],
)
def test_the_heartbeat_for_where_the_stream_stands(stream: bytes, heartbeat: bytes) -> None:
    assert tracker_after(stream).heartbeat == heartbeat
    assert tracker_after(*(stream[i : i + 1] for i in range(len(stream)))).heartbeat == heartbeat


@given(split(), STREAMS)
@example([b"id: 1\r\r"], b"\ndata: x\n\n")
@example([b"id: 1\r\n\r"], b"\ndata: x\r\n\r\n")
@example([b"data: x\n\r"], b"\nid: 1\n\n")
def test_a_heartbeat_changes_no_event(pieces: list[bytes], rest: bytes) -> None:
    before = b"".join(pieces)
    tracker = tracker_after(*pieces)
    # A byte order mark that comes after a heartbeat is text: known, and no upstream of note sends one.
    assume(before.removeprefix(BOM) or not rest.startswith(BOM))
    after = before + tracker.heartbeat * 2 + rest
    assert events_of(after) == events_of(before + rest)
    # A stream of lone CRs whose next byte makes its last one a CRLF, the first it ever had: known, and unheard of.
    first_crlf = before.endswith(b"\r") and rest.startswith(b"\n") and b"\r\n" not in before
    if tracker.id_seen and not first_crlf:
        # openai-python takes each blank line for the end of an event then, and fails on an empty one.
        assert blank_lines(after) == blank_lines(before + rest)


@given(split())
def test_an_error_frame_at_a_boundary_is_one_more_event(pieces: list[bytes]) -> None:
    before = b"".join(pieces)
    tracker = tracker_after(*pieces)
    assume(tracker.at_boundary)
    error = errors.IdleTimeout("nothing came \u2013 \u2028 at all").json("req-1")
    frame = sse.error_frame(error)
    *events, (kind, data, _) = events_of(before + tracker.heartbeat + frame)
    assert events == events_of(before)
    assert kind == b"error"
    assert json.loads(data)["error"]["code"] == "idle_timeout"


def test_an_error_frame_takes_text_of_any_language() -> None:
    assert events_of(sse.error_frame('{"error": "größer"}')) == [(b"error", '{"error": "größer"}'.encode(), b"")]


# --- the media type -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        pytest.param("text/event-stream", True, id="plain"),
        pytest.param("text/event-stream; charset=utf-8", True, id="parameter"),
        pytest.param("text/event-stream;charset=utf-8", True, id="parameter-no-space"),
        pytest.param(" Text/Event-Stream ; q=1", True, id="case-and-space"),
        pytest.param("\ttext/event-stream\t", True, id="tabs"),
        pytest.param("", False, id="none"),
        pytest.param("text/event-streams", False, id="longer"),
        pytest.param("text/event-stream-x", False, id="suffix"),
        pytest.param("text/event", False, id="shorter"),
        pytest.param("application/json; text/event-stream", False, id="in-a-parameter"),
        pytest.param("application/json, text/event-stream", False, id="two-values"),
        pytest.param("text/event-stream, text/event-stream", False, id="twice"),
        pytest.param("text/event-stream\xa0", False, id="a-space-of-latin-1"),
        pytest.param("application/x-ndjson", False, id="ndjson"),
    ],
)
def test_what_is_an_event_stream(value: str, is_one: bool) -> None:
    assert sse.is_event_stream(value) is is_one
