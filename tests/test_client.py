"""`relay.client`: text the moment it arrives and exactly as it was, an end that is never silent, and nothing left open.

It is asked to read straight from the upstream, which can do anything to it, and through a real relay.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from harness import DEADLINE, cases, llm, servers
from harness.calm import undisturbed
from harness.upstream import Upstream, deaf
from test_floors import OPTIONAL, modules_after
from test_upstream_connections import Proxy

from relay.client import (
    Cut,
    ErrorFrame,
    Event,
    NotAnEventStream,
    Refused,
    Stalled,
    StreamError,
    Unreachable,
    stream_chat,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.authority import Authority
    from harness.upstream import Exchange, Framing, Handler

CHAT = "/chat/completions"
KEY = "sk-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _no_proxies_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)


@dataclass(frozen=True)
class Place:
    """Where to ask, and the upstream that answers."""

    upstream: Upstream
    base_url: str

    def ask(self, prompt: str = "Well?", **options: Any) -> Any:
        return stream_chat(self.base_url, prompt, **{"model": llm.MODEL, "timeout": DEADLINE, **options})


@pytest.fixture(scope="module")
def _upstream() -> Iterator[Upstream]:
    with Upstream(base_path="/v1") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def relay_url(_upstream: Upstream) -> Iterator[str]:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": _upstream.base_url}) as relay:
        yield f"http://127.0.0.1:{relay.port}/v1"


@pytest.fixture
def direct(_upstream: Upstream) -> Iterator[Place]:
    yield Place(_upstream, _upstream.base_url)
    for path in (CHAT, "/responses", "/messages", "/completions", "/chat/stream"):
        _upstream.forget(path)
    _upstream.check()


@pytest.fixture(params=["direct", "relay"])
def place(request: pytest.FixtureRequest, direct: Place) -> Place:
    """The upstream itself, and a relay in front of it."""
    if request.param == "direct":
        return direct
    return Place(direct.upstream, request.getfixturevalue("relay_url"))


def says(*events: bytes, framing: Framing = "chunked") -> Handler:
    """An upstream that sends these pieces and comes to a proper end."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS, framing=framing, length=len(b"".join(events)))
        for event in events:
            ex.send(event)
        ex.end()

    return handler


def cut_after(*events: bytes) -> Handler:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in events:
            ex.send(event)
        ex.abort()

    return handler


def chunk(text: str | None, finish: str | None = None) -> bytes:
    """A chat completion's chunk; what is not ASCII as JSON's escapes."""
    delta = {} if text is None else {"content": text}
    return (
        b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"
    )


DONE = b"data: [DONE]\n\n"


# --- Text


APIS = {
    CHAT: llm.chat_events,
    "/responses": llm.response_events,
    "/messages": llm.message_events,
}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("path", APIS)
def test_the_text_is_that_of_the_answer_however_it_is_cut_up(direct: Place, path: str, end: str) -> None:
    body = b"".join(APIS[path](end=end))
    for pieces in (cases.whole(body), cases.by_bytes(body), cases.at_random(body, 7)):
        direct.upstream.serve(says(*pieces), path)
        assert "".join(direct.ask(path=path)) == llm.TEXT


@pytest.mark.parametrize("path", APIS)
def test_through_the_relay_too_each_word_is_one_piece(place: Place, path: str) -> None:
    place.upstream.serve(says(*APIS[path]()), path)
    assert list(place.ask(path=path)) == list(llm.WORDS)


def test_legacy_completions(place: Place) -> None:
    events = [b"data: " + llm.as_json({"choices": [{"index": 0, "text": word}]}) + b"\n\n" for word in llm.WORDS]
    place.upstream.serve(says(*events, DONE), "/completions")
    assert "".join(place.ask(path="completions")) == llm.TEXT
    (ex,) = place.upstream.seen("/completions")
    assert json.loads(ex.body) == {"prompt": "Well?", "stream": True, "model": llm.MODEL}


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_every_framing_of_a_body(direct: Place, framing: Framing) -> None:
    direct.upstream.serve(says(*llm.chat_events(), framing=framing), CHAT)
    assert "".join(direct.ask()) == llm.TEXT


def test_a_character_of_two_halves_in_two_events_is_one_character(direct: Place) -> None:
    direct.upstream.serve(says(chunk("a\ud83d"), chunk("\udc18z"), DONE), CHAT)
    pieces = list(direct.ask())
    assert "".join(pieces) == "a🐘z"
    assert [piece.encode() for piece in pieces]  # each can be written somewhere


def test_a_half_that_stays_alone_can_still_be_written(direct: Place) -> None:
    direct.upstream.serve(says(chunk("a\ud83d"), chunk("z\ud83d"), DONE), CHAT)
    assert "".join(direct.ask()) == "a\ufffdz\ufffd"


def test_a_compressed_stream_is_read_as_well(direct: Place) -> None:
    """Nobody asked for it, but proxies do it."""
    body = b"".join(llm.chat_events())
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(body) + packer.flush()

    def handler(ex: Exchange) -> None:
        ex.head(headers=[*llm.EVENTS, ("Content-Encoding", "gzip")])
        for piece in cases.by_bytes(packed):
            ex.send(piece)
        ex.end()

    direct.upstream.serve(handler, CHAT)
    assert "".join(direct.ask()) == llm.TEXT


def view(name: str, data: str) -> bytes:
    """An event of the relay's text view."""
    return f"event: {name}\n".encode() + b"".join(b"data: %s\n" % line.encode() for line in data.split("\n")) + b"\n"


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([view("message", word) for word in llm.WORDS], id="messages"),
        pytest.param(
            [
                view("stream_id", "7"),
                view("batch", json.dumps({"content": "".join(llm.WORDS[:3])})),
                view("ping", '{"stream_id": "7"}'),
                view("final", json.dumps({"content": "".join(llm.WORDS[3:])})),
            ],
            id="batches",
        ),
    ],
)
def test_the_text_view(direct: Place, events: list[bytes]) -> None:
    """Ends with its `done` and with nothing else."""
    direct.upstream.serve(says(*events, view("done", '{"finish_reason": "stop"}')), "/chat/stream")
    assert "".join(direct.ask(path="chat/stream")) == llm.TEXT
    direct.upstream.serve(says(*events), "/chat/stream")
    got, error = fail(lambda: direct.ask(path="chat/stream"))
    assert (got, type(error)) == (llm.TEXT, Cut)
    direct.upstream.serve(
        says(*events, b"event: error\ndata: " + llm.openai_error("full", "t", "busy") + b"\n\n"), "/chat/stream"
    )
    got, error = fail(lambda: direct.ask(path="chat/stream"))
    assert (got, type(error), error.code) == (llm.TEXT, ErrorFrame, "busy")


# --- Recorded streams


def _plain_reading(body: bytes) -> tuple[list[dict[str, str]], str | None]:
    """The events of a recorded body, by a parser of ours that takes the whole at once, and the text in them."""
    events, text, found = [], "", False
    for block in re.split(r"\n\n", body.decode().replace("\r\n", "\n")):
        lines = [line.partition(":") for line in block.split("\n") if line and not line.startswith(":")]
        data = [value.removeprefix(" ") for name, _, value in lines if name == "data"]
        names = [value.removeprefix(" ") for name, _, value in lines if name == "event"]
        if not data:
            continue
        events.append({"event": names[-1] if names else "message", "data": "\n".join(data)})
        try:
            said = json.loads(events[-1]["data"])
        except ValueError:
            continue
        piece = None
        if isinstance(said, dict):
            if isinstance(said.get("choices"), list):
                found = True
                for choice in said["choices"]:
                    if choice.get("index", 0) == 0:
                        piece = (choice.get("delta") or {}).get("content")
            elif said.get("type") == "response.output_text.delta":
                found, piece = True, said["delta"]
            elif said.get("type") == "content_block_delta":
                found, piece = True, said["delta"].get("text")
        text += piece if isinstance(piece, str) else ""
    return events, text if found else None


RECORDED = [
    pytest.param(case, id=case.name)
    for case in cases.recorded()
    if case.is_event_stream and _plain_reading(case.body)[1] is not None
]
NO_SHARED = pytest.mark.skipif(not RECORDED, reason="there are no recorded streams in ../shared")


@NO_SHARED
@pytest.mark.parametrize("case", RECORDED or [None])
def test_recorded_chats_say_what_they_said(direct: Place, case: cases.Case) -> None:
    """In random pieces, and the same events on request; those with an error in them raise it."""
    events, text = _plain_reading(case.body)
    direct.upstream.serve(says(*cases.at_random(case.body, 3)), CHAT)
    stream, got = direct.ask(), ""
    failure = None
    try:
        for piece in stream:
            got += piece
    except StreamError as error:
        failure = error
    assert got == text
    assert isinstance(failure, ErrorFrame) == ("error" in case.name)
    assert failure is None or isinstance(failure, ErrorFrame)
    if failure is None:
        seen = [{"event": event.event, "data": event.data} for event in direct.ask(events=True)]
        assert seen == events


# --- Events


def test_events_on_request(place: Place) -> None:
    events = [b": a comment\n\n", llm.event(b"one", "first", number=7), b"data: two\ndata: lines\n\n", DONE]
    place.upstream.serve(says(*events), CHAT)
    assert list(place.ask(events=True)) == [
        Event("first", "one", "7"),
        Event("message", "two\nlines", "7"),
        Event("message", "[DONE]", "7"),
    ]


# --- At once


@pytest.mark.parametrize("events", [False, True], ids=["text", "events"])
def test_a_piece_is_there_before_the_next_is_sent(place: Place, events: bool) -> None:
    """In lock step: the upstream sends nothing until what it sent has come out."""
    path = place.upstream.by_hand(CHAT)
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(place.ask, events=events)
        ex = place.upstream.next(path)
        ex.head(headers=llm.EVENTS)
        ex.send(chunk("one "))
        stream = begun.result(DEADLINE)
        first = next(stream)
        ex.send(chunk("two"))
        second = next(stream)
        ex.send(DONE)
        ex.end()
        rest = list(stream)
    if events:
        first, second = (json.loads(each.data)["choices"][0]["delta"]["content"] for each in (first, second))
    assert (first, second, len(rest)) == ("one ", "two", int(events))


@undisturbed(0.4)
def test_heartbeats_are_no_text_and_no_silence(direct: Place) -> None:
    """Longer than the time-out, and never silent for so long."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            ex.send(b": keep-alive\n\n")
            time.sleep(0.05)
        for event in llm.chat_events():
            ex.send(event)
        ex.end()

    direct.upstream.serve(handler, CHAT)
    assert list(direct.ask(timeout=1)) == list(llm.WORDS)


# --- Leaving


def _break(stream: Any) -> None:
    for _ in stream:
        break
    del stream
    gc.collect()


def _close(stream: Any) -> None:
    stream.close()
    stream.close()
    with pytest.raises(Cut, match="closed here"):
        next(stream)


def _leave_the_with(stream: Any) -> None:
    with stream:
        assert next(stream) == "one"


def _forget(stream: Any) -> None:
    del stream
    gc.collect()


def _close_elsewhere(stream: Any) -> None:
    """While this thread waits for the next piece."""
    assert next(stream) == "one"
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(next, stream)
        waiting = threading.Event()
        waiting.wait(0.1)  # so that it is most likely in the read; it ends the same if it is not
        stream.close()
        with pytest.raises(Cut, match="closed here"):
            read.result(DEADLINE)


@pytest.mark.parametrize("leave", [_break, _close, _leave_the_with, _forget, _close_elsewhere])
def test_whoever_leaves_stops_the_upstream(place: Place, leave: Callable[[Any], None]) -> None:
    path = place.upstream.by_hand(CHAT)
    streams: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(place.ask)
        ex = place.upstream.next(path)
        ex.head(headers=llm.EVENTS)
        ex.send(chunk("one"))
        streams.append(begun.result(DEADLINE))
        del begun
    leave(streams.pop())
    ex.wait_gone()


def test_a_whole_answer_ends_even_if_its_connection_does_not(direct: Place) -> None:
    path = direct.upstream.by_hand(CHAT)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(lambda: list(direct.ask(timeout=None)))
        ex = direct.upstream.next(path)
        ex.head(headers=llm.EVENTS)
        ex.send(b"".join(llm.chat_events()))
        assert text.result(DEADLINE) == list(llm.WORDS)
        ex.wait_gone()


def test_a_whole_answer_is_read_to_its_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the relay logs it as done, and not as a client that left."""
    monkeypatch.setattr("relay.client.stream._LINGER", 30.0)  # the upstream here is a test's, and may dawdle
    path = place.upstream.by_hand(CHAT)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(lambda: list(place.ask()))
        ex = place.upstream.next(path)
        ex.head(headers=llm.EVENTS)
        ex.send(b"".join(llm.chat_events()))
        threading.Event().wait(0.2)
        assert not ex.gone
        ex.end()
        assert text.result(DEADLINE) == list(llm.WORDS)


# --- Ends that are none


def fail(stream: Callable[[], Any]) -> tuple[str, StreamError]:
    """The text that came, and the error that followed it."""
    pieces: list[str] = []
    with pytest.raises(StreamError) as caught:
        pieces.extend(opened := stream())
    if pieces:
        with pytest.raises(StreamError):  # and it stays so
            next(opened)
    assert KEY not in caught.value.message
    return "".join(pieces), caught.value


HALF = llm.chat_events()[:3]
WHOLE_BUT_FOR_THE_MARK = llm.chat_events()[:-1]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([], id="nothing"),
        pytest.param(HALF, id="half"),
        pytest.param([*HALF, b'data: {"choices": [{"delta": {"conte'], id="inside-an-event"),
        pytest.param(llm.message_events()[:-2], id="anthropic-without-message-stop"),
        pytest.param(llm.response_events()[:-1], id="responses-without-completed"),
    ],
)
@pytest.mark.parametrize("clean", [True, False], ids=["clean", "cut"])
def test_an_answer_without_its_end_is_a_cut(direct: Place, events: list[bytes], clean: bool) -> None:
    direct.upstream.serve(says(*events) if clean else cut_after(*events), CHAT)
    got, error = fail(direct.ask)
    assert isinstance(error, Cut)
    assert (error.code, error.status) == ("cut", 200)
    assert llm.TEXT.startswith(got)
    assert (got == "") == (events == [])


def test_a_finish_reason_and_a_clean_end_are_a_whole_answer(direct: Place) -> None:
    """As of those that send no [DONE]."""
    direct.upstream.serve(says(*WHOLE_BUT_FOR_THE_MARK), CHAT)
    assert "".join(direct.ask()) == llm.TEXT


def test_a_finish_reason_and_an_open_connection_are_a_whole_answer(direct: Place) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in WHOLE_BUT_FOR_THE_MARK:
            ex.send(event)
        ex.wait_gone()

    direct.upstream.serve(handler, CHAT)
    assert "".join(direct.ask()) == llm.TEXT


def test_a_finish_reason_and_a_cut_are_a_cut(direct: Place) -> None:
    direct.upstream.serve(cut_after(*WHOLE_BUT_FOR_THE_MARK), CHAT)
    got, error = fail(direct.ask)
    assert (got, type(error)) == (llm.TEXT, Cut)


def test_a_cut_behind_the_mark_of_the_end_is_none(direct: Place) -> None:
    direct.upstream.serve(cut_after(*llm.chat_events()), CHAT)
    assert "".join(direct.ask()) == llm.TEXT


def test_what_the_relay_says_when_the_upstream_breaks_off(place: Place) -> None:
    """Its error frame, with the request id that its log has."""
    place.upstream.serve(cut_after(*HALF), CHAT)
    got, error = fail(lambda: place.ask(headers={"X-Request-ID": "the-id-of-this"}))
    assert got == "".join(llm.WORDS[:2])
    if place.base_url == place.upstream.base_url:
        assert isinstance(error, Cut)
    else:
        assert isinstance(error, ErrorFrame)
        assert (error.code, error.status, error.request_id) == ("upstream_cut", 200, "the-id-of-this")


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        pytest.param(b"event: error\ndata: " + llm.openai_error("too much", "t", "busy") + b"\n\n", "busy", id="event"),
        pytest.param(b"data: " + llm.openai_error("too much", "t", "busy") + b"\n\n", "busy", id="openai"),
        pytest.param(
            b"event: error\ndata: " + llm.anthropic_error("too much", "overloaded_error") + b"\n\n",
            "overloaded_error",
            id="anthropic",
        ),
    ],
)
def test_an_error_in_the_stream_is_raised_after_what_had_come(place: Place, frame: bytes, code: str) -> None:
    place.upstream.serve(says(*HALF, frame), CHAT)
    for events in (False, True):
        stream = place.ask(events=events)
        pieces: list[Any] = []
        with pytest.raises(ErrorFrame, match="too much") as caught:
            pieces.extend(stream)
        assert caught.value.code == code
        assert len(pieces) == (len(HALF) if events else len(HALF) - 1)


@undisturbed(0.1)
def test_silence_is_a_stall(direct: Place) -> None:
    direct.upstream.forget(CHAT)
    path = direct.upstream.by_hand(CHAT)
    with ThreadPoolExecutor(1) as pool:
        failed = pool.submit(fail, lambda: direct.ask(timeout=0.3))
        ex = direct.upstream.next(path)
        ex.head(headers=llm.EVENTS)
        ex.send(b"".join(HALF))
        got, error = failed.result(DEADLINE)
        ex.wait_gone()
    assert isinstance(error, Stalled)
    assert (got, error.code, error.status) == ("".join(llm.WORDS[:2]), "stalled", 200)
    assert "0.3 s" in error.message


def test_silence_before_the_answer_is_a_stall(direct: Place) -> None:
    path = direct.upstream.by_hand(CHAT)
    with ThreadPoolExecutor(1) as pool:
        failed = pool.submit(fail, lambda: direct.ask(timeout=0.3))
        direct.upstream.next(path).wait_gone()
        _, error = failed.result(DEADLINE)
    assert isinstance(error, Stalled)
    assert error.status is None


@pytest.mark.parametrize(
    "event", [b'data: {"choices": [}\n\n', b"data: " + b"x" * 2000 + b"\n\n"], ids=["json", "size"]
)
def test_what_cannot_be_read_on_is_a_cut(direct: Place, event: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.client.stream._MOST_BYTES", 1000)
    direct.upstream.serve(says(*HALF, event, DONE), CHAT)
    got, error = fail(direct.ask)
    assert (got, type(error), error.code) == ("".join(llm.WORDS[:2]), Cut, "unreadable")


def test_events_are_handed_over_whatever_they_hold(direct: Place) -> None:
    direct.upstream.serve(says(b'data: {"choices": [}\n\n', DONE), CHAT)
    assert [event.data for event in direct.ask(events=True)] == ['{"choices": [}', "[DONE]"]


# --- Answers that are none


@pytest.mark.parametrize(
    ("status", "body", "message", "code"),
    [
        pytest.param(
            401, llm.openai_error("no such key", "t", "invalid_api_key"), "no such key", "invalid_api_key", id="openai"
        ),
        pytest.param(
            429, llm.anthropic_error("slowly", "rate_limit_error"), "slowly", "rate_limit_error", id="anthropic"
        ),
        pytest.param(500, b"<html>oh</html>", "500: Reason", "refused", id="html"),
        pytest.param(422, b'{"detail": "what?"}', "what?", "refused", id="detail"),
        pytest.param(400, b'{"error": "bad"}', "bad", "refused", id="text"),
        pytest.param(302, b"", "302: a redirect to ", "refused", id="redirect"),
    ],
)
def test_another_status_is_raised_with_what_was_said(
    place: Place, status: int, body: bytes, message: str, code: str
) -> None:
    headers = [("X-Request-ID", "up-1"), ("Retry-After", "7"), ("Location", "/elsewhere")]
    place.upstream.serve(lambda ex: ex.reply(body, status, "Reason", headers), CHAT)
    _, error = fail(lambda: place.ask(key=KEY))
    assert isinstance(error, Refused)
    assert (error.status, error.code, error.retry_after) == (status, code, 7.0)
    if status != 500 or place.base_url == place.upstream.base_url:  # the relay has no reason of its own for a 500
        assert message in error.message
    assert error.request_id
    assert len(place.upstream.seen(CHAT)) == 1


@pytest.mark.parametrize("media", ["application/json", "text/html; charset=utf-8", ""])
def test_another_media_type_is_no_event_stream(direct: Place, media: str) -> None:
    headers = [("Content-Type", media)] if media else []
    direct.upstream.serve(lambda ex: ex.reply(b'{"choices": []}', headers=headers), CHAT)
    _, error = fail(direct.ask)
    assert isinstance(error, NotAnEventStream)
    assert error.status == 200


def test_nobody_there() -> None:
    _, error = fail(lambda: stream_chat(f"http://127.0.0.1:{servers.free_port()}/v1", "?", key=KEY))
    assert isinstance(error, Unreachable)
    assert (error.code, error.status, error.request_id) == ("unreachable", None, None)
    assert "Connection refused" in error.message


def test_nobody_who_accepts() -> None:
    with deaf() as port:
        _, error = fail(lambda: stream_chat(f"http://127.0.0.1:{port}/v1", "?", timeout=0.3))
    assert isinstance(error, Unreachable)


def test_a_name_that_nobody_has() -> None:
    _, error = fail(lambda: stream_chat("http://relay.invalid/v1", "?"))
    assert isinstance(error, Unreachable)
    assert "relay.invalid" in error.message


@pytest.mark.parametrize("garbage", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["hangs-up", "no-http"])
def test_who_answers_no_http_has_cut(direct: Place, garbage: bytes) -> None:
    def handler(ex: Exchange) -> None:
        ex.raw(garbage)
        ex.abort()

    direct.upstream.serve(handler, CHAT)
    _, error = fail(direct.ask)
    assert isinstance(error, Cut)
    assert error.status is None
    assert len(direct.upstream.seen(CHAT)) == 1  # never sent again: it may have been paid for


# --- TLS, proxies


def test_tls_with_an_authority_of_ones_own(authority: Authority) -> None:
    context = authority.issue("client", "DNS:localhost")
    with Upstream(tls=context, host="localhost", base_path="/v1") as upstream:
        upstream.serve(says(*cases.by_bytes(b"".join(llm.chat_events()))), CHAT)
        stream = stream_chat(upstream.base_url, "?", ca=str(authority.certificate), timeout=DEADLINE)
        assert "".join(stream) == llm.TEXT

        upstream.forget(CHAT)
        path = upstream.by_hand(CHAT)
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(stream_chat, upstream.base_url, "?", ca=str(authority.certificate), timeout=DEADLINE)
            ex = upstream.next(path)
            ex.head(headers=llm.EVENTS)
            ex.send(chunk("one"))
            stream = begun.result(DEADLINE)
            assert next(stream) == "one"
            stream.close()
            ex.wait_gone()


def test_tls_through_the_environments_proxy(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tunnel, whose proxy sees no key; certificates from the environment as well."""
    monkeypatch.setattr("relay.client.connection._loopback", lambda url: False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
    context = authority.issue("proxied", "DNS:localhost")
    with Upstream(tls=context, host="localhost", base_path="/v1") as upstream, Proxy() as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        upstream.serve(says(*llm.chat_events()), CHAT)
        assert "".join(stream_chat(upstream.base_url, "?", key=KEY)) == llm.TEXT
        (head,) = proxy.heads
        assert head.startswith(b"CONNECT localhost:%d " % upstream.port)
        assert KEY.encode() not in head

        proxy.refuse = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        _, error = fail(lambda: stream_chat(upstream.base_url, "?", key=KEY))
        assert isinstance(error, Unreachable)
        assert "proxy" in error.message


def test_tls_that_nobody_vouches_for_is_refused(authority: Authority) -> None:
    context = authority.issue("other", "DNS:elsewhere.example")
    with Upstream(tls=context, host="localhost", base_path="/v1") as upstream:
        for ca in (None, str(authority.certificate)):  # another authority, another name
            _, error = fail(lambda ca=ca: stream_chat(upstream.base_url, "?", ca=ca, key=KEY))
            assert isinstance(error, Unreachable)
            assert error.code == "certificate"
        assert upstream.seen() == []


def test_the_environments_proxy_is_used_but_not_for_this_machine(
    direct: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Upstream(says(*llm.chat_events())) as proxy:
        monkeypatch.setenv("http_proxy", proxy.base_url)
        assert "".join(stream_chat("http://relay.example/v1", "?")) == llm.TEXT
        (ex,) = proxy.seen()
        assert ex.target == b"http://relay.example/v1/chat/completions"

        direct.upstream.serve(says(*llm.chat_events()), CHAT)
        assert "".join(direct.ask()) == llm.TEXT
        assert len(proxy.seen()) == 1


# --- What is asked


def body_of(place: Place, path: str = CHAT) -> Any:
    return json.loads(place.upstream.seen(path)[-1].body)


def test_what_goes_out(direct: Place, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key where it was meant to go, whatever .netrc says."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    direct.upstream.serve(says(*llm.chat_events()), CHAT)
    history = [{"role": "system", "content": "Be short."}]
    list(direct.ask("Grüße?", messages=history, key=KEY, headers={"X-Shop": "1"}, extra={"temperature": 0}))
    (ex,) = direct.upstream.seen(CHAT)
    assert json.loads(ex.body) == {
        "messages": [*history, {"role": "user", "content": "Grüße?"}],
        "stream": True,
        "model": llm.MODEL,
        "temperature": 0,
    }
    assert ex.all("Authorization") == [b"Bearer " + KEY.encode()]
    assert ex.all("X-Shop") == [b"1"]
    assert ex.all("Accept") == [b"text/event-stream"]
    assert ex.all("Accept-Encoding") == [b"identity"]


def test_a_header_of_ones_own_takes_the_place_of_ours(direct: Place) -> None:
    direct.upstream.serve(says(*llm.message_events()), "/messages")
    list(direct.ask(path="messages", headers={"Anthropic-Version": "2024-01-01"}, extra={"max_tokens": 3}))
    (ex,) = direct.upstream.seen("/messages")
    assert ex.all("anthropic-version") == [b"2024-01-01"]
    assert body_of(direct, "/messages")["max_tokens"] == 3


def test_no_model_is_named_if_none_is_given(direct: Place) -> None:
    direct.upstream.serve(says(*llm.chat_events()), CHAT)
    list(direct.ask(model=None))
    assert "model" not in body_of(direct)


def test_the_whole_address_of_the_endpoint_will_do_and_a_query_stays(direct: Place) -> None:
    direct.upstream.serve(says(*llm.chat_events()), CHAT)
    for url in (f"{direct.base_url}/", f"{direct.base_url}{CHAT}", f"{direct.base_url}?api-version=1"):
        assert "".join(stream_chat(url, "?")) == llm.TEXT
    assert direct.upstream.seen(CHAT)[-1].target == b"/v1/chat/completions?api-version=1"


def test_an_address_alone_is_asked_for_the_services_own_endpoint() -> None:
    with Upstream() as upstream:
        upstream.serve(says(*llm.chat_events()), "/api/stream-chat")
        for url in (upstream.base_url, f"{upstream.base_url}/"):
            assert "".join(stream_chat(url, "Well?")) == llm.TEXT
            assert json.loads(upstream.seen("/api/stream-chat")[-1].body) == {"prompt": "Well?"}
        history = [{"role": "assistant", "content": "Yes?"}]
        list(stream_chat(upstream.base_url, "Well?", messages=history, model="m"))
        assert json.loads(upstream.seen("/api/stream-chat")[-1].body) == {
            "messages": [*history, {"role": "user", "content": "Well?"}],
            "model": "m",
        }


@pytest.mark.parametrize("path", [None, "chat/stream", "stream/aware"])
def test_the_endpoints_of_a_real_relay(direct: Place, relay_url: str, path: str | None) -> None:
    """The relay chooses the model, and half an answer is none there either."""
    origin = relay_url.removesuffix("/v1")
    direct.upstream.serve(says(*llm.chat_events()), CHAT)
    assert "".join(stream_chat(origin, "Well?", path=path)) == llm.TEXT
    history = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes?"}]
    assert "".join(stream_chat(origin, "And?", messages=history, model="m", path=path)) == llm.TEXT
    first, second = (json.loads(ex.body) for ex in direct.upstream.seen(CHAT))
    assert first["messages"] == [{"role": "user", "content": "Well?"}]
    assert first["model"]
    assert (second["messages"], second["model"]) == ([*history, {"role": "user", "content": "And?"}], "m")

    direct.upstream.serve(cut_after(*HALF), CHAT)
    got, error = fail(lambda: stream_chat(origin, "Well?", path=path))
    assert (got, type(error), error.code) == ("".join(llm.WORDS[:2]), ErrorFrame, "upstream_cut")


@pytest.mark.parametrize(
    ("base_url", "options", "says"),
    [
        pytest.param("127.0.0.1:8000/v1", {}, "http://", id="no-scheme"),
        pytest.param("http:///v1", {}, "no host", id="no-host"),
        pytest.param("http://h:port/v1", {}, "is none", id="port"),
        pytest.param(f"http://me:{KEY}@h/v1", {}, "user name or password", id="credentials"),
        pytest.param("http://h/v1#x", {}, "fragment", id="fragment"),
        pytest.param("http://h/v1", {"prompt": ""}, "neither a prompt", id="no-prompt"),
        pytest.param("http://h/v1", {"path": "a b"}, "path must be", id="path"),
        pytest.param("http://h/v1", {"path": "completions", "messages": [{}]}, "no messages", id="messages"),
        pytest.param("http://h/v1", {"key": f"{KEY}\nx"}, "'Authorization'", id="key"),
        pytest.param("http://h/v1", {"headers": {"x-a": f"{KEY}\r\nx: y"}}, "'x-a'", id="header"),
        pytest.param("http://h/v1", {"headers": {"Host": "x"}}, "'Host'", id="framing"),
        pytest.param("http://h/v1", {"ca": "/no/such/file"}, "does not exist", id="ca"),
        pytest.param("http://h/v1", {"timeout": 0}, "timeout", id="timeout"),
    ],
)
def test_what_cannot_be_asked_is_a_value_error_that_tells_no_secret(base_url: str, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        stream_chat(base_url, options.pop("prompt", "?"), **options)
    assert KEY not in str(caught.value)


def test_nothing_is_left_open() -> None:
    """Not after a whole answer, and not after one that failed."""
    with Upstream(base_path="/v1") as upstream:
        for handler in (says(*llm.chat_events()), cut_after(*HALF), lambda ex: ex.reply(b"", 500)):
            upstream.serve(handler, CHAT)
            with contextlib.suppress(StreamError):
                list(stream_chat(upstream.base_url, "?"))
            upstream.wait_open(0)
        assert upstream.accepted == 3


def test_it_needs_nothing_of_the_service() -> None:
    assert not modules_after("import relay.client", OPTIONAL) & {"flask", "werkzeug", "click"}
