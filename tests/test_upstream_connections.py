"""The connections to the upstream: one after another on one, never one that may not be used again, TLS, a proxy.

The upstream counts: `Exchange.connection` is the connection that a request came on, `Upstream.accepted` how many there
have been.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from harness import DEADLINE, DeadlineExceeded, eventually, servers
from harness.authority import Authority
from harness.client import Client, Connection, Response
from harness.upstream import PeerGone, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Self

    from harness.client import Body
    from harness.upstream import Exchange, Framing, Handler, Header

SSE = "text/event-stream"
EVENTS: list[Header] = [("Content-Type", SSE)]


class Pair:
    """A relay with one worker, in front of an upstream of its own or of none."""

    def __init__(self, upstream: Upstream, client: Client) -> None:
        self.upstream = upstream
        self.client = client
        self.port = client.port

    def get(self, handler: Handler, method: str = "GET", body: bytes = b"") -> tuple[Exchange, Response, Body]:
        """A request that the upstream answers so; what it saw, and what came back."""
        path = self.upstream.serve(handler)
        try:
            response = self.client.request(method, "/v1" + path, body=body)
            received = response.finish()
            (ex,) = self.upstream.seen(path)
            return ex, response, received
        finally:
            self.upstream.forget(path)

    def fresh(self) -> Exchange:
        """An ordinary request, answered; what the upstream saw of it."""
        ex, response, received = self.get(lambda ex: ex.reply(b"fresh"))
        assert (response.status, received[:2]) == (200, (b"fresh", "clean"))
        return ex


@contextlib.contextmanager
def relaying(upstream: Upstream, **settings: str) -> Iterator[Pair]:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_HEALTH_TTL": "0", **settings}
    with servers.gunicorn(env) as relay, Client(relay.port) as client:
        yield Pair(upstream, client)
    upstream.check()


@pytest.fixture(scope="module")
def plain() -> Iterator[Pair]:
    with Upstream() as upstream, relaying(upstream) as pair:
        yield pair


def error_of(response: Response, status: int = 502) -> dict[str, str]:
    body = response.finish().data
    assert response.status == status, body
    assert response.header("Content-Type") == b"application/json"
    error: dict[str, str] = json.loads(body)["error"]
    assert error["message"]
    return error


# --- Reuse


def events(ex: Exchange, framing: Framing = "chunked") -> None:
    body = b"data: one\n\ndata: two\n\n"
    ex.head(headers=EVENTS, framing=framing, length=len(body))
    ex.send(body[:11])
    ex.send(body[11:])
    ex.end()


def test_ten_streams_one_after_another_use_one_connection() -> None:
    """From the first on, with nothing opened besides."""
    with Upstream() as upstream, relaying(upstream) as pair:
        for _ in range(10):
            _, _, received = pair.get(events, "POST", b"{}")
            assert received[:2] == (b"data: one\n\ndata: two\n\n", "clean")
        assert upstream.accepted == 1


REUSABLE: list[Any] = [
    pytest.param(events, id="events"),
    pytest.param(lambda ex: events(ex, "length"), id="events-with-length"),
    pytest.param(lambda ex: ex.reply(b"{}"), id="length"),
    pytest.param(lambda ex: ex.reply(b""), id="empty"),
    pytest.param(lambda ex: ex.reply(b"x" * 300_000, framing="chunked"), id="chunked"),
    pytest.param(lambda ex: ex.reply(b"no", 500), id="500"),
    pytest.param(lambda ex: ex.reply(b"moved", 302, headers=[("Location", "/x")]), id="302"),
    pytest.param(lambda ex: ex.reply(status=204, framing="none"), id="204"),
    pytest.param(lambda ex: ex.reply(status=304, framing="none"), id="304"),
    pytest.param(lambda ex: (ex.raw(b"HTTP/1.1 103 Early\r\n\r\n"), ex.reply(b"{}")), id="after-an-interim-response"),
    pytest.param(lambda ex: ex.reply(b"{}", headers=[("Connection", "keep-alive")]), id="said-keep-alive"),
]


@pytest.mark.parametrize("handler", REUSABLE)
def test_a_connection_is_used_again_after_a_whole_body(plain: Pair, handler: Handler) -> None:
    first, _, _ = plain.get(handler)
    assert plain.fresh().connection == first.connection


def test_a_connection_is_used_again_after_a_head(plain: Pair) -> None:
    first, _, _ = plain.get(lambda ex: ex.reply(headers=[("Content-Length", "5")], framing="none"), "HEAD")
    assert plain.fresh().connection == first.connection


def test_a_connection_is_used_again_when_the_last_chunk_comes_late(plain: Pair) -> None:
    """Its terminator in a packet of its own, after the client has had all the data."""
    path = plain.upstream.by_hand()
    connection = plain.client.connection()
    connection.send("GET", "/v1" + path)
    ex = plain.upstream.next(path)
    ex.head(headers=EVENTS)
    response = connection.read_head()
    ex.send(b"data: x\n\n")
    assert response.read_event() == b"data: x\n\n"
    ex.raw(b"0\r\n")
    ex.raw(b"\r\n")
    ex.finished.set()
    assert response.finish().ended == "clean"
    assert plain.fresh().connection == ex.connection


def test_an_http_1_0_answer_that_keeps_the_connection_says_so(plain: Pair) -> None:
    def answer(ex: Exchange, *more: bytes) -> None:
        ex.raw(b"\r\n".join([b"HTTP/1.0 200 OK", b"Content-Length: 2", *more, b"", b"ok"]))
        ex.finished.set()

    kept, _, _ = plain.get(lambda ex: answer(ex, b"Connection: Keep-Alive"))
    assert plain.fresh().connection == kept.connection
    dropped, _, _ = plain.get(answer)
    assert plain.fresh().connection != dropped.connection


def test_streams_at_the_same_time_use_connections_of_their_own_and_leave_them_for_later() -> None:
    with Upstream() as upstream, relaying(upstream) as pair, contextlib.ExitStack() as stack:
        paths = [upstream.by_hand() for _ in range(5)]
        connections = [stack.enter_context(Connection(pair.port)) for _ in paths]
        for connection, path in zip(connections, paths, strict=True):
            connection.send("GET", "/v1" + path)
        exchanges = [upstream.next(path) for path in paths]
        assert len({ex.connection for ex in exchanges}) == 5
        for ex in exchanges:
            ex.reply(b"ok")
        for connection in connections:
            assert connection.read_head().finish().data == b"ok"
        for _ in range(5):
            pair.fresh()
        assert upstream.accepted == 5


# --- No reuse. Each handler keeps its side open, so that it is the relay that closes.


def _lingering(write: Callable[[Exchange], object], closed: threading.Event) -> Handler:
    """A handler that writes and keeps the connection open; `closed` is set once the relay has closed it."""

    def handler(ex: Exchange) -> None:
        write(ex)
        with contextlib.suppress(DeadlineExceeded):
            ex.wait_gone()
            closed.set()
        ex.finished.set()

    return handler


def closes_after(pair: Pair, method: str, write: Callable[[Exchange], object], ended: str) -> None:
    """The relay closes the connection after such an answer, and nobody ever sees what was sent too much."""
    closed = threading.Event()
    before, _, received = pair.get(_lingering(write, closed), method)
    assert received.ended == ended
    assert b"stray" not in received.data
    assert closed.wait(DEADLINE + 5), "the relay keeps a connection that it cannot use again"
    after = pair.fresh()
    assert (after.connection, after.number) == (before.connection + 1, 1)


STRAY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"

NOT_AGAIN: list[Any] = [
    pytest.param("GET", lambda ex: ex.reply(b"ok", headers=[("Connection", "close")]), "clean", id="connection-close"),
    pytest.param(
        "GET", lambda ex: ex.reply(b"ok", headers=[("connection", "x, Close")]), "clean", id="close-in-a-list"
    ),
    pytest.param(
        "GET", lambda ex: ex.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok" + STRAY), "clean", id="excess"
    ),
    pytest.param(
        "GET", lambda ex: ex.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok!"), "clean", id="one-byte-more"
    ),
    pytest.param("GET", lambda ex: ex.raw(b"HTTP/1.1 204 No Content\r\n\r\n" + STRAY), "clean", id="a-204-with-a-body"),
    pytest.param(
        "GET", lambda ex: ex.raw(b"HTTP/1.1 304 So\r\nContent-Length: 5\r\n\r\nstray"), "clean", id="a-304-with-one"
    ),
    pytest.param(
        "HEAD", lambda ex: ex.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray"), "clean", id="a-head-with-one"
    ),
    pytest.param(
        "GET",
        lambda ex: ex.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + STRAY),
        "clean",
        id="excess-after-chunks",
    ),
    pytest.param(
        "GET",
        lambda ex: ex.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nzz\r\n"),
        "cut",
        id="broken-chunks",
    ),
    pytest.param("GET", lambda ex: ex.raw(b"garbage\r\n\r\n"), "clean", id="garbage"),
]


@pytest.mark.parametrize(("method", "write", "ended"), NOT_AGAIN)
def test_a_connection_is_closed_and_not_used_again(plain: Pair, method: str, write: Any, ended: str) -> None:
    closes_after(plain, method, write, ended)


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_connection_is_not_used_again_after_a_cut(plain: Pair, framing: Framing) -> None:
    def cut(ex: Exchange) -> None:
        ex.head(headers=EVENTS, framing=framing, length=100)
        ex.send(b"data: x")
        ex.abort()

    before, _, received = plain.get(cut)
    assert received[:2] == (b"data: x", "cut")
    assert plain.fresh().connection == before.connection + 1


def test_a_connection_is_not_used_again_after_the_client_has_left(plain: Pair) -> None:
    """What it still carries belongs to the client that is gone."""
    path = plain.upstream.by_hand()
    with Connection(plain.port) as connection:
        connection.send("GET", "/v1" + path)
        ex = plain.upstream.next(path)
        ex.head(headers=EVENTS)
        ex.send(b"data: x\n\n")
        assert connection.read_head().read_event() == b"data: x\n\n"
    ex.wait_gone()
    assert plain.fresh().connection == ex.connection + 1
    plain.upstream.forget(path)


def test_an_idle_connection_that_the_upstream_has_closed_is_noticed(plain: Pair) -> None:
    """Each time: a POST does not meet the closed door, and is not refused."""
    for _ in range(5):

        def and_close(ex: Exchange) -> None:
            ex.reply(b"ok")
            ex.keep_alive = False  # unannounced

        before, _, _ = plain.get(and_close)
        plain.upstream.wait_open(0)
        after, response, received = plain.get(lambda ex: ex.reply(ex.body), "POST", b"{}")
        assert (response.status, received.data) == (200, b"{}")
        assert after.connection == before.connection + 1


@pytest.mark.parametrize(
    "stray",
    [
        pytest.param(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", id="408"),
        pytest.param(STRAY, id="an-answer-nobody-asked-for"),
        pytest.param(b"\r\n", id="an-empty-line"),
    ],
)
def test_an_idle_connection_on_which_something_has_arrived_is_not_used_again(plain: Pair, stray: bytes) -> None:
    said = threading.Event()
    go_on = threading.Event()

    def answer(ex: Exchange) -> None:
        ex.reply(b"own")
        ex.wait(go_on)
        with contextlib.suppress(PeerGone):
            ex.raw(stray)
        said.set()

    before, _, received = plain.get(answer)
    assert received.data == b"own"
    go_on.set()
    assert said.wait(DEADLINE)
    assert plain.fresh().connection == before.connection + 1


def test_a_request_that_was_sent_is_never_sent_again(plain: Pair) -> None:
    """The upstream takes it on a connection that was used before, and hangs up.

    At once: it may have closed an idle connection, so that SDKs may ask again, as they would without a relay. Later: it
    may have been billed.
    """
    at_once = plain.upstream.serve(lambda ex: ex.abort())
    for method, body in (("POST", b"{}"), ("GET", b"")):
        plain.fresh()
        response = plain.client.request(method, "/v1" + at_once, body=body)
        assert error_of(response)["code"] == "upstream_error"
        assert response.all("x-should-retry") == []
    assert [(ex.method, ex.number > 1) for ex in plain.upstream.seen(at_once)] == [(b"POST", True), (b"GET", True)]
    plain.upstream.forget(at_once)

    def later(ex: Exchange) -> None:
        time.sleep(1.5)  # beyond the second in which the upstream may not have seen the request
        ex.abort()

    path = plain.upstream.serve(later)
    for method, body in (("POST", b"{}"), ("GET", b"")):
        plain.fresh()
        response = plain.client.request(method, "/v1" + path, body=body)
        assert error_of(response)["code"] == "upstream_error"
        assert response.all("x-should-retry") == [b"false"]
    assert [(ex.method, ex.number > 1) for ex in plain.upstream.seen(path)] == [(b"POST", True), (b"GET", True)]
    plain.upstream.forget(path)


def test_the_probe_uses_the_same_connections(plain: Pair) -> None:
    first = plain.fresh()
    for _ in range(3):
        assert plain.client.request("GET", "/health").finish().data.find(b'"ok"') > 0
    assert plain.fresh().connection == first.connection


# --- TLS


@pytest.fixture(scope="module")
def server_context(authority: Authority) -> ssl.SSLContext:
    return authority.issue("server", "DNS:localhost,IP:127.0.0.1")


@pytest.fixture(scope="module", params=["localhost", "127.0.0.1"])
def secure(request: pytest.FixtureRequest, authority: Authority, server_context: ssl.SSLContext) -> Iterator[Pair]:
    """Over TLS to a name and to an address, both of which the certificate has."""
    with (
        Upstream(tls=server_context, host=request.param) as upstream,
        relaying(upstream, RELAY_UPSTREAM_CA=str(authority.certificate)) as pair,
    ):
        yield pair


def test_tls_carries_each_event_before_the_next_is_sent(secure: Pair) -> None:
    in_lock_step(secure)


def in_lock_step(pair: Pair, pieces: tuple[bytes, ...] | None = None) -> Exchange:
    """Each piece reaches the client before the upstream sends the next, until the end."""
    path = pair.upstream.by_hand()
    connection = pair.client.connection()
    connection.send("POST", "/v1" + path, {"Accept": SSE}, b"{}")
    ex = pair.upstream.next(path)
    ex.head(headers=EVENTS)
    response = connection.read_head()
    sent = pieces or (b"data: one\n\n", b"d", b"ata: two\n", b"\n", b"x" * 100_000, b"\n\n", b"data: [DONE]\n\n")
    for piece in sent:
        ex.send(piece)
        assert response.read_exactly(len(piece)) == piece
    ex.end()
    assert response.finish()[:2] == (b"".join(sent), "clean")
    pair.upstream.forget(path)
    return ex


def test_tls_carries_what_came_in_many_records_and_in_one(secure: Pair) -> None:
    """Bytes that TLS has read already and the socket no longer shows are not left lying."""
    records = b"".join(b"data: %d %s\n\n" % (n, b"y" * (n * 37 % 900)) for n in range(400))

    def handler(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        wire = b"".join(
            b"%x\r\n%b\r\n" % (len(piece), piece)
            for piece in (records[i : i + 700] for i in range(0, len(records), 700))
        )
        for i in range(0, len(wire), 97):
            ex.raw(wire[i : i + 97])
        ex.raw(wire + b"0\r\n\r\n")
        ex.finished.set()

    _, _, received = secure.get(handler)
    assert received[:2] == (records * 2, "clean")


@pytest.mark.parametrize("handler", REUSABLE)
def test_a_tls_connection_is_used_again_after_a_whole_body(secure: Pair, handler: Handler) -> None:
    first, _, _ = secure.get(handler)
    after = secure.fresh()
    assert (after.connection, after.number) == (first.connection, first.number + 1)


@pytest.mark.parametrize(("method", "write", "ended"), NOT_AGAIN)
def test_a_tls_connection_is_closed_and_not_used_again(secure: Pair, method: str, write: Any, ended: str) -> None:
    closes_after(secure, method, write, ended)


def test_an_idle_tls_connection_that_the_upstream_has_closed_is_noticed(secure: Pair) -> None:
    def and_close(ex: Exchange) -> None:
        ex.reply(b"ok")
        ex.keep_alive = False

    for _ in range(3):
        before, _, _ = secure.get(and_close)
        secure.upstream.wait_open(0)
        assert secure.fresh().connection > before.connection


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_a_cut_of_a_tls_connection_is_seen_as_a_cut(secure: Pair, framing: Framing) -> None:
    """A body until close too: TLS says goodbye before it closes, and here it does not (RFC 9112 section 9.8)."""

    def cut(ex: Exchange) -> None:
        ex.head(headers=EVENTS, framing=framing, length=100)
        ex.send(b"data: x")
        ex._sock.shutdown(socket.SHUT_WR)  # the TCP connection's end, without TLS's
        ex._sock.close()
        ex.finished.set()

    _, _, received = secure.get(cut)
    assert received[:2] == (b"data: x", "cut")


def test_a_tls_body_until_close_that_ends_with_a_goodbye_is_whole(secure: Pair) -> None:
    _, _, received = secure.get(lambda ex: ex.reply(b"data: x\n\n", headers=EVENTS, framing="close"))
    assert received[:2] == (b"data: x\n\n", "clean")


def test_a_health_probe_works_over_tls(secure: Pair) -> None:
    report = json.loads(secure.client.request("GET", "/health").finish().data)
    assert (report["status"], report["upstream"]["reachable"]) == ("ok", True)


@pytest.fixture(scope="module")
def refusing(authority: Authority) -> Iterator[Callable[[str], tuple[Client, Upstream]]]:
    """A relay to an upstream whose certificate is wrong in the way that is named; started when asked for."""
    trusted = {"RELAY_UPSTREAM_CA": str(authority.certificate)}
    with contextlib.ExitStack() as stack:
        other = Authority(_made(authority.folder / "other"))

        def start(fault: str) -> tuple[Client, Upstream]:
            settings: dict[str, str] = dict(trusted)
            if fault == "untrusted":
                settings, context = {}, authority.issue("u", "DNS:localhost")
            elif fault == "other-authority":
                context = other.issue("o", "DNS:localhost")
            elif fault == "wrong-name":
                context = authority.issue("w", "DNS:elsewhere.example,DNS:localhost.example,IP:127.0.0.2")
            else:
                context = authority.issue("e", "DNS:localhost", days=-1)
            upstream = stack.enter_context(Upstream(tls=context, host="localhost"))
            return stack.enter_context(relaying(upstream, **settings)).client, upstream

        yield start


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("fault", ["untrusted", "other-authority", "wrong-name", "expired"])
def test_a_certificate_that_is_not_to_be_trusted_is_a_502_that_says_so(
    refusing: Callable[[str], tuple[Client, Upstream]], fault: str
) -> None:
    """The request has not been sent, so it may be sent again; no address and no trace of Python in what is said."""
    client, upstream = refusing(fault)
    for _ in range(2):
        response = client.request("POST", "/v1/x", {"Authorization": "Bearer secret"}, b"{}")
        error = error_of(response)
        assert error["code"] == "upstream_certificate"
        assert "certificate" in error["message"]
        assert "RELAY_UPSTREAM_CA" in error["message"] or fault not in ("untrusted", "other-authority")
        assert response.all("x-should-retry") == []
    assert upstream.seen() == []
    report = json.loads(client.request("GET", "/health").finish().data)
    assert report["status"] == "down"


def test_tls_to_a_port_without_it_is_a_502_that_says_so(authority: Authority) -> None:
    with Upstream() as upstream:
        url = upstream.base_url.replace("http://", "https://")
        with relaying(upstream, RELAY_UPSTREAM_URL=url, RELAY_UPSTREAM_CA=str(authority.certificate)) as pair:
            # What it reads is no request; it answers as plain servers do.
            upstream.handler = lambda ex: None
            with _plain_answers() as port, relaying(upstream, RELAY_UPSTREAM_URL=f"https://127.0.0.1:{port}") as other:
                error = error_of(other.client.request("GET", "/v1/x"))
            assert error["code"] == "upstream_unreachable"
            assert "TLS" in error["message"]
        assert pair.upstream.seen() == []


@contextlib.contextmanager
def _plain_answers() -> Iterator[int]:
    """A port that answers whatever comes with a plain 400."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.recv(65536)
                        client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(DEADLINE)


def test_no_tls_to_a_port_with_it_is_a_502(server_context: ssl.SSLContext) -> None:
    with Upstream(tls=server_context) as upstream:
        url = upstream.base_url.replace("https://", "http://")
        with relaying(upstream, RELAY_UPSTREAM_URL=url) as pair:
            error_of(pair.client.request("GET", "/v1/x"))


# --- Through a proxy


class Proxy:
    """A forward proxy: `CONNECT host:port` opens a tunnel, `METHOD http://host:port/path` is passed on.

    It looks at the first request of a connection only and is a pipe from there on. `heads` are the request heads that
    it has seen, `refuse` a response to give instead of service.
    """

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.refuse = b""
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(DEADLINE)

    def _start(self, target: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # whatever the proxy is closed in the middle of
            self._converse(client)

    def _converse(self, client: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = client.recv(65536)
            if not piece:
                return
            data += piece
        head = data.partition(b"\r\n\r\n")[0]
        self.heads.append(head)
        if self.refuse:
            client.sendall(self.refuse)
            client.close()
            return
        method, target, version = head.partition(b"\r\n")[0].split(b" ")
        authority, slash, path = target.removeprefix(b"http://").partition(b"/")
        host, _, port = authority.decode().rpartition(":")
        upstream = socket.create_connection((host, int(port)))
        self._sockets.append(upstream)
        if method == b"CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            upstream.sendall(b" ".join([method, slash + path, version]) + data[data.index(b"\r\n") :])
        self._start(_pipe, client, upstream)
        self._start(_pipe, upstream, client)

    def of(self, method: bytes) -> list[bytes]:
        return [head for head in self.heads if head.startswith(method + b" ")]


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


def test_a_plain_upstream_is_reached_through_the_proxy(proxy: Proxy) -> None:
    """It is asked for the whole URL, and nothing goes past it; events arrive one by one."""
    with (
        Upstream(base_path="/base") as upstream,
        relaying(upstream, RELAY_UPSTREAM_PROXY=f"http://127.0.0.1:{proxy.port}") as pair,
    ):
        in_lock_step(pair)
        head = proxy.of(b"POST")[0]
        assert head.split(b"\r\n")[0].startswith(b"POST " + upstream.base_url.encode() + b"/scripted/")
        assert b"\r\nHost: 127.0.0.1:%d\r\n" % upstream.port in head + b"\r\n"
        assert upstream.accepted == len(proxy.heads) == 1


def test_a_tls_upstream_is_reached_through_a_tunnel(
    proxy: Proxy, authority: Authority, server_context: ssl.SSLContext
) -> None:
    """The proxy sees where to, and no word more; the tunnel is used again."""
    settings = {
        "RELAY_UPSTREAM_PROXY": f"http://127.0.0.1:{proxy.port}",
        "RELAY_UPSTREAM_CA": str(authority.certificate),
    }
    with Upstream(tls=server_context, host="localhost") as upstream, relaying(upstream, **settings) as pair:
        in_lock_step(pair)
        assert in_lock_step(pair).number == 2
        assert len(proxy.heads) == upstream.accepted == 1
        assert proxy.heads[0].startswith(b"CONNECT localhost:%d HTTP/1." % upstream.port)
        assert b"Bearer" not in proxy.heads[0]
        assert b"User-Agent" not in proxy.heads[0]


def test_the_certificate_is_checked_through_a_tunnel_too(proxy: Proxy, server_context: ssl.SSLContext) -> None:
    with Upstream(tls=server_context, host="localhost") as upstream:
        with relaying(upstream, RELAY_UPSTREAM_PROXY=f"http://127.0.0.1:{proxy.port}") as pair:
            assert error_of(pair.client.request("POST", "/v1/x", body=b"{}"))["code"] == "upstream_certificate"
        assert upstream.seen() == []


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_the_proxys_password_goes_to_the_proxy_alone(
    proxy: Proxy, authority: Authority, server_context: ssl.SSLContext, tls: bool
) -> None:
    """Into a tunnel's first request, or beside each request; to no upstream by a tunnel."""
    settings = {
        "RELAY_UPSTREAM_PROXY": f"http://some%40body:pass%3Aword@127.0.0.1:{proxy.port}",
        "RELAY_UPSTREAM_CA": str(authority.certificate),
    }
    with (
        Upstream(tls=server_context if tls else None, host="localhost") as upstream,
        relaying(upstream, **settings) as pair,
    ):
        ex = pair.fresh()
        basic = b"Basic " + base64.b64encode(b"some@body:pass:word")
        assert b"\r\nproxy-authorization: " + basic.lower() in proxy.heads[0].lower()
        assert basic in proxy.heads[0]
        if tls:
            assert ex.all("Proxy-Authorization") == []


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_proxy_that_is_not_there_is_a_502(authority: Authority, server_context: ssl.SSLContext, tls: bool) -> None:
    settings = {"RELAY_UPSTREAM_PROXY": "http://127.0.0.1:9", "RELAY_UPSTREAM_CA": str(authority.certificate)}
    with Upstream(tls=server_context if tls else None, host="localhost") as upstream:
        with relaying(upstream, **settings) as pair:
            response = pair.client.request("POST", "/v1/x", body=b"{}")
            assert error_of(response)["code"] == "upstream_unreachable"
            assert response.all("x-should-retry") == []
        assert upstream.accepted == 0


def test_a_proxy_that_opens_no_tunnel_is_a_502(
    proxy: Proxy, authority: Authority, server_context: ssl.SSLContext
) -> None:
    settings = {
        "RELAY_UPSTREAM_PROXY": f"http://127.0.0.1:{proxy.port}",
        "RELAY_UPSTREAM_CA": str(authority.certificate),
    }
    proxy.refuse = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with Upstream(tls=server_context, host="localhost") as upstream:
        with relaying(upstream, **settings) as pair:
            error = error_of(pair.client.request("POST", "/v1/x", body=b"{}"))
            assert error["code"] == "upstream_unreachable"
            eventually(lambda: len(proxy.heads) > 0, "the proxy to be asked")
        assert upstream.accepted == 0
