"""What the text view reads: events out of bytes, text out of events. Bytes and text alone; no server runs here."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from harness import cases, llm
from hypothesis import given
from hypothesis import strategies as st

from relay import errors
from relay.llm.answer import Answer, Joiner, failure_in_body
from relay.wire.sse_parser import Event, Parser, TooLarge

if TYPE_CHECKING:
    from collections.abc import Iterable

STREAMS = [case for case in cases.recorded() if case.is_event_stream]
EDGES = cases.edge_cases()


def events_of(pieces: Iterable[bytes]) -> list[Event]:
    parser = Parser(most=64 * 1024 * 1024)
    return [event for piece in pieces for event in parser.feed(piece)]


def by_the_book(body: bytes) -> list[Event]:
    """The standard's rules, word by word, on the whole body at once."""
    text = body.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = re.split(r"\r\n|\n|\r", text)[:-1]  # what no line end has ended is no line
    found: list[Event] = []
    data = name = last_id = ""
    for line in lines:
        if line == "":
            if data:
                found.append(Event(name or "message", data[:-1], last_id))
            data = name = ""
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data += value + "\n"
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value
    return found


# --- Events


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(b"data: one\n\n", [("message", "one")], id="one"),
        pytest.param(b"event: x\ndata: 1\ndata: 2\n\n", [("x", "1\n2")], id="name and two lines"),
        pytest.param(
            b"data: one\r\rdata: two\r\n\r\ndata: three\n\r",
            [("message", w) for w in ("one", "two", "three")],
            id="line ends",
        ),
        pytest.param(
            b"\xef\xbb\xbfdata: one\n\n\xef\xbb\xbfdata: two\n\n",
            [("message", "one")],
            id="a byte order mark at the start only",
        ),
        pytest.param(
            b"data:  two\n\ndata:none\n\n data: no field\n\n",
            [("message", " two"), ("message", "none")],
            id="one space goes",
        ),
        pytest.param(b"data\n\ndata:\ndata:\n\n", [("message", ""), ("message", "\n")], id="empty data is data"),
        pytest.param(b": c\n\nevent: x\n\ndata: y\n\n", [("message", "y")], id="a name without data is forgotten"),
        pytest.param(b"data: whole\n\ndata: not\n", [("message", "whole")], id="an event that has not ended"),
        pytest.param(
            "data: \u2028\u2029\x85\x0b\x1c\n\n".encode(), [("message", "\u2028\u2029\x85\x0b\x1c")], id="no line ends"
        ),
        pytest.param(b"data: \xff\xe2\x82\n\n", [("message", "\ufffd\ufffd")], id="ill UTF-8"),
        pytest.param(
            b"id: 1\ndata: a\n\ndata: b\n\nid: 2\n\ndata: c\n\nid\ndata: d\n\n",
            [("message", "a", "1"), ("message", "b", "1"), ("message", "c", "2"), ("message", "d")],
            id="the last id stays",
        ),
    ],
)
def test_events_are_what_the_standard_says(body: bytes, expected: list[tuple[str, ...]]) -> None:
    expected_events = [Event(*each) for each in expected]
    assert by_the_book(body) == expected_events
    assert events_of([body]) == events_of(cases.by_bytes(body)) == expected_events


def test_ids_and_retry_times_are_kept() -> None:
    parser = Parser()
    parser.feed(b"id: 7\nretry: 250\n\n")
    assert (parser.last_id, parser.retry) == ("7", 250)
    parser.feed(b"id: a\0b\nretry: 1.5\nretry: -1\nretry:\n\n")
    assert (parser.last_id, parser.retry) == ("7", 250)
    parser.feed(b"id\n\n")
    assert parser.last_id == ""


@pytest.mark.parametrize("case", [*STREAMS, *EDGES], ids=lambda case: case.name)
def test_events_do_not_depend_on_the_pieces(case: cases.Case) -> None:
    expected = by_the_book(case.body)
    assert events_of(case.pieces) == expected
    for seed in range(3):
        assert events_of(cases.at_random(case.body, seed)) == expected
    if len(case.body) < 30_000:
        assert events_of(cases.by_bytes(case.body)) == expected


WORDS = [
    *(b"data", b"event", b"id", b"retry", b":", b" ", b"\n", b"\r", b"\r\n", b"\n\n"),
    *(b"\xef\xbb\xbf", b"\xf0\x9f\x90\x98", b"\xff", b"\0", b"x"),
]


@given(st.lists(st.sampled_from(WORDS), max_size=40), st.lists(st.integers(1, 6), max_size=60))
def test_any_bytes_in_any_pieces_give_what_the_standard_says(words: list[bytes], sizes: list[int]) -> None:
    body = b"".join(words)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(body[at : at + size])
        at += size
    assert events_of([*pieces, body[at:]]) == by_the_book(body)


def test_an_event_without_end_is_refused_and_takes_no_more_memory() -> None:
    for piece in (b"x" * 1000, b"data: " + b"x" * 993 + b"\n", b":" * 999 + b"\n"):
        parser = Parser(most=10_000)
        if piece.startswith(b":"):
            for _ in range(100):
                assert parser.feed(piece) == []  # comments are not kept
            continue
        assert sum(1 for _ in range(9) if parser.feed(piece) == []) == 9
        with pytest.raises(TooLarge):
            parser.feed(piece * 3)


# --- Text


def text_of(events: Iterable[bytes | Event]) -> tuple[str, Answer]:
    answer, pieces = Answer(), []
    parser = Parser()
    for each in events:
        for event in parser.feed(each) if isinstance(each, bytes) else [each]:
            pieces.append(answer.read(event))  # noqa: PERF401 - it may raise in between
    return "".join([*pieces, answer.end()]), answer


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0) -> Event:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return Event("message", json.dumps({"choices": [choice], "model": "m"}))


@pytest.mark.parametrize(
    ("events", "reason"),
    [(llm.chat_events(), "stop"), (llm.response_events(), "completed"), (llm.message_events(), "end_turn")],
    ids=["chat completions", "responses", "messages"],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_each_api_is_known_by_its_events(events: list[bytes], reason: str, end: str) -> None:
    body = b"".join(events).replace(b"\n", end.encode())
    for pieces in ([body], cases.by_bytes(body)):
        text, answer = text_of(pieces)
        assert text == llm.TEXT
        assert answer.ended
        assert not answer.strange
        assert answer.summary()["finish_reason"] == reason
        assert answer.summary()["model"] == llm.MODEL


def test_usage_is_told_as_it_was_reported() -> None:
    _, answer = text_of(llm.message_events())
    assert answer.usage == {"input_tokens": 3, "output_tokens": len(llm.WORDS)}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "cost": float("nan")}
    _, answer = text_of(
        [chunk({"content": "x"}, "stop"), Event("message", json.dumps({"choices": [], "usage": usage}))]
    )
    assert answer.usage == {"prompt_tokens": 3, "completion_tokens": 4, "cost": None}  # NaN is no JSON


def test_only_the_first_choice_is_read() -> None:
    text, answer = text_of([chunk({"content": "a"}), chunk({"content": "b"}, "length", 1), chunk({"content": "c"})])
    assert (text, answer.finished) == ("ac", False)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"choices": [{"text": "old", "index": 0}]}, "old"),
        ({"choices": [{"delta": {"refusal": "no"}}]}, "no"),
        ({"choices": [{"delta": {"content": [{"type": "thinking"}, {"type": "text", "text": "parts"}]}}]}, "parts"),
        ({"choices": [{"delta": {"content": None, "reasoning_content": "hm"}}]}, ""),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{"}}]}}]}, ""),
        ({"choices": [None, 3, {"delta": 4, "text": 5, "finish_reason": {}}, {"delta": {"content": 7}}]}, ""),
        ({"choices": []}, ""),
        ({"type": "response.refusal.delta", "delta": "no"}, "no"),
        ({"type": "response.output_text.delta", "delta": None}, ""),
        ({"type": "response.completed", "response": 5}, ""),
        ({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}}, ""),
        ({"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}}, ""),
        ({"type": "content_block_delta", "delta": []}, ""),
        ({"type": "message_delta", "delta": None, "usage": []}, ""),
        ({"type": ["response."]}, ""),
        ({"type": "ping"}, ""),
        ({}, ""),
    ],
)
def test_events_of_all_shapes(said: dict[str, Any], text: str) -> None:
    assert text_of([Event("message", json.dumps(said))])[0] == text


@pytest.mark.parametrize("data", ["[1]", "7", "null", "hello", "", "[DONE]x"])
def test_data_that_is_no_object_says_nothing(data: str) -> None:
    text, answer = text_of([Event("message", data)])
    assert (text, answer.ended, answer.strange) == ("", False, True)


@pytest.mark.parametrize("data", ['{"choices": [', "{" * 100_000, '{"a":' * 100_000])
def test_text_that_cannot_be_read_is_a_failure_and_not_a_gap(data: str) -> None:
    with pytest.raises(errors.UpstreamFailed):
        Answer().read(Event("message", data))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        (
            "error",
            llm.openai_error("slow down", "rate_limit", "429").decode(),
            ("slow down", "rate_limit", "429", None),
        ),
        ("message", llm.openai_error("slow", "t", "c").decode(), ("slow", "t", "c", None)),
        ("error", llm.anthropic_error("busy", "overloaded_error").decode(), ("busy", "overloaded_error", None, None)),
        ("message", '{"choices":[{"delta":{}}],"error":{"message":"limit","code":400}}', ("limit", None, None, 400)),
        ("message", '{"error":"words alone"}', ("words alone", None, None, None)),
        ("message", '{"type":"error","message":"m","code":"c"}', ("m", None, "c", None)),
        (
            "message",
            '{"type":"response.failed","response":{"error":{"code":"server_error","message":"sorry"}}}',
            ("sorry", None, "server_error", None),
        ),
        ("error", "plain words", ("plain words", None, None, None)),
        ("error", "", ("the upstream reported an error", None, None, None)),
        ("error", '{"error":{"message":5,"type":[],"code":{}}}', ("the upstream reported an error", None, None, None)),
    ],
)
def test_errors_in_a_stream_are_known(name: str, data: str, expected: tuple[Any, ...]) -> None:
    with pytest.raises(errors.UpstreamSaid) as raised:
        Answer().read(Event(name, data))
    message, kind, code, status = expected
    told = {"message": message, "type": kind or "upstream_error", "code": code or "upstream_refused", "request_id": "r"}
    assert json.loads(raised.value.json("r")) == {
        "type": "error",
        "error": told | ({"status": status} if status else {}),
    }


def test_an_error_is_passed_on_in_bounds_and_whole_characters() -> None:
    long = json.dumps({"error": {"message": "x" * 10_000 + "\ud800", "type": "\udfff", "code": "y" * 1000}})
    with pytest.raises(errors.UpstreamSaid) as raised:
        Answer().read(Event("error", long))
    told = json.loads(raised.value.json("r"))["error"]
    assert (len(told["message"]), told["type"], len(told["code"])) == (2000, "\ufffd", 100)


def test_no_error_is_no_failure() -> None:
    text, _ = text_of([Event("message", '{"choices":[{"delta":{"content":"x"}}],"error":null}')])
    assert text == "x"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (llm.openai_error("no", "t", "c"), 429, "no"),
        (b"event: error\ndata: " + llm.openai_error("no", "t", "c") + b"\n\n", 500, "no"),
        (b"<html>busy</html>", 503, "the upstream answered 503"),
        (b"", 500, "the upstream answered 500"),
        (llm.chat_answer(), 200, "the upstream answered 200 with application/json, and not with an event stream"),
    ],
)
def test_an_answer_that_is_no_stream_says_why(body: bytes, status: int, message: str) -> None:
    error = failure_in_body(body, status, "application/json; charset=utf-8")
    assert (error.message, error.upstream_status) == (message, status)


@given(st.text(st.characters(codec=None, exclude_categories=[]), max_size=30), st.data())
def test_text_is_exact_wherever_the_escapes_of_its_characters_are_split(text: str, data: st.DataObject) -> None:
    """As JSON has it: characters beyond U+FFFF are two escapes, and each may be in another event."""
    units = [json.loads(f'"{escape}"') for escape in re.findall(r"\\u....|\\.|.", json.dumps(text)[1:-1])]
    joiner, got, at = Joiner(), "", 0
    while at < len(units):
        size = data.draw(st.integers(1, 4))
        piece = json.loads(json.dumps("".join(units[at : at + size])))
        got += joiner.feed(piece)
        at += size
    got += joiner.end()
    assert got == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    got.encode()


def test_half_a_character_waits_for_its_other_half() -> None:
    text, _ = text_of([chunk({"content": "a\ud83d"}), chunk({}), chunk({"content": "\udc18b\ud83d"}, "stop")])
    assert text == "a🐘b\ufffd"


# What the recorded streams say. The text is found by another way than the module's: patterns in the raw bytes.
_IN_CHAT = re.compile(r'"content":\s*("(?:[^"\\]|\\.)*")')
_IN_MESSAGES = re.compile(r'"type":\s*"text_delta",\s*"text":\s*("(?:[^"\\]|\\.)*")')
_IN_RESPONSES = re.compile(r'"type":"response\.output_text\.delta".*?"delta":("(?:[^"\\]|\\.)*")')
STRANGE = ("cohere", "gemini", "mcp", "replicate", "watsonx", "bedrock")
FAILED = ("groq-error", "openrouter-error")


@pytest.mark.parametrize("case", STREAMS, ids=lambda case: case.name)
def test_recorded_streams_say_what_they_say(case: cases.Case) -> None:
    try:
        text, answer = text_of(cases.at_random(case.body, 1))
    except errors.UpstreamSaid:
        assert case.name.startswith(FAILED)
        return
    assert not case.name.startswith(FAILED)
    assert answer.strange == case.name.startswith(STRANGE)
    if answer.strange:
        assert text == ""
        return
    assert answer.ended
    raw = case.body.decode()
    if case.name.startswith("openai-responses"):
        found = _IN_RESPONSES.findall(raw)
    elif '"message_start"' in raw:
        found = _IN_MESSAGES.findall(raw)
    else:
        lines = [
            re.sub(r'"(reasoning_details|annotations|logprobs)":\s*[\[{].*?[\]}](?=[,}])', "", line)
            for line in raw.splitlines()
        ]
        found = [each for line in lines for each in _IN_CHAT.findall(line)]
    assert text == "".join(map(json.loads, found))
