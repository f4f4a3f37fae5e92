"""What is taken out of a WSGI request: the raw target, the whole body, whether it wants events."""

from __future__ import annotations

import io
import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import pytest
from flask import Flask, Request
from hypothesis import example, given
from hypothesis import strategies as st

from relay import Relay, errors
from relay.gate.bodies import memory
from relay.llm.asked import Asked, scan
from relay.web.intake import Intake
from relay.web.request import Wish, expected_body, raw_target, wish_for_events, without_body

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# --- the raw target -----------------------------------------------------------------------------------------------


def routed(mount: str) -> Flask:
    """An app with a relay at `mount`, whose routing decides what is below it."""
    app = Flask("test")
    Relay(app, url_prefix=mount or "/", settings={"RELAY_UPSTREAM_URL": "http://upstream.example"})
    return app


APPS = {mount: routed(mount) for mount in ("", "/v1", "/gr\u00f6\u00dfe")}


def environ_of(target: str, *, script: str = "", raw: str | None = "RAW_URI") -> dict[str, Any]:
    """A WSGI environ as gunicorn makes it of a request line's target (latin-1)."""
    path, mark, query = target.partition("?")
    decoded = unquote_to_bytes(path.encode("latin-1")).decode("latin-1")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "SERVER_NAME": "relay",
        "SERVER_PORT": "80",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "SCRIPT_NAME": script,
        "PATH_INFO": decoded.removeprefix(script),
        "QUERY_STRING": query if mark else "",
    }
    if raw:
        environ[raw] = target
    return environ


def target_of(app: Flask, environ: dict[str, Any]) -> tuple[str, str | None]:
    with app.request_context(environ) as context:
        assert context.request.view_args is not None, context.request.routing_exception
        return raw_target(environ, context.request.view_args["rest"])


TARGETS = [
    pytest.param("/v1", ("", None), id="the-mount"),
    pytest.param("/v1?a=b", ("", "a=b"), id="the-mount-with-a-query"),
    pytest.param("/v1/", ("", None), id="the-mount-and-a-slash"),
    pytest.param("/v1/chat/completions", ("chat/completions", None), id="path"),
    pytest.param("/v1/chat/completions?", ("chat/completions", ""), id="empty-query"),
    pytest.param("/v1/models?a=%20&a=+&%62=c?d", ("models", "a=%20&a=+&%62=c?d"), id="raw-query"),
    pytest.param("/v1/models/", ("models/", None), id="slash-at-the-end"),
    pytest.param("/v1//models", ("/models", None), id="slash-at-the-start"),
    pytest.param("/v1/a//b", ("a//b", None), id="two-slashes"),
    pytest.param("/v1/a%2Fb", ("a%2Fb", None), id="encoded-slash"),
    pytest.param("/v1/a%2fb%2F", ("a%2fb%2F", None), id="encoded-slashes-both-cases"),
    pytest.param("/v1/%2F", ("%2F", None), id="only-an-encoded-slash"),
    pytest.param("/v1/%61%62c", ("%61%62c", None), id="needlessly-encoded"),
    pytest.param("/v1/a%25b", ("a%25b", None), id="encoded-percent"),
    pytest.param("/v1/a%2525b", ("a%2525b", None), id="encoded-twice"),
    pytest.param("/v1/a%b%", ("a%b%", None), id="percent-of-nothing"),
    pytest.param("/v1/gr%C3%B6%C3%9Fe", ("gr%C3%B6%C3%9Fe", None), id="utf-8"),
    pytest.param("/v1/gr\xc3\xb6\xc3\x9fe", ("gr\xc3\xb6\xc3\x9fe", None), id="raw-utf-8"),
    pytest.param("/v1/a%FF", ("a%FF", None), id="not-utf-8"),
    pytest.param("/v1/%FF%FE%E2%82/%FF", ("%FF%FE%E2%82/%FF", None), id="much-not-utf-8"),
    pytest.param("/v1/%FF%FF%FF%FF%FF%FF%FF%FF", ("%FF" * 8, None), id="not-utf-8-longer-than-the-mount"),
    pytest.param("/%76%31/models", ("models", None), id="encoded-mount"),
    pytest.param("/v1%2Fmodels", ("models", None), id="encoded-slash-after-the-mount"),
    pytest.param("/v1/v1/v1", ("v1/v1", None), id="the-mount-again"),
    pytest.param("/v1/a%3Fb?c", ("a%3Fb", "c"), id="encoded-question-mark"),
    pytest.param("/v1/a%23b", ("a%23b", None), id="encoded-hash"),
    pytest.param("/v1/..%2f..%2fx", ("..%2f..%2fx", None), id="dots-are-not-resolved"),
    pytest.param("/v1/a;b=c,d@e:f", ("a;b=c,d@e:f", None), id="signs"),
]


@pytest.mark.parametrize(("target", "expected"), TARGETS)
@pytest.mark.parametrize("raw", ["RAW_URI", "REQUEST_URI"])
def test_the_raw_target_below_the_mount(target: str, expected: tuple[str, str | None], raw: str) -> None:
    assert target_of(APPS["/v1"], environ_of(target, raw=raw)) == expected


@pytest.mark.parametrize(("target", "expected"), TARGETS)
@pytest.mark.parametrize("host", ["http://relay.example", "HTTPS://u@relay.example:8000"])
def test_the_absolute_form(target: str, expected: tuple[str, str | None], host: str) -> None:
    assert target_of(APPS["/v1"], {**environ_of(target), "RAW_URI": host + target}) == expected


@pytest.mark.parametrize(
    ("mount", "target", "script", "expected"),
    [
        pytest.param("", "/chat/completions", "", "chat/completions", id="root"),
        pytest.param("", "/", "", "", id="root-itself"),
        pytest.param("", "/a%2Fb/c", "", "a%2Fb/c", id="root-encoded-slash"),
        pytest.param("/v1", "/shop/v1/a%2Fb", "/shop", "a%2Fb", id="an-app-below-a-path"),
        pytest.param("/v1", "/v1/v1/a", "/v1", "a", id="an-app-below-the-same-path"),
        pytest.param("/gr\u00f6\u00dfe", "/gr%C3%B6%C3%9Fe/x%C3%B6", "", "x%C3%B6", id="a-mount-of-umlauts"),
    ],
)
def test_wherever_the_relay_is_mounted(mount: str, target: str, script: str, expected: str) -> None:
    assert target_of(APPS[mount], environ_of(target, script=script)) == (expected, None)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        pytest.param("/v1/a/b?c=%20", "a/b", "c=%20", id="plain"),
        pytest.param("/v1/a%20b%25%3Fx", "a%20b%25%3Fx", None, id="encoded-anew"),
        pytest.param("/v1/%C3%B6%FF", "%C3%B6%FF", None, id="bytes"),
        pytest.param("/v1/a:b@c!$&'()*+,;=~-._", "a:b@c!$&'()*+,;=~-._", None, id="signs-stay"),
        pytest.param("/v1/a?", "a", None, id="an-empty-query-cannot-be-seen"),
    ],
)
@pytest.mark.parametrize("raw", [pytest.param(None, id="not-shown"), pytest.param("/elsewhere/x?y", id="rewritten")])
def test_a_server_that_shows_no_raw_target_gets_it_encoded_anew(
    target: str, path: str, query: str | None, raw: str | None
) -> None:
    environ = environ_of(target, raw=None) | ({"RAW_URI": raw} if raw else {})
    assert target_of(APPS["/v1"], environ) == (path, query)


# `\n` is left out: Flask routes no path that holds one.
CHARACTERS = [chr(byte) for byte in range(0x21, 0x100) if chr(byte) not in "?#%" and not 0x7F <= byte < 0xA1]
SEGMENT = st.lists(
    st.one_of(
        st.sampled_from(CHARACTERS),
        st.integers(0, 255).filter(lambda byte: byte != 0x0A).map(lambda byte: f"%{byte:02X}"),
        st.sampled_from(["%2f", "%25", "%", "%g", "/", "v1/", "%c3%b6", "\xc3\xb6"]),
    ),
    max_size=12,
).map("".join)


@given(SEGMENT, st.none() | st.text(st.sampled_from("ab=&%?/+\xff"), max_size=8), st.sampled_from(["", "/v1", "/%761"]))
@example("%", None, "/v1")
@example("a%FF%E2%82/%FF", "", "/%761")
def test_whatever_the_path_its_bytes_stay(below: str, query: str | None, mount: str) -> None:
    if not mount:
        # A server and Werkzeug read slashes at a path's start as one.
        below = below.lstrip("/") if "%" not in below else below.replace("%2F", "").replace("%2f", "").lstrip("/")
    target = f"{mount}/{below}" + ("" if query is None else f"?{query}")
    assert target_of(APPS["/v1" if mount else ""], environ_of(target)) == (below, query)


@pytest.mark.parametrize("added", [pytest.param("", id="matches"), pytest.param("%42", id="matches-nothing")])
def test_a_long_path_costs_no_more_than_its_length(added: str) -> None:
    path = "/v1" + "/%41" * 2000
    environ = environ_of(path, raw=None) | {"RAW_URI": path + added}
    begun = time.process_time()
    for _ in range(5):
        raw_target(environ, environ["PATH_INFO"].removeprefix("/v1/"))
    assert time.process_time() - begun < 0.5


# --- the body -----------------------------------------------------------------------------------------------------

LIMIT = 200_000


def request_of(body: Any, method: str = "POST", **environ: Any) -> Request:
    stream = io.BytesIO(body) if isinstance(body, bytes) else body
    return Request({**environ_of("/v1/x"), "REQUEST_METHOD": method, "wsgi.input": stream, **environ})


def read_body(request: Request, limit: int) -> bytes | bytearray | None:
    """The body as a stream gets it."""
    bodies: list[bytes | bytearray | None] = []

    def finish(body: bytes | bytearray | None) -> Generator[None, None, Any]:
        bodies.append(body)
        yield

    expected = expected_body(request, limit)
    if expected is None:
        return without_body(request.method)
    intake = Intake(request.environ, expected, 10 * limit, finish)
    held = memory.held
    try:
        for _ in intake.steps():
            assert memory.held == held + (len(bodies[0] or b"") if bodies else intake.received)
    finally:
        intake.release()
        intake.release()
        assert memory.held == held
    return bodies[0]


CHUNKED: dict[str, Any] = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, LIMIT - 1, LIMIT])
@pytest.mark.parametrize("terminated", [{}, {"wsgi.input_terminated": True}])
def test_a_body_is_read_whole(size: int, terminated: dict[str, Any]) -> None:
    body = bytes(range(256)) * 1000
    body = body[:size]
    assert read_body(request_of(body, CONTENT_LENGTH=str(size), **terminated), LIMIT) == body
    assert read_body(request_of(body, **CHUNKED), LIMIT) == body


def test_what_follows_the_body_is_left_alone() -> None:
    assert read_body(request_of(b"helloGET / HTTP/1.1", CONTENT_LENGTH="5"), LIMIT) == b"hello"


@pytest.mark.parametrize("excess", [1, 2, 65_536, 1_000_000])
def test_a_body_over_the_limit_is_refused_and_never_shortened(excess: int) -> None:
    """Werkzeug gives the first LIMIT bytes of a chunked body, without a word of the rest."""
    body = b"x" * (LIMIT + excess)
    for environ in (
        CHUNKED,
        {"CONTENT_LENGTH": str(len(body))},
        {"CONTENT_LENGTH": str(len(body)), "wsgi.input_terminated": True},
    ):
        with pytest.raises(errors.BodyTooLarge, match="RELAY_MAX_BODY") as caught:
            read_body(request_of(body, **environ), LIMIT)
        assert str(LIMIT) in caught.value.message


def test_a_body_that_is_announced_as_too_large_is_not_read() -> None:
    class Unread(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise AssertionError("read")

    for announced in (str(LIMIT + 1), "9" * 5000):
        with pytest.raises(errors.BodyTooLarge):
            read_body(request_of(Unread(), CONTENT_LENGTH=announced), LIMIT)


@pytest.mark.parametrize("sent", [0, 1, 99])
@pytest.mark.parametrize("terminated", [{}, {"wsgi.input_terminated": True}])
def test_half_a_body_is_refused(sent: int, terminated: dict[str, Any]) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        read_body(request_of(b"x" * sent, CONTENT_LENGTH="100", **terminated), LIMIT)
    assert caught.value.code == "truncated_body"


class Ill(Exception):
    """As gunicorn's InvalidChunkSize: no OSError."""


class IllInput:
    def __init__(self, error: Exception) -> None:
        self._pieces: Iterator[bytes] = iter([b"x" * 10])
        self._error = error

    def read(self, size: int = -1) -> bytes:
        for piece in self._pieces:
            return piece
        raise self._error


@pytest.mark.parametrize(
    "error", [OSError("gone"), ConnectionResetError(), ValueError("closed"), EOFError(), Ill(b"zz"), TimeoutError()]
)
@pytest.mark.parametrize("environ", [CHUNKED, {"CONTENT_LENGTH": "100"}])
def test_a_body_that_breaks_off_is_refused(error: Exception, environ: dict[str, Any]) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        read_body(request_of(IllInput(error), **environ), LIMIT)
    assert caught.value.code == "truncated_body"


@pytest.mark.parametrize("announced", ["five", "-5", "+5", "5.0", "0x5", "5 5", "5, 5", "\u0665", "\xb2", " 5"])
def test_a_malformed_length_is_refused(announced: str) -> None:
    with pytest.raises(errors.BadRequest, match="Content-Length"):
        read_body(request_of(b"hello", CONTENT_LENGTH=announced), LIMIT)


def test_a_chunked_body_that_the_server_does_not_decode_is_refused() -> None:
    """Werkzeug reads it as empty, and an empty request would go upstream."""
    with pytest.raises(errors.BadRequest) as caught:
        read_body(request_of(b"5\r\nhello\r\n0\r\n\r\n", HTTP_TRANSFER_ENCODING="Chunked"), LIMIT)
    assert caught.value.code == "length_required"


@pytest.mark.parametrize(
    ("method", "body"),
    [("GET", None), ("HEAD", None), ("DELETE", None), ("OPTIONS", None), ("POST", b""), ("PUT", b""), ("PATCH", b"")],
)
def test_no_body(method: str, body: bytes | None) -> None:
    for environ in ({}, {"CONTENT_LENGTH": ""}, {"wsgi.input_terminated": True}):
        assert read_body(request_of(b"", method, **environ), LIMIT) == body
    assert read_body(request_of(b"", method, CONTENT_LENGTH="0"), LIMIT) == b""
    assert read_body(request_of(b"hello", method, CONTENT_LENGTH="5"), LIMIT) == b"hello"


# --- whether it asks for events -----------------------------------------------------------------------------------

STREAM = b'{"model": "m", "stream": true}'


def scanned(body: bytes, kind: str = "application/json") -> tuple[Asked, float]:
    """What a body asks for, and the longest step of finding out, in seconds of CPU."""
    steps, longest = scan(body, kind), 0.0
    while True:
        begun = time.thread_time()
        try:
            next(steps)
        except StopIteration as end:
            return end.value, max(longest, time.thread_time() - begun)
        longest = max(longest, time.thread_time() - begun)


def asks_for_events(
    method: str,
    path: str,
    accept: str,
    body: bytes | None,
    *,
    query: str | None = None,
    kind: str = "application/json",
) -> bool:
    wish = wish_for_events(method, path, query, accept)
    return wish is Wish.YES or (wish is Wish.BODY and bool(body) and scanned(body or b"", kind)[0].stream)


@pytest.mark.parametrize(
    ("method", "path", "accept", "body", "asks"),
    [
        pytest.param("GET", "events", "text/event-stream", None, True, id="accept"),
        pytest.param("GET", "events", "Text/Event-Stream;q=0.9, */*;q=0.1", None, True, id="accept-among-others"),
        pytest.param("GET", "events", "*/*", None, False, id="accept-anything"),
        pytest.param("GET", "events", "text/*", None, False, id="accept-any-text"),
        pytest.param("GET", "events", "", None, False, id="accept-nothing"),
        pytest.param("GET", "events", "text/event-stream, application/json", None, False, id="accept-json-too"),
        pytest.param("POST", "mcp", "application/json;q=1,text/event-stream", STREAM, False, id="accept-json-first"),
        pytest.param("POST", "anything", "text/event-stream", b"", True, id="accept-post"),
        pytest.param(
            "POST", "chat/completions", "text/event-stream,application/json", STREAM, False, id="accept-rules"
        ),
        pytest.param("POST", "chat/completions", "", STREAM, True, id="chat"),
        pytest.param("POST", "chat/completions", "*/*", STREAM, True, id="chat-accept-anything"),
        pytest.param("POST", "chat/completions", "application/json", STREAM, True, id="chat-accept-json"),
        pytest.param("POST", "completions", "", STREAM, True, id="completions"),
        pytest.param("POST", "responses", "", STREAM, True, id="responses"),
        pytest.param("POST", "messages", "", STREAM, True, id="messages"),
        pytest.param("POST", "openai/deployments/x/chat/completions", "", STREAM, True, id="azure"),
        pytest.param("POST", "messages/count_tokens", "", STREAM, False, id="count-tokens"),
        pytest.param("POST", "embeddings", "", STREAM, False, id="embeddings"),
        pytest.param("POST", "xcompletions", "", STREAM, False, id="longer-name"),
        pytest.param("POST", "completions/", "", STREAM, False, id="slash-at-the-end"),
        pytest.param("POST", "", "", STREAM, False, id="the-mount"),
        pytest.param("GET", "chat/completions", "", STREAM, False, id="get"),
        pytest.param("PUT", "chat/completions", "", STREAM, False, id="put"),
        pytest.param("POST", "messages", "", b'{"stream":true}', True, id="no-spaces"),
        pytest.param("POST", "messages", "", b'{"stream": false}', False, id="false"),
        pytest.param("POST", "messages", "", b'{"stream": 1}', False, id="one"),
        pytest.param("POST", "messages", "", b'{"stream": "true"}', False, id="a-text"),
        pytest.param("POST", "messages", "", b'{"stream": null}', False, id="null"),
        pytest.param("POST", "messages", "", b'{"a": {"stream": true}}', False, id="deeper"),
        pytest.param("POST", "messages", "", b'[{"stream": true}]', False, id="a-list"),
        pytest.param("POST", "messages", "", b'"stream"', False, id="only-the-word"),
        pytest.param("POST", "messages", "", b'{"prompt": "\\"stream\\": true"}', False, id="in-a-text"),
        pytest.param("POST", "messages", "", b'{"stream": false, "stream": true}', True, id="twice-last-true"),
        pytest.param("POST", "messages", "", b'{"stream": true, "stream": false}', False, id="twice-last-false"),
        pytest.param("POST", "messages", "", b'{"stream": true', False, id="torn"),
        pytest.param("POST", "messages", "", b'{"stream": true} x', False, id="more-after-it"),
        pytest.param("POST", "messages", "", b'\xff{"stream": true}', False, id="not-utf-8"),
        pytest.param("POST", "messages", "", b"[" * 500_000 + b'"stream"', False, id="half-a-million-brackets"),
        pytest.param("POST", "messages", "", b'{"stream":' * 90_000, False, id="very-deep"),
        pytest.param("POST", "messages", "", b'{"stream": true, "n": ' + b"9" * 9000 + b"}", True, id="a-huge-number"),
        pytest.param("POST", "messages", "", b"", False, id="empty"),
        pytest.param("POST", "messages", "", None, False, id="none"),
    ],
)
def test_who_asks_for_events(method: str, path: str, accept: str, body: bytes | None, asks: bool) -> None:
    assert asks_for_events(method, path, accept, body) is asks


OTHER_WISHES = [
    pytest.param("images/generations", None, True, id="images"),
    pytest.param("threads/t/runs", None, True, id="run"),
    pytest.param("threads/runs", None, True, id="thread-and-run"),
    pytest.param("threads/t/runs/r/submit_tool_outputs", None, True, id="tool-outputs"),
    pytest.param("v2/chat", None, True, id="cohere"),
    pytest.param("v1/chat", None, False, id="cohere-v1"),
    pytest.param("api/chat", None, False, id="ollama"),
    pytest.param("api/generate", None, False, id="ollama-generate"),
    pytest.param("model/m/invoke-with-response-stream", None, False, id="bedrock"),
    pytest.param("model/m/converse-stream", None, False, id="bedrock-converse"),
    pytest.param("v1beta/models/g:streamGenerateContent", "alt=sse", True, id="gemini"),
    pytest.param("v1beta/models/g:streamGenerateContent", "alt=sse&alt=json", False, id="gemini-last-is-json"),
    pytest.param("v1beta/models/g:streamGenerateContent", None, False, id="gemini-json"),
    pytest.param("v1beta/models/g:generateContent", "alt=sse", False, id="gemini-whole"),
]


@pytest.mark.parametrize(("path", "query", "asks"), OTHER_WISHES)
def test_who_else_asks_for_events(path: str, query: str | None, asks: bool) -> None:
    assert asks_for_events("POST", path, "", STREAM, query=query) is asks


@pytest.mark.parametrize("path", ["v1/chat", "api/chat", "model/m/converse-stream"])
def test_other_streams_are_never_event_streams(path: str) -> None:
    assert not asks_for_events("POST", path, "text/event-stream", STREAM)


@pytest.mark.parametrize(
    ("path", "query", "asks"),
    [
        ("responses/resp_1", "stream=true&starting_after=4", True),
        ("responses/resp_1", "stream=true&stream=false", False),
        ("responses/resp_1", None, False),
        ("responses/resp_1/input_items", "stream=true", False),
        ("models", "stream=true", False),
    ],
)
def test_a_get_that_reads_on(path: str, query: str | None, asks: bool) -> None:
    assert asks_for_events("GET", path, "", None, query=query) is asks


@pytest.mark.parametrize(
    ("path", "body", "asks"),
    [
        ("audio/speech", b'{"stream_format": "sse"}', True),
        ("audio/speech", b'{"stream_format": "audio"}', False),
        ("audio/speech", b'{"stream_format": "sse", "stream_format": "audio"}', False),
    ],
)
def test_speech(path: str, body: bytes, asks: bool) -> None:
    assert asks_for_events("POST", path, "", body) is asks


@pytest.mark.parametrize(("value", "asks"), [(b"true", True), (b"false", False), (b"1", False)])
def test_a_part_of_a_form_asks(value: bytes, asks: bool) -> None:
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(200_000) + b"\r\n"
    body = file + b'--b\r\nContent-Disposition: form-data; name="stream"\r\n\r\n' + value + b"\r\n--b--\r\n"
    kind = "multipart/form-data; boundary=b"
    assert asks_for_events("POST", "audio/transcriptions", "", body, kind=kind) is asks


MIB = 1024 * 1024
LONG = [
    pytest.param(b'{"input": "' + b"A" * 30 * MIB + b'", "stream": true}', True, id="picture"),
    pytest.param(b'{"input": "' + b"abc\\n de" * 2 * MIB + b'", "stream": true}', True, id="escapes"),
    pytest.param(b'{"input": [' + b"1.25," * 4 * MIB + b'1], "stream": true}', True, id="numbers"),
    pytest.param(b'[{"stream":true,"":0}' + b',{"":0}' * 4 * MIB + b"]", False, id="objects"),
    pytest.param(b'{"stream":true,"x":' + b"[" * 20 * MIB, False, id="depth"),
    pytest.param(b'{"stream":true,"x":' + b" " * 20 * MIB + b"1}", False, id="white-space"),
]


@pytest.mark.parametrize(("body", "asks"), LONG)
def test_a_long_body_is_scanned_in_short_steps(body: bytes, asks: bool) -> None:
    said, longest = scanned(body)
    assert said.stream is asks
    assert longest < 0.25  # of CPU, where parsing one of these takes seconds


@pytest.mark.parametrize("piece", [b"[],", b"[[]],", b"{},", b"0,", b"[" * 30 + b"]" * 30 + b","])
def test_a_list_of_models_is_scanned_in_short_steps_and_ends_where_it_ends(piece: bytes) -> None:
    body = b'{"x": {"models": [%s"m"], "y": "n"}, "z": ["o"]}' % (piece * (MIB // len(piece)))
    said, _ = scanned(body)
    assert said.models == ["m"]
    assert sum(1 for _ in scan(body, "application/json")) >= len(body) // (64 * 1024) - 1


@given(st.binary(max_size=60).map(lambda junk: b'{"stream"' + junk))
def test_no_body_is_an_error_of_the_relays(body: bytes) -> None:
    assert scanned(body)[0].stream in (True, False)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["stream", "model"]), inner),
        max_leaves=10,
    )
)
def test_it_says_what_a_parser_says(value: object) -> None:
    said, _ = scanned(json.dumps(value).encode())
    if isinstance(value, dict) and said.fault is None:
        model = value.get("model")
        assert said.stream is (value.get("stream") is True)
        assert said.model == (model if isinstance(model, str) else None)
