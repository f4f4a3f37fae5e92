"""The prompt endpoints, through real gunicorn: what goes upstream for a prompt, and what a page gets to read."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode

import pytest
from harness import cases, eventually, llm, own_cases, servers, turns
from harness.client import Connection, request
from harness.upstream import PeerGone, Upstream

from relay.llm.prompt import Pace, Prompt
from relay.wire.sse_parser import Parser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Service
    from harness.client import Response
    from harness.servers import Gunicorn
    from harness.upstream import Exchange

JSON = {"Content-Type": "application/json"}
CHAT = "/chat/completions"
STREAM = [("Content-Type", "text/event-stream")]


class Place(NamedTuple):
    """Relays in front of one upstream; `at` is what stands before the endpoints' paths."""

    upstream: Upstream
    port: int
    at: str
    relay: Gunicorn

    def post(self, path: str = "/chat/stream", headers: dict[str, str] | None = None, **said: Any) -> Connection:
        connection = Connection(self.port)
        connection.send("POST", self.at + path, {**JSON, **(headers or {})}, json.dumps(said).encode())
        return connection

    def ask(self, path: str = "/chat/stream", headers: dict[str, str] | None = None, **said: Any) -> Response:
        return self.post(path, headers, **said).read_head()

    def get(self, headers: dict[str, str] | None = None, **said: Any) -> Response:
        return request(self.port, "GET", f"{self.at}/chat/stream?{urlencode(said)}", headers or {})

    def answers(self, *pieces: bytes, then: str = "clean", headers: Any = STREAM, status: int = 200) -> None:
        """What the upstream says from now on."""

        def handler(ex: Exchange) -> None:
            ex.head(status, "Because", headers)
            for piece in pieces:
                ex.send(piece)
            ex.abort() if then == "abort" else ex.end()

        self.upstream.serve(handler, CHAT)
        self.upstream.serve(handler, "/messages")

    def by_hand(self) -> None:
        self.upstream.forget(CHAT)
        self.upstream.by_hand(CHAT)

    def next(self) -> Exchange:
        return self.upstream.next(CHAT)


_MOUNTED = """
from flask import Flask
from relay import Relay

app = Flask("shop")
relay = Relay(app, url_prefix="/ai", settings=%r)
"""
_IMPATIENT = """
impatient = Relay(app, name="impatient", url_prefix="/impatient", settings=%r)
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


_SETTINGS = {"RELAY_HEARTBEAT": "60s", "RELAY_IDLE_TIMEOUT": "60s", "RELAY_HOLD": "30s"}
#: Not less: on a busy machine the upstream, which is the test, may be silent for two seconds without meaning it.
IDLE = 2.5


@pytest.fixture(scope="module")
def service(upstream: Upstream) -> Iterator[Place]:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **_SETTINGS}) as relay:
        yield Place(upstream, relay.port, "", relay)


@pytest.fixture(scope="module", params=["service", "gevent", "gthread"])
def place(
    upstream: Upstream, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The service, and a mounted relay under gevent and under plain threads."""
    if request.param == "service":
        yield request.getfixturevalue("service")
        return
    folder: Path = tmp_path_factory.mktemp("shop")
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url, **_SETTINGS}
    code = _MOUNTED % settings + _IMPATIENT % {**settings, "RELAY_IDLE_TIMEOUT": IDLE}
    (folder / "shop.py").write_text(code)
    args = ["-k", request.param, "--threads", "16"]
    with servers.gunicorn({"PYTHONPATH": str(folder)}, "shop:app", None, args, ready=None) as relay:
        yield Place(upstream, relay.port, "/ai/_relay", relay)


@pytest.fixture(scope="module")
def _impatient_service(upstream: Upstream) -> Iterator[Place]:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, **_SETTINGS, "RELAY_IDLE_TIMEOUT": str(IDLE)}
    with servers.gunicorn(env) as relay:
        yield Place(upstream, relay.port, "", relay)


@pytest.fixture
def impatient(place: Place, request: pytest.FixtureRequest) -> Place:
    """Such a relay that gives up an upstream which is silent for so long as IDLE."""
    if not place.at:
        found: Place = request.getfixturevalue("_impatient_service")
        return found
    return place._replace(at="/impatient/_relay")


def events(body: bytes) -> list[tuple[str, str]]:
    return [(event.name, event.data) for event in Parser().feed(body)]


def said(found: list[tuple[str, str]]) -> str:
    """The text of all events."""
    pieces = [data for name, data in found if name == "message"]
    pieces += [json.loads(data)["content"] for name, data in found if name in ("batch", "final")]
    return "".join(pieces)


def chunk(text: str, finish: str | None = None) -> bytes:
    return llm.event(llm.as_json({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}))


DONE = b"data: [DONE]\n\n"


def begin(ex: Exchange, data: bytes) -> None:
    """The head and these first bytes, at once: a clock of the relay's runs between two."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    ex._framing = "chunked"
    ex.raw(head + b"%x\r\n%b\r\n" % (len(data), data))


def end(ex: Exchange, data: bytes) -> None:
    """These bytes and the end of the body, at once."""
    ex.raw(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
    ex.finished.set()


# --- What goes upstream


def test_the_chat_request_is_built_and_its_stream_comes_back_as_it_is(place: Place) -> None:
    place.answers(*llm.chat_events(), headers=[*STREAM, ("x-request-id", "of-the-upstream")])
    headers = {
        "Content-Type": "text/plain", "Accept": "*/*", "Last-Event-ID": "7", "Content-Language": "cs", "X-Mine": "1",
        "If-None-Match": '"x"', "Range": "bytes=0-1",
    }  # fmt: skip
    response = place.ask("/api/stream-chat", headers, prompt="“Hello” 🐘", model="made-up")
    assert response.status == 200
    assert response.header("X-Upstream-Request-ID") == b"of-the-upstream"
    assert response.finish() == (b"".join(llm.chat_events()), "clean", "last chunk")
    ex = place.upstream.seen(CHAT)[-1]
    assert (ex.method, ex.target) == (b"POST", CHAT.encode())
    assert json.loads(ex.body) == {
        "model": "made-up", "messages": [{"role": "user", "content": "“Hello” 🐘"}], "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert ex.all("Content-Type") == [b"application/json"]
    assert ex.all("Accept") == [b"text/event-stream"]
    assert ex.all("Content-Length") == [str(len(ex.body)).encode()]
    assert ex.all("X-Mine") == [b"1"]
    for name in ("Last-Event-ID", "Content-Language", "If-None-Match", "Range", "Content-Encoding"):
        assert ex.all(name) == []


def test_a_whole_conversation_may_stand_in_place_of_the_prompt(service: Place) -> None:
    service.answers(*llm.chat_events())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for path in ("/api/stream-chat", "/chat/stream"):
        assert service.ask(path, messages=messages).finish().ended == "clean"
        asked = json.loads(service.upstream.seen(CHAT)[-1].body)
        assert asked == {
            "model": "gpt-4.1",
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def test_anthropics_api_is_asked_in_its_own_shape(upstream: Upstream) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_UPSTREAM_HEADERS": '{"Anthropic-Version": "2023-06-01"}'}
    with servers.gunicorn({**env, "RELAY_CHAT_MODEL": "claude"}) as relay:
        place = Place(upstream, relay.port, "", relay)
        place.answers(*llm.message_events())
        messages = [
            {"role": "system", "content": "A"},
            {"role": "user", "content": "B"},
            {"role": "system", "content": "C"},
        ]
        body = place.ask(messages=messages).finish()
        assert said(events(body.data)) == llm.TEXT
        ex = upstream.seen("/messages")[-1]
        assert json.loads(ex.body) == {
            "model": "claude", "max_tokens": 4096, "messages": messages[1:2], "stream": True, "system": "A\n\nC",
        }  # fmt: skip
        assert place.ask(messages=messages[:1]).status == 400


MESSAGE = b'{"role": "user", "content": "x"}'
BAD: list[Any] = [
    pytest.param(b"", "body must be JSON", id="nothing"),
    pytest.param(b"prompt=Hello", "body must be JSON", id="a form"),
    pytest.param(b"\x1f\x8b\x08", "body must be JSON", id="compressed"),
    pytest.param(b"[" * 10_000, "body must be JSON", id="brackets"),
    pytest.param(b"[" * 100_000, "more than 20000 values", id="more brackets"),
    pytest.param(b'{"messages": [%s]}' % b",".join([MESSAGE] * 5000), "some 4000 messages", id="messages"),
    pytest.param(b'{"prompt": "x", "y": [%s]}' % b",".join([b"0"] * 30_000), "more than 20000", id="numbers"),
    pytest.param(b'{"prompt": "x\\', "body must be JSON", id="a backslash at the end"),
    pytest.param(b'["Hello"]', "JSON object", id="a list"),
    pytest.param(b"null", "JSON object", id="null"),
    pytest.param(b"{}", "prompt is missing", id="no prompt"),
    pytest.param(b'{"prompt": null}', "prompt is missing", id="null prompt"),
    pytest.param(b'{"prompt": ""}', "prompt must not be empty", id="empty"),
    pytest.param(b'{"prompt": " \\n"}', "prompt must not be empty", id="blank"),
    pytest.param(b'{"prompt": 5}', "prompt must be a text", id="a number"),
    pytest.param(b'{"prompt": "x", "messages": []}', "cannot stand together", id="both"),
    pytest.param(b'{"messages": []}', "messages must be a list", id="no messages"),
    pytest.param(b'{"messages": {"role": "user"}}', "messages must be a list", id="one message"),
    pytest.param(b'{"messages": ["x"]}', "messages[0]", id="a message that is a text"),
    pytest.param(b'{"messages": [{"role": "user"}]}', "messages[0]", id="no content"),
    pytest.param(b'{"messages": [{"role": "user", "content": ["x"]}]}', "messages[0]", id="content in parts"),
    pytest.param(b'{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "messages[0]", id="more"),
    pytest.param(b'{"prompt": "x", "model": 5}', "model must be a text", id="model"),
    pytest.param(b'{"prompt": "x", "model": ""}', "model must be a text", id="empty model"),
    pytest.param(b'{"prompt": "x", "model": ["y"]}', "model must be a text", id="a list of models"),
    *(
        pytest.param(
            b'{"prompt": "x", "%s": %s}' % (name.encode(), value), f"{name} must be", id=f"{name} {value.decode()}"
        )
        for name in ("batch_ms", "batch_size", "max_events_per_second")
        for value in (b"-1", b"false", b"true", b'"5"', b"1e9", b"NaN", b"Infinity", b"[]", b"1" + b"0" * 400)
    ),
    pytest.param(b'{"prompt": "x", "batch_ms": 1.5}', "batch_ms must be a whole number from 1 to 60000", id="half"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bad_input_gets_a_sentence_that_names_what_is_wrong(service: Place, body: bytes, message: str) -> None:
    before = len(service.upstream.seen())
    response = request(service.port, "POST", "/chat/stream", JSON, body)
    assert response.status == 400
    assert response.header("Content-Type") == b"application/json"
    error = json.loads(response.finish().data)["error"]
    assert message in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_request")
    assert len(service.upstream.seen()) == before


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "prompt is missing"),
        ("prompt=", "prompt must not be empty"),
        ("prompt=x&model=", "model must be a text"),
        ("prompt=x&messages=[]", "messages can only stand"),
        *(
            (f"prompt=x&{name}={value}", f"{name} must be")
            for name in ("batch_ms", "batch_size", "max_events_per_second")
            for value in ("-1", "-0", "nan", "inf", "1e3", "x", "0x10", "999999999", "1" * 50)
        ),
    ],
)
def test_bad_queries_get_one_too(service: Place, query: str, message: str) -> None:
    response = request(service.port, "GET", f"/chat/stream?{query}", {"Accept": "text/event-stream"})
    assert response.status == 400
    assert message in json.loads(response.finish().data)["error"]["message"]


def read(body: bytes) -> tuple[Prompt, int]:
    """The prompt, and in how many steps it was read."""
    steps, count = Prompt.of_body(body, {}, "m"), 1
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count
        count += 1


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('[{"a": 1, "b": [2, 3]}, ' * 20_000, id="JSON in a text"),
        pytest.param("\n" * 300_000, id="escapes"),
        pytest.param("\\" * 300_001, id="backslashes"),
        pytest.param('"' * 300_001, id="quotes"),
        pytest.param("x,:[{" * 100_000, id="no escapes"),
    ],
)
def test_a_prompt_may_hold_any_number_of_signs(text: str) -> None:
    for messages in ({"prompt": "." + text}, {"messages": [{"role": "user", "content": "." + text}] * 1}):
        prompt, _ = read(json.dumps(messages).encode())
        assert prompt.messages == ({"role": "user", "content": "." + text},)


def test_others_have_their_turn_while_a_conversation_is_looked_at() -> None:
    prompt, steps = read(b'{"messages": [%s]}' % b",".join([MESSAGE] * 3900))
    assert len(prompt.messages) == 3900
    assert steps >= 3900 * 4 // 500


def test_a_pace_of_0_is_none() -> None:
    off = {"prompt": "x", "batch_ms": 0, "batch_size": 0, "max_events_per_second": 0.0}
    assert read(json.dumps(off).encode())[0].pace == Pace()
    assert Prompt.of_query({name: str(value) for name, value in off.items()}, "m").pace == Pace()


@pytest.mark.parametrize("path", ["/api/stream-chat", "/chat/stream", "/stream/aware", "/stream/heartbeat"])
def test_other_methods_are_refused(place: Place, path: str) -> None:
    before = len(place.upstream.seen())
    others = {"HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "GET"} - ({"GET"} if path == "/chat/stream" else set())
    for method in others:
        response = request(place.port, method, f"{place.at}{path}?prompt=x", {})
        assert response.status == 405, method
        assert response.header("Allow") == (b"GET, POST" if path == "/chat/stream" else b"POST")
        response.finish()
    assert len(place.upstream.seen()) == before


# --- What comes out


APIS = [(llm.chat_events, "stop"), (llm.response_events, "completed"), (llm.message_events, "end_turn")]


@pytest.mark.parametrize(("make", "reason"), APIS, ids=["chat completions", "responses", "messages"])
def test_the_text_comes_piece_by_piece_and_exactly(place: Place, make: Any, reason: str) -> None:
    place.answers(
        *make(), headers=[*STREAM, ("x-ratelimit-remaining-tokens", "9"), ("ETag", '"x"'), ("Set-Cookie", "a")]
    )
    response = place.ask(prompt="Hello")
    assert response.status == 200
    assert response.header("Content-Type") == b"text/event-stream; charset=utf-8"
    assert response.header("X-Accel-Buffering") == b"no"
    assert response.header("X-Content-Type-Options") == b"nosniff"
    assert response.header("x-ratelimit-remaining-tokens") == b"9"
    assert response.header("X-Request-ID")
    assert response.header("ETag") is response.header("Set-Cookie") is None
    body = response.finish()
    assert body.ended == "clean"
    *texts, (name, data) = events(body.data)
    assert texts == [("message", word) for word in llm.WORDS]
    assert name == "done"
    done = json.loads(data)
    assert (done["finish_reason"], done["model"]) == (reason, llm.MODEL)
    assert done.keys() == {"finish_reason", "model", "usage"}


def test_each_piece_is_sent_when_it_has_come(place: Place) -> None:
    place.by_hand()
    connection = place.post(prompt="Hello")
    ex = place.next()
    ex.head(headers=STREAM)
    response = connection.read_head()  # before any event
    for piece in (" one", " two"):
        ex.send(chunk(piece))
        assert response.read_event() == f"event: message\ndata: {piece}\n\n".encode()
    ex.send(chunk("", "stop"))
    ex.send(DONE)
    assert response.read_event().startswith(b"event: done\n")  # before the end of the body
    ex.end()
    assert response.finish().ended == "clean"


def test_an_answer_that_is_over_is_not_waited_for(place: Place) -> None:
    place.by_hand()
    connection = place.post(prompt="Hello")
    ex = place.next()
    ex.head(headers=STREAM)
    ex.send(chunk("x", "stop") + DONE)
    body = connection.read_head().finish()  # though the upstream's body does not end
    assert [name for name, _ in events(body.data)] == ["message", "done"]
    assert body.ended == "clean"
    ex.wait_gone()


def test_newlines_stay_and_carriage_returns_become_newlines(place: Place) -> None:
    pieces = [
        "one\ntwo",
        "\n\n",
        " three\r",
        "\nfour\r",
        "five\r\nsix\r\r",
        "\n",
        "",
        "\rdata: x\n\nevent: done\n",
        "end",
    ]
    place.answers(*map(chunk, pieces), chunk("", "stop"), DONE)
    found = events(place.ask(prompt="Hello").finish().data)
    assert [name for name, _ in found[-1:]] == ["done"]
    assert said(found) == "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
    exact = events(place.ask(prompt="Hello", batch_size=3).finish().data)
    assert said(exact) == "".join(pieces)


def test_a_character_in_two_events_is_whole(place: Place) -> None:
    halves = [
        b'data: {"choices":[{"delta":{"content":"a\\ud83d"}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"\\udc18"}}]}\n\n',
    ]
    place.answers(*halves, chunk("", "stop"))
    found = events(place.ask(prompt="Hello").finish().data)
    assert found[:2] == [("message", "a"), ("message", "🐘")]


def test_an_end_without_its_mark_is_one_if_the_model_said_why(place: Place) -> None:
    place.answers(chunk("text", "length"))
    assert [name for name, _ in events(place.ask(prompt="Hello").finish().data)] == ["message", "done"]


@pytest.mark.parametrize(
    "case", [each for each in cases.recorded() if each.is_event_stream], ids=lambda case: case.name
)
def test_recorded_streams_end_in_done_or_in_an_error(service: Place, case: cases.Case) -> None:
    service.answers(*cases.at_random(case.body, 3))
    body = service.ask(prompt="Hello").finish()
    names = [name for name, _ in events(body.data)]
    failed = case.name.startswith(("groq-error", "openrouter-error", "cohere", "gemini", "mcp", "replicate", "watsonx"))
    assert names[-1] == ("error" if failed else "done")
    assert set(names[:-1]) <= {"message"}
    said_error = case.name.startswith(("groq-error", "openrouter-error"))
    assert body.ended == ("clean" if said_error or not failed else "cut")


@pytest.mark.parametrize(
    "case",
    [each for each in [*cases.edge_cases(), *own_cases.OWN] if len(each.body) < 400_000],
    ids=lambda case: case.name,
)
def test_whatever_comes_is_never_done_and_has_one_end(service: Place, case: cases.Case) -> None:
    service.answers(
        *case.pieces, then="clean" if case.end == "clean" else "abort", headers=case.headers, status=case.status
    )
    body = service.ask(prompt="Hello").finish()
    names = [name for name, _ in events(body.data)]
    empty = b"[DONE]" in case.body and b"\n\n" in case.body and case.is_event_stream and names == ["done"]
    assert empty or names == ["error"]


# --- Failures


def error_of(body: bytes) -> dict[str, Any]:
    ((name, data),) = [each for each in events(body) if each[0] != "message"]
    assert name == "error"
    error: dict[str, Any] = json.loads(data)["error"]
    return error


def test_an_upstreams_refusal_keeps_its_status_and_words(place: Place) -> None:
    headers = [*llm.JSON, ("Retry-After", "7"), ("x-should-retry", "true"), ("x-request-id", "u-1")]
    place.answers(llm.openai_error("slow down", "tokens", "rate_limit_exceeded"), headers=headers, status=429)
    response = place.ask(headers={"X-Request-ID": "mine"}, prompt="Hello")
    assert (response.status, response.header("Retry-After"), response.header("x-should-retry")) == (429, b"7", b"true")
    assert response.header("Content-Type") == b"text/event-stream; charset=utf-8"
    body = response.finish()
    assert body.ended == "clean"
    assert error_of(body.data) == {
        "message": "slow down", "type": "tokens", "code": "rate_limit_exceeded", "request_id": "mine", "status": 429,
    }  # fmt: skip
    # EventSource shows a page no other answer than 200.
    response = place.get(prompt="Hello")
    assert response.status == 200
    assert error_of(response.finish().data)["message"] == "slow down"


@pytest.mark.parametrize(
    ("status", "headers", "body", "answered"),
    [
        (500, llm.JSON, b"{", 500),
        (529, [("Content-Type", "text/html")], b"<html>", 529),
        (500, STREAM, b"event: error\ndata: {}\n\n", 500),
        (200, llm.JSON, llm.chat_answer(), 502),
        (201, STREAM, b"".join(llm.chat_events()), 502),
        (302, [("Location", "/x")], b"", 502),
        (204, [], b"", 502),
        (200, [*STREAM, ("Content-Encoding", "gzip")], b"x", 502),
        (400, llm.JSON, b'{"error": {"message": "' + b"x" * 300_000, 400),
    ],
)
def test_an_answer_that_is_no_stream_is_an_error(
    place: Place, status: int, headers: Any, body: bytes, answered: int
) -> None:
    place.upstream.serve(
        lambda ex: ex.reply(body, status, headers=headers, framing="none" if status == 204 else "length"), CHAT
    )
    response = place.ask(prompt="Hello")
    assert response.status == answered
    whole = response.finish()
    assert whole.ended == "clean"
    error = error_of(whole.data)
    assert error["status"] == status
    assert str(status) in error["message"]
    assert place.get(prompt="Hello").status == 200


def test_of_an_endless_refusal_only_the_beginning_is_read(place: Place) -> None:
    place.by_hand()
    connection = place.post(prompt="Hello")
    ex = place.next()
    ex.head(400, "Bad", llm.JSON)
    ex.send(b" " * 70_000)
    assert error_of(connection.read_head().finish().data)["status"] == 400
    ex.wait_gone()


def test_a_cut_stream_is_an_error_and_ends_uncleanly(place: Place) -> None:
    for pieces in ((chunk("one"),), (chunk("one"), b"data: {"), (chunk("one", "stop"),)):
        place.answers(*pieces, then="abort")
        body = place.ask(prompt="Hello").finish()
        assert body.ended == "cut"
        assert said(events(body.data)) == "one"
        assert error_of(body.data)["code"] == "upstream_cut"


def test_an_end_that_is_none_is_a_cut(place: Place) -> None:
    for pieces in ((chunk("one"),), (), (b": hello\n\n",)):
        place.answers(*pieces)
        body = place.ask(prompt="Hello").finish()
        assert body.ended == "cut"
        assert error_of(body.data)["code"] == "upstream_cut"


def test_an_end_that_is_none_is_recorded_as_a_cut_too(service: Place) -> None:
    service.answers(chunk("one"))
    service.ask(prompt="Hello", headers={"X-Request-ID": "no-mark"}).finish()
    service.answers(chunk("one"), b"data: [DONE]\n\n")
    service.ask(prompt="Hello", headers={"X-Request-ID": "with-a-mark"}).finish()
    service.relay.wait_log("with-a-mark")
    lines = [json.loads(line) for line in service.relay.log().splitlines() if "mark" in line]
    assert {line["request_id"]: line["reason"] for line in lines} == {"no-mark": "upstream_cut", "with-a-mark": "done"}


def test_an_error_in_the_stream_ends_it(place: Place) -> None:
    place.answers(
        chunk("one"), llm.event(llm.openai_error("overloaded", "server_error", "busy"), "error"), chunk("two")
    )
    body = place.ask(prompt="Hello").finish()
    assert said(events(body.data)) == "one"
    assert error_of(body.data)["message"] == "overloaded"
    assert body.ended == "clean"


def test_an_upstream_that_cannot_be_reached_is_an_error(tmp_path: Path) -> None:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{servers.free_port()}"}) as relay:
        response = request(relay.port, "POST", "/chat/stream", JSON, b'{"prompt": "x"}')
        assert response.status == 502
        assert error_of(response.finish().data)["code"] == "upstream_unreachable"
        response = request(relay.port, "GET", "/chat/stream?prompt=x", {})
        assert response.status == 200
        assert error_of(response.finish().data)["code"] == "upstream_unreachable"


def test_an_upstream_that_falls_silent_is_an_error(impatient: Place) -> None:
    place = impatient
    place.by_hand()
    connection = place.post(prompt="Hello", batch_ms=100)
    ex = place.next()
    begin(ex, chunk("one"))
    body = connection.read_head().finish()
    assert body.ended == "cut"
    assert [name for name, _ in events(body.data)] == ["batch", "error"]
    assert json.loads(events(body.data)[-1][1])["error"]["code"] == "idle_timeout"
    ex.wait_gone()


def test_an_event_that_nobody_could_keep_is_an_error(place: Place) -> None:
    place.by_hand()
    connection = place.post(prompt="Hello")
    ex = place.next()
    ex.head(headers=STREAM)
    ex.send(chunk("one") + b"data: ")
    with contextlib.suppress(PeerGone):
        while ex.written < 64 * 1024 * 1024:
            ex.send(b"x" * 65536)
    assert ex.written < 16 * 1024 * 1024 or ex.gone
    body = connection.read_head().finish()
    assert body.ended == "cut"
    assert said(events(body.data)) == "one"
    assert "8388608 bytes" in error_of(body.data)["message"]


def test_a_client_of_http_1_0_sees_a_cut_too(service: Place) -> None:
    place = service
    place.answers(chunk("one"), then="abort")
    with Connection(place.port) as connection:
        body = b'{"prompt": "Hello"}'
        connection.send("POST", f"{place.at}/chat/stream", JSON, body, version="HTTP/1.0")
        whole = connection.read_head().finish()
    assert whole.ended == "cut"
    assert error_of(whole.data)["code"] == "upstream_cut"


def taken(relay: Gunicorn) -> int:
    """Bytes that open streams have read from upstream."""
    listed = json.loads(request(relay.admin_port, "GET", "/streams").finish().data)
    return sum(stream["bytes"] for stream in listed)


@pytest.mark.parametrize("how", [{}, {"batch_size": 1000}, {"max_events_per_second": 0.1}, {"aware": True}])
def test_a_drain_ends_it_with_a_word(upstream: Upstream, how: dict[str, Any]) -> None:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_DRAIN": "300ms"}) as relay:
        place = Place(upstream, relay.port, "", relay)
        place.by_hand()
        connection = place.post("/stream/aware" if how.pop("aware", False) else "/chat/stream", prompt="Hello", **how)
        ex = place.next()
        begin(ex, pieces := chunk("one") + chunk("two"))
        response = connection.read_head()
        eventually(lambda: taken(relay) >= len(pieces), "both pieces with the relay, sent on or not")
        relay.send_signal(signal.SIGTERM)
        body = response.finish()
        assert body.ended == "cut"
        assert said(events(body.data)) == "onetwo"
        assert json.loads(events(body.data)[-1][1])["error"]["code"] == "drained"
        ex.wait_gone()


def test_it_goes_through_nginx_piece_by_piece(behind_nginx: Service) -> None:
    upstream = behind_nginx.upstream
    upstream.by_hand(CHAT)
    try:
        with Connection(behind_nginx.port) as connection:
            connection.send("POST", "/chat/stream", JSON, b'{"prompt": "Hello"}')
            ex = upstream.next(CHAT)
            ex.head(headers=STREAM)
            response = connection.read_head()
            for piece in (" one", " two"):
                ex.send(chunk(piece))
                assert response.read_event() == f"event: message\ndata: {piece}\n\n".encode()
            ex.abort()
            body = response.finish()
            assert body.ended == "cut"
            assert events(body.data)[-1][0] == "error"
    finally:
        upstream.forget(CHAT)


# --- An EventSource


def test_an_event_source_is_told_not_to_come_back(place: Place) -> None:
    place.answers(*llm.chat_events())
    body = place.get(prompt="Hello", model="m").finish().data
    parser = Parser()
    parser.feed(body)
    assert body.startswith(b"id: ")
    assert parser.last_id
    assert said(events(body)) == llm.TEXT
    before = len(place.upstream.seen(CHAT))
    again = place.get({"Last-Event-ID": parser.last_id}, prompt="Hello")
    assert again.status == 204
    assert again.finish().data == b""
    assert len(place.upstream.seen(CHAT)) == before
    assert b"id:" not in place.ask(prompt="Hello").finish().data


# --- Batches and pace


def test_text_is_gathered_to_a_size(place: Place) -> None:
    place.answers(*[chunk(piece) for piece in ("12", "345", "6", "78", "🐘")], chunk("", "stop"), DONE)
    for response in (
        place.ask(prompt="x", batch_size=4),
        place.ask("/chat/stream?batch_size=4", prompt="x"),
        place.get(prompt="x", batch_size=4),
    ):
        found = events(response.finish().data)
        assert [name for name, _ in found][-2:] == ["final", "done"]
        assert said(found) == "12345678🐘"
        assert all(len(json.loads(data)["content"]) >= 4 for name, data in found if name == "batch")


def test_text_is_gathered_for_a_time_while_the_upstream_is_silent(place: Place) -> None:
    place.by_hand()
    connection = place.post(prompt="Hello", batch_ms=150, batch_size=1000)
    ex = place.next()
    ex.head(headers=STREAM)
    response = connection.read_head()
    began = time.monotonic()
    ex.send(chunk("one ") + chunk("two"))
    assert response.read_event() == b'event: batch\ndata: {"content": "one two"}\n\n'
    assert time.monotonic() - began >= 0.14
    end(ex, chunk("three", "stop"))
    assert events(response.finish().data)[1:] == [
        ("final", '{"content": "three"}'),
        ("done", '{"finish_reason": "stop", "model": null, "usage": null}'),
    ]


def test_what_was_gathered_is_sent_before_an_error(place: Place) -> None:
    place.answers(chunk("one "), chunk("two"), then="abort")
    found = events(place.ask(prompt="Hello", batch_ms=60_000).finish().data)
    assert [name for name, _ in found] == ["batch", "error"]
    assert said(found) == "one two"


def test_a_pace_is_kept_and_nothing_is_lost(place: Place) -> None:
    place.answers(b"".join(map(chunk, "abcde")), chunk("", "stop"), DONE)
    began = time.monotonic()
    found = events(place.ask(prompt="Hello", max_events_per_second=20).finish().data)
    assert time.monotonic() - began >= 4 / 20
    assert [data for name, data in found if name == "message"] == list("abcde")
    assert found[-1][0] == "done"


def test_a_slow_pace_is_no_silence_of_the_upstreams(impatient: Place) -> None:
    """RELAY_IDLE_TIMEOUT does not run while nobody reads."""
    place = impatient
    place.by_hand()
    connection = place.post(prompt="Hello", max_events_per_second=1 / (IDLE + 0.2))
    ex = place.next()
    begin(ex, chunk("a") + chunk("b"))
    response = connection.read_head()
    assert response.read_event() == b"event: message\ndata: a\n\n"
    assert response.read_event() == b"event: message\ndata: b\n\n"  # later than IDLE
    ex.send(chunk("c", "stop") + DONE)
    ex.end()
    body = response.finish()
    assert body.ended == "clean"
    assert [name for name, _ in events(body.data)][-1] == "done"


def flood(ex: Exchange, seconds: float = 20.0) -> None:
    """Text without end, until nobody takes it."""
    ex.head(headers=STREAM)
    until = time.monotonic() + seconds
    piece = chunk("x" * 1000) * 8
    while time.monotonic() < until:
        ex.send(piece)
    ex.abort()


def stands_still(ex: Exchange) -> int:
    """Wait until the upstream cannot write any more; gives how much it has written."""
    seen = [-1, time.monotonic()]

    def still() -> bool:
        if ex.written != seen[0]:
            seen[:] = [ex.written, time.monotonic()]
        return time.monotonic() - seen[1] > 0.7

    eventually(still, "an upstream that is paused", 20)
    return ex.written


@pytest.mark.parametrize("how", [{}, {"max_events_per_second": 0.1}, {"batch_size": 100}])
def test_a_client_that_stops_reading_or_a_pace_pauses_the_upstream(place: Place, how: dict[str, Any]) -> None:
    place.upstream.serve(flood, CHAT)
    before = len(place.upstream.seen(CHAT))
    connection = place.post(prompt="Hello", **how)
    ex = place.upstream.wait_for(before + 1, CHAT)
    assert stands_still(ex) < 32 * 1024 * 1024
    assert not ex.gone
    connection.close()
    # While the server writes, or while it waits for its turn.
    eventually(lambda: ex.gone, "the end of the request upstream")


def test_a_client_that_leaves_ends_the_request_upstream(place: Place) -> None:
    for how in ({}, {"batch_ms": 60_000}, {"max_events_per_second": 0.1}):
        place.by_hand()
        for answered in (False, True):
            connection = place.post(prompt="Hello", **how)
            ex = place.next()
            if answered:
                ex.head(headers=STREAM)
                ex.send(chunk("a") + chunk("b"))
                connection.read_head()
            connection.close()
            ex.wait_gone()  # long before the idle timeout


# --- Heartbeats and the hold


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_whoever_reads_text_hears_of_an_upstream_that_sends_none(upstream: Upstream) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_HEARTBEAT": "200ms", "RELAY_HOLD": "100ms"}
    with servers.gunicorn(env) as relay:
        place = Place(upstream, relay.port, "", relay)
        place.by_hand()
        connection = place.post(prompt="Hello")
        ex = place.next()
        response = connection.read_head()  # the upstream has not answered
        assert response.status == 200
        assert response.read_event() == b": keep-alive\n\n"
        ex.head(headers=STREAM)
        waiting = True
        while waiting:  # comments and thoughts are no text
            ex.send(b": thinking\n\n")
            ex.send(llm.event(llm.as_json({"choices": [{"delta": {"reasoning_content": "hm"}}]})))
            time.sleep(0.02)
            waiting = response.read_some().count(b"keep-alive") == 0
        ex.send(chunk("x", "stop"))
        ex.end()
        body = response.finish().data
        assert [name for name, _ in events(body)] == ["message", "done"]
        # An upstream's error after the hold still tells all.
        connection = place.post(prompt="Hello")
        ex = place.next()
        response = connection.read_head()
        ex.reply(llm.openai_error("slow down", "t", "c"), 429, headers=llm.JSON)
        body = response.finish()
        assert body.ended == "clean"
        assert error_of(body.data)["status"] == 429
        # One that comes slowly is waited for, and not in a busy loop.
        connection = place.post(prompt="Hello")
        ex = place.next()
        ex.head(429, "Too Many Requests", llm.JSON)
        ex.send(b'{"error": ')
        (worker,) = relay.workers()
        response, before = connection.read_head(), cpu(worker)
        for _ in range(5):
            assert response.read_event() == b": keep-alive\n\n"
        assert cpu(worker) - before < 0.5  # of a second or more
        ex.send(b'{"message": "slow"}}')
        ex.end()
        assert error_of(response.finish().data)["message"] == "slow"
        # After an id a comment has no blank line (httpx-sse and openai-python dispatch an event at each).
        response = place.get({"X-Request-ID": "counted"}, prompt="Hello")
        ex = place.next()
        assert response.read_until(b": keep-alive\n: keep-alive\n")
        ex.reply(b"{}", 500, headers=llm.JSON)
        beats = response.finish().data.count(b": keep-alive\n")
        eventually(lambda: "counted" in relay.log(), "the log line")
        line = next(line for line in relay.log().splitlines() if "counted" in line)
        assert json.loads(line)["heartbeats"] == beats >= 2


# --- Who may, and how much


@pytest.fixture(scope="module")
def guarded(upstream: Upstream) -> Iterator[Place]:
    env = {
        "RELAY_UPSTREAM_URL": upstream.base_url,
        "RELAY_UPSTREAM_KEY": "the-upstream-key",
        "RELAY_CLIENT_KEYS": "key-a,key-b,key-c,key-d",
        "RELAY_MODELS": "gpt-4.1,small",
        "RELAY_MAX_BODY": "1KiB",
        "RELAY_RATE_LIMIT": "30/hour",
        "RELAY_MAX_STREAMS_PER_CLIENT": "1",
    }
    with servers.gunicorn(env) as relay:
        yield Place(upstream, relay.port, "", relay)


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.mark.parametrize("path", ["/api/stream-chat", "/chat/stream", "/stream/aware"])
def test_keys_models_and_sizes_hold(guarded: Place, path: str) -> None:
    guarded.answers(*llm.chat_events())
    for headers, said_, status, code in (
        ({}, {"prompt": "x"}, 401, "invalid_api_key"),
        (key("key-x"), {"prompt": "x"}, 401, "invalid_api_key"),
        (key("key-a"), {"prompt": "x", "model": "large"}, 403, "model_not_allowed"),
        (key("key-a"), {"prompt": "x" * 1100}, 413, "body_too_large"),
        ({**key("key-a"), "Origin": "https://evil.example"}, {"prompt": "x"}, 403, "origin_not_allowed"),
        ({**key("key-a"), "Sec-Fetch-Site": "cross-site"}, {"prompt": "x"}, 403, "origin_not_allowed"),
    ):
        response = guarded.ask(path, headers, **said_)
        assert response.status == status
        assert json.loads(response.finish().data)["error"]["code"] == code
    response = guarded.ask(path, key("key-a"), prompt="x", model="small")
    assert response.status == 200
    assert response.header("RateLimit-Limit") == b"30"
    response.finish()
    ex = guarded.upstream.seen(CHAT)[-1]
    assert ex.all("Authorization") == [b"Bearer the-upstream-key"]


def test_a_ticket_opens_an_event_source(guarded: Place) -> None:
    guarded.answers(*llm.chat_events())
    ticket = json.loads(request(guarded.port, "POST", "/ticket", key("key-b")).finish().data)["ticket"]
    response = guarded.get(prompt="Hello", ticket=ticket)
    assert response.status == 200
    assert said(events(response.finish().data)) == llm.TEXT
    assert b"ticket" not in guarded.upstream.seen(CHAT)[-1].target
    assert guarded.get(prompt="Hello", ticket="x" + ticket).status == 401


def test_streams_of_a_client_are_counted(guarded: Place) -> None:
    guarded.by_hand()
    first = guarded.post(headers=key("key-c"), prompt="x")
    ex = guarded.next()
    ex.head(headers=STREAM)
    first.read_head()
    for path in ("/chat/stream", "/stream/aware"):
        response = guarded.ask(path, key("key-c"), prompt="x")
        assert (response.status, response.header("Content-Type")) == (429, b"application/json")
        assert response.header("Retry-After")
        assert json.loads(response.finish().data)["error"]["code"] == "too_many_streams"
    ex.end()


def test_requests_of_a_client_are_counted(guarded: Place) -> None:
    turns.within_one(turns.HOUR)
    guarded.answers(*llm.chat_events())
    statuses = []
    while 429 not in statuses and len(statuses) < 40:
        response = guarded.ask(headers=key("key-d"), prompt="x")
        statuses.append(response.status)
        response.finish()
    assert statuses == [200] * 30 + [429]


def test_what_may_not_be_called_is_not_called_for_a_prompt(upstream: Upstream) -> None:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_ALLOW": "GET models"}) as relay:
        response = request(relay.port, "POST", "/chat/stream", JSON, b'{"prompt": "x"}')
        assert response.status == 403
        assert json.loads(response.finish().data)["error"]["code"] == "path_not_allowed"


def test_no_prompt_is_in_the_log(service: Place) -> None:
    service.answers(*llm.chat_events())
    service.get({"X-Request-ID": "the-one"}, prompt="a secret wish").finish()
    service.ask(prompt="a secret wish").finish()
    eventually(lambda: "the-one" in service.relay.log(), "the log line")
    assert "secret" not in service.relay.log()
    line = next(line for line in service.relay.log().splitlines() if "the-one" in line)
    assert json.loads(line)["route"] == "relay.chat_stream"


# --- Mounted


_HOOKS = """
from flask import Flask, abort, g, request
from relay import Relay

app = Flask("shop")
settings = {"RELAY_UPSTREAM_URL": %r}
ended = []
relay = Relay(
    app, url_prefix="/ai", settings=settings, on_end=ended.append,
    request_headers=lambda: {"Authorization": "Bearer of-the-tenant", "accept": "text/event-stream;v=2"},
)
bare = Relay(app, name="bare", url_prefix="/bare", settings=settings, parts=())

@relay.before_request
def login():
    if "X-User" not in request.headers:
        abort(401)

@app.after_request
def cookie(response):
    response.set_cookie("seen", "1")
    return response

@app.get("/ended")
def of_the_last():
    if not ended:
        return {}
    record = ended[-1]
    return {"model": record.model, "reason": record.reason, "usage": record.usage and record.usage.output_tokens}
"""


def test_a_shops_hooks_hold_and_parts_can_be_left_off(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text(_HOOKS % upstream.base_url)
    with servers.gunicorn(
        {"PYTHONPATH": str(tmp_path)}, "hooks:app", None, ["-k", "gthread", "--threads", "8"], ready=None
    ) as relay:
        place = Place(upstream, relay.port, "/ai/_relay", relay)
        place.answers(*llm.message_events())
        assert place.ask(prompt="x").status == 401
        response = place.ask(headers={"X-User": "1"}, prompt="x", model="m")
        assert said(events(response.finish().data)) == llm.TEXT
        assert response.header("Set-Cookie")
        ex = upstream.seen(CHAT)[-1]
        assert ex.all("Authorization") == [b"Bearer of-the-tenant"]
        assert ex.all("Accept") == [b"text/event-stream;v=2"]
        # The hook is called when the last byte is out, and delays nobody.
        told = {"model": "m", "reason": "done", "usage": len(llm.WORDS)}

        def ended() -> bool:
            response = request(relay.port, "GET", "/ended")
            return response.finish().data.startswith(b"{") and json.loads(bytes(response.body)) == told

        eventually(ended, "the record")
        # Without the part there is no such route, and what is below _relay/ is nobody else's.
        assert request(relay.port, "POST", "/bare/_relay/chat/stream", JSON, b"{}").status == 404


def test_unknown_parts_are_refused() -> None:
    from relay import Relay

    with pytest.raises(ValueError, match="no parts called prompt; known are prompts, scripts, page"):
        Relay(parts=["prompt"])
    with pytest.raises(ValueError, match="collection of names"):
        Relay(parts="prompts")


def test_scripts_are_served_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flask import Flask

    from relay import Relay
    from relay.web.views import files

    shutil.copytree(files.FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    (tmp_path / "relay-client.js").write_text("export {};\n")
    app = Flask("shop")
    Relay(app, url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": "http://127.0.0.1:9"})
    (tmp_path / "relay-client.js").unlink()
    client = app.test_client()
    response = client.get("/ai/_relay/relay-client.js")
    assert (response.status_code, response.text) == (200, "export {};\n")
    assert response.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-cache"
    again = client.get("/ai/_relay/relay-client.js", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert client.get("/ai/_relay/relay-client.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.head("/ai/_relay/relay-client.js").status_code == 200
    assert client.post("/ai/_relay/relay-client.js").status_code == 405


def test_no_stream_is_left(service: Place) -> None:
    """After all of the above: every slot has been given back."""

    def left() -> int:
        health = json.loads(request(service.port, "GET", "/health").finish().data)
        return int(health["streams"]["open"])

    def metrics() -> str:
        return request(service.relay.admin_port, "GET", "/metrics").finish().data.decode()

    eventually(lambda: left() == 0, "the end of all streams")
    eventually(lambda: 'relay_open_streams{mount="relay"} 0.0' in metrics(), "the metric's word of it")


def test_views_are_freed_without_the_garbage_collector(upstream: Upstream) -> None:
    """With thousands of streams open a collection takes 100 ms, in which all of them stand still."""
    from flask import Flask
    from werkzeug.serving import make_server

    from relay import Relay
    from relay.stream.relayed import Stream
    from relay.textview import TextView

    app = Flask("shop")
    Relay(app, url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": upstream.base_url})
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    place = Place(upstream, server.port, "/ai/_relay", None)  # type: ignore[arg-type]

    def left() -> int:
        return sum(isinstance(each, (Stream, TextView)) for each in gc.get_objects())

    def answers() -> Iterator[None]:
        yield place.answers(*llm.chat_events())
        yield place.answers(chunk("one"), then="abort")
        yield place.answers(chunk("one"), b"data: {\n\n")
        yield place.answers(llm.event(llm.openai_error("m", "t", "c")))
        yield place.answers(llm.openai_error("m", "t", "c"), headers=llm.JSON, status=429)
        yield upstream.serve(lambda ex: ex.abort(), CHAT) and None

    gc.collect()
    before = left()
    gc.disable()
    try:
        for _ in answers():
            for path in ("/chat/stream", "/stream/aware"):
                place.ask(path, prompt="Hello", batch_ms=20).finish()
        place.by_hand()
        connection = place.post("/stream/aware", prompt="Hello")
        connection.read_head()
        ex = place.next()
        connection.close()
        ex.wait_gone()
        eventually(lambda: left() == before, "all streams and views freed")
    finally:
        gc.enable()
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_a_finish_reason_and_an_open_connection_are_a_whole_answer(place: Place) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(200, "OK", STREAM)
        ex.send(chunk("whole", "stop"))
        ex.wait_gone()

    place.upstream.serve(handler, CHAT)
    body = place.ask(prompt="Well?", model="m").finish()
    assert (body.ended, body.data.count(b"event: done\n")) == ("clean", 1)
    assert b"data: whole\n" in body.data
    assert b"event: error" not in body.data
