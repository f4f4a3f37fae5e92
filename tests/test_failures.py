"""What goes wrong is told truthfully: by a status before the first byte, by a visible cut after it, in JSON always.

That nothing running logs a traceback is checked after every test (conftest).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from harness import DEADLINE, DeadlineExceeded, servers
from harness.client import Client, Connection
from harness.servers import free_port

from relay.stream.late_answer import LateAnswer
from relay.wire import http1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Service
    from harness.client import Body, Response
    from harness.upstream import Exchange, Header

SSE = "text/event-stream"
OK = b"HTTP/1.1 200 OK\r\n"
BODY = b"Content-Length: 2\r\n\r\nok"


def error_of(response: Response, status: int) -> dict[str, str]:
    """The relay's own error with this status, in its one shape: no page, no trace of the program, no address."""
    body = response.finish().data
    assert response.status == status, body
    assert response.header("Content-Type") == b"application/json"
    error: dict[str, str] = json.loads(body)["error"]
    assert sorted(error) == ["code", "message", "request_id", "type"]
    assert all(error.values())
    assert error["request_id"].encode() == response.header("X-Request-ID")
    assert not re.search(r"Traceback|object at 0x|<html|127\.0\.0\.1|line \d+|\bNone\b|Errno", error["message"])
    return error


# --- Before the first byte


@pytest.fixture(scope="module")
def to_nobody() -> Iterator[Client]:
    """A relay whose upstream refuses connections."""
    with (
        servers.gunicorn({"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{free_port()}/v1"}) as relay,
        Client(relay.port) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def to_nobody_behind_nginx(to_nobody: Client) -> Iterator[Client]:
    with servers.nginx(to_nobody.port, to_nobody.port) as nginx, Client(nginx.port) as client:
        yield client


@pytest.mark.parametrize("name", ["to_nobody", "to_nobody_behind_nginx"], ids=["gunicorn", "nginx"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_upstream_that_refuses_the_connection_is_a_502_that_may_be_tried_again(
    request: pytest.FixtureRequest, name: str, method: str
) -> None:
    """Also where the client has asked for an event stream."""
    client: Client = request.getfixturevalue(name)
    for headers in ({}, {"Accept": SSE}, {"Accept": "text/html"}):
        response = client.request(
            method, "/v1/chat/completions", headers, b'{"stream": true}' if method == "POST" else b""
        )
        error = error_of(response, 502)
        assert (error["code"], error["type"]) == ("upstream_unreachable", "upstream_error")
        assert response.all("x-should-retry") == []
        assert response.header("X-Content-Type-Options") == b"nosniff"


def test_a_name_that_does_not_resolve_is_a_502_that_says_so() -> None:
    env = {"RELAY_UPSTREAM_URL": "http://nobody.invalid/v1"}  # RFC 6761: never resolves
    with servers.gunicorn(env) as relay, Client(relay.port) as client:
        response = client.request("POST", "/v1/x", body=b"{}")
        error = error_of(response, 502)
        assert error["code"] == "upstream_unreachable"
        assert "name" in error["message"]
        assert response.all("x-should-retry") == []


# No answer, however far it got: the upstream hangs up.
BROKEN_OFF = [
    pytest.param(b"", id="at-once"),
    pytest.param(b"H", id="after-a-byte"),
    pytest.param(b"HTTP/1.1 20", id="inside-the-status-line"),
    pytest.param(OK, id="after-the-status-line"),
    pytest.param(OK + b"Content-Type: text/ev", id="inside-a-header"),
    pytest.param(OK + b"Content-Length: 2\r\n\r", id="one-byte-before-the-end-of-the-head"),
    pytest.param(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", id="after-an-interim-response"),
    pytest.param(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2", id="inside-what-follows-it"),
]


def failed(
    hop: Service, handler: Callable[[Exchange], None], method: str = "POST", *, silent: bool = False
) -> dict[str, str]:
    """A request that the upstream has had and not answered as it should: a 502 that SDKs do not repeat; sent once.

    `silent`: not a byte came; on a connection that stood idle SDKs may then repeat it.
    """
    path = hop.upstream.serve(handler)
    try:
        response = hop.client.request(method, "/v1" + path, {"Accept": SSE}, b"{}" if method == "POST" else b"")
        error = error_of(response, 502)
        assert (error["code"], error["type"]) == ("upstream_error", "upstream_error")
        assert response.all("x-should-retry") == [b"false"] or (silent and response.all("x-should-retry") == [])
        assert response.header("X-Content-Type-Options") == b"nosniff"
        assert len(hop.upstream.seen(path)) == 1
        return error
    finally:
        hop.upstream.forget(path)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["abort", "reset"])
@pytest.mark.parametrize("wire", BROKEN_OFF)
def test_an_upstream_that_hangs_up_before_its_answer_is_a_502(hop: Service, wire: bytes, how: str, method: str) -> None:
    def handler(ex: Exchange) -> None:
        ex.raw(wire)
        ex.abort() if how == "abort" else ex.reset()

    assert "hung up" in failed(hop, handler, method, silent=not wire)["message"]


NOT_HTTP = [
    pytest.param(b"garbage\r\n\r\n", id="garbage"),
    pytest.param(bytes(range(256)), id="binary"),
    pytest.param(b"\r\n\r\n" + OK + BODY, id="empty-lines-first"),
    pytest.param(b"<html><body>It works!</body></html>\n", id="http-0.9"),
    pytest.param(b"{}", id="only-a-body"),
    pytest.param(b"SSH-2.0-OpenSSH_9.2p1\r\n", id="ssh"),
    pytest.param(b"\x15\x03\x01\x00\x02\x02\x16", id="a-tls-alert"),
    pytest.param(b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x64\0\x04\0\x10\0\0", id="http-2-frames"),
    pytest.param(b"ICY 200 OK\r\n\r\n", id="icy"),
    pytest.param(b"http/1.1 200 OK\r\n" + BODY, id="lower-case"),
    pytest.param(b"HTTP/2 200 OK\r\n" + BODY, id="http-2"),
    pytest.param(b"HTTP/2.0 200 OK\r\n" + BODY, id="http-2.0"),
    pytest.param(b"HTTP/1.2 200 OK\r\n" + BODY, id="http-1.2"),
    pytest.param(b"HTTP/1.10 200 OK\r\n" + BODY, id="http-1.10"),
    pytest.param(b"HTTP/1.1 200OK\r\n" + BODY, id="no-space"),
    pytest.param(b"HTTP/1.1  200 OK\r\n" + BODY, id="two-spaces"),
    pytest.param(b"HTTP/1.1 20 OK\r\n" + BODY, id="two-digits"),
    pytest.param(b"HTTP/1.1 2000 OK\r\n" + BODY, id="four-digits"),
    pytest.param(b"HTTP/1.1 +20 OK\r\n" + BODY, id="a-sign"),
    pytest.param(b"HTTP/1.1 abc OK\r\n" + BODY, id="no-digits"),
    pytest.param("HTTP/1.1 ٢٠٠ OK\r\n".encode() + BODY, id="arabic-digits"),
    pytest.param(b"HTTP/1.1 099 Odd\r\n" + BODY, id="below-100"),
    pytest.param(b"HTTP/1.1 000 Odd\r\n" + BODY, id="zero"),
    pytest.param(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", id="switching-protocols"),
    pytest.param(b"HTTP/1.1 200 O\0K\r\n" + BODY, id="nul-in-the-reason"),
    pytest.param(b"HTTP/1.1 200 O\rK\r\n" + BODY, id="cr-in-the-reason"),
    pytest.param(OK + b"no colon\r\n" + BODY, id="no-colon"),
    pytest.param(OK + b": no name\r\n" + BODY, id="no-name"),
    pytest.param(OK + b"X-A : b\r\n" + BODY, id="space-before-the-colon"),
    pytest.param(OK + b"X A: b\r\n" + BODY, id="space-in-the-name"),
    pytest.param(OK + b"X-\xe9: b\r\n" + BODY, id="latin-1-in-the-name"),
    pytest.param(OK + b"X-(): b\r\n" + BODY, id="brackets-in-the-name"),
    pytest.param(OK + b" X-A: b\r\n" + BODY, id="space-before-the-name"),
    pytest.param(OK + b"X-A: b\r\n folded\r\n" + BODY, id="a-folded-line"),
    pytest.param(OK + b"X-A: b\rSet-Cookie: c=1\r\n" + BODY, id="cr-in-a-value"),
    pytest.param(OK + b"X-A: b\0c\r\n" + BODY, id="nul-in-a-value"),
    pytest.param(OK + b"X-A: \x1b[2J\r\n" + BODY, id="escape-in-a-value"),
    pytest.param(OK + b"X-A: b\x7f\r\n" + BODY, id="del-in-a-value"),
    pytest.param(
        OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", id="length-and-chunked"
    ),
    pytest.param(
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n2\r\nok\r\n0\r\n\r\n", id="chunked-and-length"
    ),
    pytest.param(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok!", id="two-lengths"),
    pytest.param(OK + b"Content-Length: 2, 3\r\n\r\nok!", id="two-lengths-in-a-list"),
    pytest.param(OK + b"Content-Length: -2\r\n\r\nok", id="negative-length"),
    pytest.param(OK + b"Content-Length: +2\r\n\r\nok", id="signed-length"),
    pytest.param(OK + b"Content-Length: 0x2\r\n\r\nok", id="hexadecimal-length"),
    pytest.param(OK + b"Content-Length: 2.0\r\n\r\nok", id="fractional-length"),
    pytest.param(OK + b"Content-Length: 2 2\r\n\r\nok", id="length-with-a-space"),
    pytest.param(OK + b"Content-Length: 1_0\r\n\r\nok", id="length-with-an-underscore"),
    pytest.param(OK + b"Content-Length: \xb2\r\n\r\nok", id="superscript-length"),
    pytest.param(OK + b"Content-Length:\r\n\r\nok", id="empty-length"),
    pytest.param(OK + b"Content-Length: 2,\r\n\r\nok", id="length-and-nothing"),
    pytest.param(OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nok", id="endless-length"),
    pytest.param(OK + b"Transfer-Encoding: gzip\r\n\r\nok", id="te-gzip"),
    pytest.param(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", id="te-gzip-chunked"),
    pytest.param(OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", id="te-chunked-twice"),
    pytest.param(
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        id="te-in-two-lines",
    ),
    pytest.param(OK + b"Transfer-Encoding: identity\r\n\r\nok", id="te-identity"),
    pytest.param(OK + b"Transfer-Encoding: xchunked\r\n\r\nok", id="te-unknown"),
    pytest.param(OK + b"Transfer-Encoding:\r\n\r\nok", id="te-empty"),
    pytest.param(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", id="te-in-http-1.0"),
    pytest.param(b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: gzip\r\n\r\n", id="te-of-a-204"),
    pytest.param(OK + b"X-A: " + b"a" * (256 * 1024) + b"\r\n" + BODY, id="a-head-over-256-KiB"),
    pytest.param(OK + b"X-A: b\r\n" * 40_000, id="a-head-without-end"),
    pytest.param(b"HTTP/1.1 200 " + b"K" * (300 * 1024), id="a-status-line-without-end"),
]


@pytest.mark.parametrize("wire", NOT_HTTP)
def test_an_answer_that_is_not_sound_http_is_a_502_at_once(hop: Service, wire: bytes) -> None:
    """Without waiting for the upstream to close; nothing of it reaches the client."""

    def handler(ex: Exchange) -> None:
        with contextlib.suppress(Exception):  # the relay may have had enough of a long one
            ex.raw(wire)
        ex.wait_gone()

    error = failed(hop, handler)
    assert "hung up" not in error["message"]


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok", id="the-same-length-twice"),
        pytest.param(OK + b"Content-Length: 2, 2\r\n\r\nok", id="the-same-length-in-a-list"),
        pytest.param(b"HTTP/1.1 200\r\n" + BODY, id="no-reason-and-no-space"),
        pytest.param(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", id="bare-line-feeds"),
        pytest.param(OK + b"Transfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", id="chunked-in-another-case"),
        pytest.param(OK + b"X-A: " + b"a" * 250_000 + b"\r\n" + BODY, id="a-head-below-256-KiB"),
    ],
)
def test_what_is_only_unusual_is_relayed(service: Service, wire: bytes) -> None:
    def handler(ex: Exchange) -> None:
        ex.raw(wire)
        ex.finished.set()

    path = service.upstream.serve(handler)
    response = service.client.request("GET", "/v1" + path)
    assert (response.status, response.finish()[:2]) == (200, (b"ok", "clean"))
    service.upstream.forget(path)


def test_a_status_that_nobody_knows_is_passed_on(service: Service) -> None:
    """RFC 9110 section 15 leaves it to the client to take it for a server's error; LinkedIn's 999 exists."""
    path = service.upstream.serve(lambda ex: ex.reply(b"ok", 999, "Denied"))
    with socket.create_connection(("127.0.0.1", service.port), 5) as sock:  # our own client is too strict for it
        sock.sendall(b"GET /v1%b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path.encode())
        with sock.makefile("rb") as file:
            assert file.readline() == b"HTTP/1.1 999 Denied\r\n"
            assert file.read().endswith(b"\r\n\r\nok")
    service.upstream.forget(path)


def test_an_upstream_that_fails_before_it_has_the_whole_request_is_a_502(service: Service) -> None:
    """It closes while 5 MiB are on their way to it: whether it has acted on them, nobody knows."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        env = {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        with servers.gunicorn(env) as relay, Connection(relay.port) as connection:
            connection.send("POST", "/v1/x", body=b"x" * (5 * 2**20))
            upstream, _ = listener.accept()
            upstream.recv(1000)
            upstream.close()
            response = connection.read_head()
            assert error_of(response, 502)["code"] == "upstream_error"
            assert response.all("x-should-retry") == [b"false"]


# --- After the first byte


def cut_by_fin(ex: Exchange) -> None:
    ex.abort()


def cut_by_reset(ex: Exchange) -> None:
    ex.reset()


def cut_by_bad_chunk(ex: Exchange) -> None:
    ex.raw(b"no size\r\n")
    ex.wait_gone()


def interrupted(
    hop: Service,
    cut: Callable[[Exchange], None],
    sent: bytes,
    headers: list[Header],
    *,
    framing: Any = "chunked",
    method: str = "POST",
    version: str = "HTTP/1.1",
) -> tuple[Response, Body, bytes]:
    """A stream that breaks off after `sent` has reached the client: what came, and what came after `sent`."""
    path = hop.upstream.by_hand()
    try:
        with Connection(hop.port) as connection:
            connection.send(method, "/v1" + path, body=b"{}" if method == "POST" else b"", version=version)
            ex = hop.upstream.next(path)
            ex.head(headers=headers, framing=framing, length=len(sent) + 100)
            response = connection.read_head()
            ex.send(sent)
            assert response.read_exactly(len(sent)) == sent
            cut(ex)
            received = response.finish()
            return response, received, received.data[len(sent) :]
    finally:
        hop.upstream.forget(path)


CUTS = [
    pytest.param(cut_by_fin, "chunked", id="fin-chunked"),
    pytest.param(cut_by_fin, "length", id="fin-length"),
    pytest.param(cut_by_reset, "chunked", id="reset-chunked"),
    pytest.param(cut_by_reset, "length", id="reset-length"),
    pytest.param(cut_by_reset, "close", id="reset-until-close"),
    pytest.param(cut_by_bad_chunk, "chunked", id="bad-chunk"),
]


@pytest.mark.parametrize(("cut", "framing"), CUTS)
@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream", "application/x-ndjson", ""])
@pytest.mark.parametrize("sent", [b"", b'{"a": ', b"line\n\n"], ids=["nothing-yet", "half", "after-a-blank-line"])
def test_a_body_that_is_no_event_stream_is_cut_and_nothing_is_added(
    hop: Service, cut: Any, framing: str, content_type: str, sent: bytes
) -> None:
    headers: list[Header] = [("Content-Type", content_type)] if content_type else []
    _, received, added = interrupted(hop, cut, sent, headers, framing=framing)
    assert (received.ended, added) == ("cut", b"")


FRAME = [
    pytest.param(b"", True, id="nothing-yet"),
    pytest.param(b"data: x\n\n", True, id="lf"),
    pytest.param(b"data: x\r\n\r\n", True, id="crlf"),
    pytest.param(b"data: x\r\r", True, id="cr"),
    pytest.param(b"data: x\n\r\n", True, id="lf-crlf"),
    pytest.param(b"data: x\r\n\n", True, id="crlf-lf"),
    pytest.param(b"data: x\r\n\r", True, id="crlf-cr"),
    pytest.param(b": a comment\n\n", True, id="comment"),
    pytest.param(b"id: 1\ndata: x\n\n", True, id="id"),
    pytest.param(b"\n", True, id="only-a-blank-line"),
    pytest.param(b"data: x\n\ndata: y\n\n\n\n", True, id="many-blank-lines"),
    pytest.param(b"d", False, id="one-byte"),
    pytest.param(b"data: x", False, id="inside-a-line"),
    pytest.param(b"data: x\n", False, id="inside-an-event"),
    pytest.param(b"data: x\r\n", False, id="inside-an-event-crlf"),
    pytest.param(b"data: x\r", False, id="inside-an-event-cr"),
    pytest.param(b"data: x\n\ndata: y", False, id="inside-the-second"),
    pytest.param(b"data: x\n\ndata: y\n", False, id="inside-the-second-event"),
    pytest.param(b": a comment\n", False, id="after-a-comment"),
    pytest.param(b"\xef\xbb\xbf", False, id="only-a-byte-order-mark"),
    pytest.param(b"data: x\n\n\0", False, id="nul"),
    pytest.param(b"data: x\n \n", False, id="a-line-with-a-space"),
]


@pytest.mark.parametrize(("cut", "framing"), CUTS)
@pytest.mark.parametrize(("sent", "framed"), FRAME)
def test_an_event_stream_that_breaks_off_says_so_where_a_frame_may_stand(
    hop: Service, cut: Any, framing: str, sent: bytes, framed: bool
) -> None:
    """At the start or after a blank line, and nowhere else; and in any case it does not end cleanly."""
    response, received, added = interrupted(hop, cut, sent, [("Content-Type", SSE)], framing=framing)
    assert received.ended == "cut"
    if not framed:
        assert added == b""
        return
    frame = re.fullmatch(rb"event: error\ndata: ([^\r\n]+)\n\n", added)
    assert frame, added
    error = json.loads(frame[1])["error"]
    assert sorted(error) == ["code", "message", "request_id", "type"]
    assert error["code"] == "upstream_cut"
    assert error["request_id"].encode() == response.header("X-Request-ID")


@pytest.mark.parametrize(
    ("headers", "framed"),
    [
        pytest.param([("Content-Type", "text/event-stream; charset=utf-8")], True, id="charset"),
        pytest.param([("Content-Type", "TEXT/Event-Stream")], True, id="case"),
        pytest.param([("Content-Type", SSE), ("Content-Encoding", "identity")], True, id="identity"),
        pytest.param([("Content-Type", SSE), ("Content-Encoding", "gzip")], False, id="gzip"),
        pytest.param([("Content-Type", SSE), ("Content-Encoding", "br")], False, id="br"),
        pytest.param([("Content-Type", SSE), ("Content-Encoding", "identity, gzip")], False, id="identity-and-gzip"),
        pytest.param([("Content-Type", SSE), ("Content-Encoding", "x-unknown")], False, id="unknown-encoding"),
        pytest.param([("Content-Type", "text/event-stream2")], False, id="another-type"),
        pytest.param([("Content-Type", "text/plain; text/event-stream")], False, id="type-as-parameter"),
    ],
)
def test_only_a_plain_event_stream_gets_a_frame(hop: Service, headers: list[Header], framed: bool) -> None:
    _, received, added = interrupted(hop, cut_by_fin, b"data: x\n\n", headers)
    assert received.ended == "cut"
    assert added.startswith(b"event: error\n") is framed
    assert framed or not added


@pytest.mark.parametrize("sent", [b"data: x\n\n", b"data: x"], ids=["between-events", "inside-an-event"])
@pytest.mark.parametrize(("cut", "framing"), CUTS)
def test_an_http_1_0_client_sees_a_cut_as_a_reset(service: Service, cut: Any, framing: str, sent: bytes) -> None:
    """It has no other sign; and it has had every byte, the frame too, before the reset."""
    _, received, added = interrupted(service, cut, sent, [("Content-Type", SSE)], framing=framing, version="HTTP/1.0")
    assert (received.ended, received.why) == ("cut", "RST")
    assert (re.fullmatch(rb"event: error\ndata: [^\r\n]+\n\n", added) is not None) is (sent[-1:] == b"\n")


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_http_1_0_client_sees_the_cut_of_a_body_that_is_no_stream(service: Service, framing: str) -> None:
    headers: list[Header] = [("Content-Type", "application/json")]
    _, received, added = interrupted(service, cut_by_fin, b'{"a": ', headers, framing=framing, version="HTTP/1.0")
    assert (received.ended, added) == ("cut", b"")


def test_a_long_body_that_is_cut_arrives_up_to_the_cut(hop: Service) -> None:
    """All 3 MiB that the upstream has sent, however slowly they are read."""
    sent = b"data: " + b"x" * (3 * 2**20)
    _, received, added = interrupted(hop, cut_by_fin, sent, [("Content-Type", SSE)])
    assert (received.ended, added) == ("cut", b"")


def test_the_head_of_a_cut_answer_is_the_upstreams_own(hop: Service) -> None:
    """A status of its own, 401 say, is never replaced by one of the relay's once it has come."""

    def handler(ex: Exchange) -> None:
        ex.head(401, "No", [("WWW-Authenticate", "Bearer")], "length", 100)
        ex.send(b"{")
        ex.abort()

    path = hop.upstream.serve(handler)
    response = hop.client.request("GET", "/v1" + path)
    assert (response.status, response.all("WWW-Authenticate")) == (401, [b"Bearer"])
    assert response.finish()[:2] == (b"{", "cut")
    hop.upstream.forget(path)


# --- The relay's own refusals


ACCEPT = [
    pytest.param({}, id="no-accept"),
    pytest.param({"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}, id="a-browser"),
    pytest.param({"Accept": SSE}, id="an-eventsource"),
    pytest.param({"Accept": "application/xml"}, id="xml"),
]


@pytest.mark.parametrize("headers", ACCEPT)
@pytest.mark.parametrize("path", ["/nothing", "/v1x", "/V1/x", "/v", "/favicon.ico", "/health/x", "/.env", "/metrics/"])
def test_what_lies_outside_the_mount_is_a_404_in_json(hop: Service, path: str, headers: dict[str, str]) -> None:
    before = len(hop.upstream.seen())
    for method in ("GET", "POST", "OPTIONS"):
        error = error_of(hop.client.request(method, path, headers), 404)
        assert error["code"] == "not_found"
    assert len(hop.upstream.seen()) == before


@pytest.mark.parametrize("path", ["/metrics", "/streams"])
def test_what_is_for_the_admin_is_not_on_the_services_address(hop: Service, path: str) -> None:
    error_of(hop.client.request("GET", path), 404)


@pytest.mark.parametrize("headers", ACCEPT)
@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "BREW", "M-SEARCH"])
def test_a_method_that_is_not_relayed_is_a_405_in_json(hop: Service, method: str, headers: dict[str, str]) -> None:
    path = hop.upstream.serve(lambda ex: ex.reply(b"ok"))
    error = error_of(hop.client.request(method, "/v1" + path, headers), 405)
    assert error["code"] == "method_not_allowed"
    assert hop.upstream.seen(path) == []
    hop.upstream.forget(path)


def test_connect_is_refused_in_json(service: Service) -> None:
    """The relay is nobody's way to elsewhere."""
    for target in ("127.0.0.1:80", "/v1/x"):
        with Connection(service.port) as connection:
            response = connection.request("CONNECT", target)
            assert response.status in (400, 404, 405)
            error_of(response, response.status)


@pytest.mark.parametrize("headers", ACCEPT)
def test_a_405_of_another_route_says_what_it_takes(service: Service, headers: dict[str, str]) -> None:
    response = service.client.request("DELETE", "/health", headers)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    allowed = {method.strip() for method in (response.header("Allow") or b"").split(b",")}
    assert b"GET" in allowed
    assert b"DELETE" not in allowed


DISGUISES = [
    "/../x", "/a/../x", "/a/..", "/..", "/.", "/./x", "/a/./b", "/a/.",
    "/%2e%2e/x", "/%2E%2E/x", "/.%2e/x", "/%2e./x", "/%2e", "/a/%2e%2e",
    "/%252e%252e/x", "/%25252e%25252e/x", "/..%2fx", "/..%5cx", "/..\\x", "/\\..\\x", "/a%2f..%2f..%2fx", "/a%5c..%5cx",
    "/..;/x", "/..;a=b/x", "/%2e%2e;/x", "/..%3b/x", "/..%00/x", "/..%20/x", "/..%09/x", "/%2e%2e%2f", "/..%23",
    "/..%3fx",
    "/%c0%ae%c0%ae/x", "/%c0%ae./x", "/%e0%80%ae%e0%80%ae/x", "/..%c0%afx", "/..%c1%9cx", "/%u002e%u002e/x",
    "/%ef%bc%8e%ef%bc%8e/x", "/..%ef%bc%8fx",
    "//../x", "/a//../x", "/../v1/x", "/chat/completions/../../files",
]  # fmt: skip


@pytest.mark.parametrize("target", DISGUISES)
def test_a_path_that_could_leave_the_upstreams_base_is_a_400(hop: Service, target: str) -> None:
    before = len(hop.upstream.seen())
    for end in ("", "?q"):
        error = error_of(hop.client.request("GET", "/v1" + target + end, {"Accept": "text/html"}), 400)
        assert error["type"] == "invalid_request_error"
    assert len(hop.upstream.seen()) == before


@pytest.mark.parametrize("target", ["/a#b", "/#", "/a?b#c"])
def test_a_target_with_a_fragment_is_a_400(service: Service, target: str) -> None:
    before = len(service.upstream.seen())
    error_of(service.client.request("GET", "/v1" + target), 400)
    assert len(service.upstream.seen()) == before


LINE = b"GET /v1/secret-1f HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/secret-1f HTTP/1.1\r\nHost: localhost\r\n"
HTML = b"Accept: text/html\r\n\r\n"
UNPARSABLE = [
    pytest.param(b"secret-1f\r\n\r\n", 400, id="garbage"),
    pytest.param(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03secret-1f\r\n\r\n", 400, id="tls"),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="http-2"),
    pytest.param(b"GET /v1/secret-1f\r\n\r\n", 400, id="http-0.9"),
    pytest.param(b"GET /v1/secret-1f HTTP/3.0\r\nHost: a\r\n" + HTML, 400, id="http-3.0"),
    pytest.param(b"GET /v1/secret-1f HTTP/1.1 x\r\nHost: a\r\n" + HTML, 400, id="four-words"),
    pytest.param(b"get /v1/secret-1f HTTP/1.1\r\nHost: a\r\n" + HTML, 400, id="lower-case-method"),
    pytest.param(b"G(T /v1/secret-1f HTTP/1.1\r\nHost: a\r\n" + HTML, 400, id="no-method"),
    pytest.param(b"GET /v1/secret-1f\0 HTTP/1.1\r\nHost: a\r\n" + HTML, 400, id="nul-in-the-target"),
    pytest.param(b"GET  HTTP/1.1\r\nHost: a\r\n" + HTML, 400, id="no-target"),
    pytest.param(b"GET http://[/secret-1f HTTP/1.1\r\nHost: a\r\n" + HTML, 400, id="half-an-ipv6-address"),
    pytest.param(b"GET /v1/secret-1f?" + b"q" * 8200 + b" HTTP/1.1\r\nHost: a\r\n" + HTML, 414, id="long-line"),
    pytest.param(b"GET /v1/secret-1f?" + b"q" * 100_000, 414, id="line-without-end"),
    pytest.param(LINE + b"X-A: " + b"secret-1f" * 2000 + b"\r\n" + HTML, 431, id="long-header"),
    pytest.param(LINE + b"X-A: b\r\n" * 200 + HTML, 431, id="many-headers"),
    pytest.param(LINE + b"secret-1f\r\n" + HTML, 400, id="no-colon"),
    pytest.param(LINE + b": secret-1f\r\n" + HTML, 400, id="no-name"),
    pytest.param(LINE + b"X-A : secret-1f\r\n" + HTML, 400, id="space-before-the-colon"),
    pytest.param(LINE + b"X A: secret-1f\r\n" + HTML, 400, id="space-in-the-name"),
    pytest.param(LINE + b"X-A: a\r\n secret-1f\r\n" + HTML, 400, id="folded"),
    pytest.param(LINE + b"X-A: a\0secret-1f\r\n" + HTML, 400, id="nul-in-a-value"),
    pytest.param(LINE + b"X-A: a\rsecret-1f\r\n" + HTML, 400, id="cr-in-a-value"),
    pytest.param(LINE + b"X-A: a\nX-B: secret-1f\r\n" + HTML, 400, id="bare-line-feed"),
    pytest.param(LINE + b"Host: secret-1f\r\n" + HTML, 400, id="two-hosts"),
    pytest.param(LINE + b"Expect: secret-1f\r\n" + HTML, 417, id="expect"),
    pytest.param(POST + b"Content-Length: 1\r\nContent-Length: 2\r\n" + HTML + b"ab", 400, id="two-lengths"),
    pytest.param(POST + b"Content-Length: 1, 1\r\n" + HTML + b"a", 400, id="a-list-of-lengths"),
    pytest.param(POST + b"Content-Length: -1\r\n" + HTML, 400, id="negative-length"),
    pytest.param(POST + b"Content-Length: +1\r\n" + HTML + b"a", 400, id="signed-length"),
    pytest.param(POST + b"Content-Length: 0x1\r\n" + HTML + b"a", 400, id="hexadecimal-length"),
    pytest.param(POST + b"Content-Length: \xb2\r\n" + HTML + b"ab", 400, id="superscript-length"),
    pytest.param(POST + b"Content-Length:\r\n" + HTML, 400, id="empty-length"),
    pytest.param(POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n" + HTML + b"0\r\n\r\n", 400, id="both"),
    pytest.param(POST + b"Transfer-Encoding: gzip\r\n" + HTML, 400, id="te-gzip"),
    pytest.param(POST + b"Transfer-Encoding: secret-1f\r\n" + HTML, 501, id="te-unknown"),
    pytest.param(POST + b"Transfer-Encoding: chunked, chunked\r\n" + HTML + b"0\r\n\r\n", 400, id="te-twice"),
    pytest.param(
        b"POST /v1/secret-1f HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" + HTML + b"0\r\n\r\n",
        400,
        id="te-in-http-1.0",
    ),
]


@pytest.mark.parametrize(("wire", "status"), UNPARSABLE)
def test_what_is_no_request_gets_json_and_is_neither_repeated_nor_logged(
    service: Service, wire: bytes, status: int
) -> None:
    """And the connection is closed, since nobody knows where the next request would begin."""
    before = len(service.upstream.seen())
    with Connection(service.port) as connection:
        connection.raw(wire)
        response = connection.read_head()
        error = error_of(response, status)
        assert error["type"] in ("invalid_request_error", "relay_error")
        assert "secret-1f" not in error["message"]
        connection.wait_closed()
    assert len(service.upstream.seen()) == before
    assert "secret-1f" not in service.relay.log_since_mark()


@pytest.mark.parametrize(("wire", "status"), UNPARSABLE)
def test_what_is_no_request_gets_json_from_nginx_too(behind_nginx: Service, wire: bytes, status: int) -> None:
    """Its own, or the relay's for what nginx is content with; what nginx repairs is relayed."""
    with Connection(behind_nginx.port) as connection:
        connection.raw(wire)
        try:
            response = connection.read_head(1 if status in (414, 400) else DEADLINE)
        except (AssertionError, DeadlineExceeded):
            assert status in (414, 400)  # HTTP/0.9 and the like: a body without a head, or the wait for more
            return
        body = response.finish()
        assert not body.data.lstrip().startswith(b"<")
        assert response.header("Content-Type") == b"application/json"
        json.loads(body.data)


def test_a_client_that_sends_half_a_request_and_goes_is_nobodys_trouble(service: Service) -> None:
    for wire in (b"", b"G", b"GET /v1/x HTTP/1.1\r\nHos", POST + b"Content-Length: 10\r\n\r\nhalf"):
        with Connection(service.port) as connection:
            connection.raw(wire)
        with Connection(service.port) as connection:
            connection.raw(wire)
            connection.reset()
    assert service.client.request("GET", "/health/live").status == 200


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        pytest.param(gzip.compress, "so and no further", id="gzip"),
        pytest.param(zlib.compress, "so and no further", id="deflate"),
        pytest.param(lambda body: gzip.compress(body)[:-12], "so and no further", id="cut"),
        pytest.param(lambda _: gzip.compress(bytes(100_000_000)), "the upstream answered 429 Too Many", id="a bomb"),
        pytest.param(lambda _: b"\x8b\x06\x80", "the upstream answered 429 Too Many", id="another coding"),
    ],
)
def test_a_late_failure_is_read_though_the_upstream_has_compressed_it(
    coded: Callable[[bytes], bytes], message: str
) -> None:
    body = b'{"error": {"message": "so and no further", "type": "a_type", "code": "a_code"}}' + b" " * 200
    head = http1.parse_head(
        b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\r\n", "POST"
    )
    late = LateAnswer(head, 0.0)
    late.feed(coded(body))
    late.feed(b"")
    assert late.error().message == message
