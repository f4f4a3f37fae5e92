"""nginx-tls.conf and auth-request.conf as they are shipped, run by a real nginx in front of a real relay.

What faces the network: TLS, HTTP/2 with many streams over one connection, limits for each address, plain HTTP, and an
app that decides who may open a stream. Only addresses, paths that belong to root and the certificate are replaced.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
from harness import DEADLINE, REPO, Deadline, servers
from harness.client import Connection, request
from harness.upstream import Exchange, Upstream

if TYPE_CHECKING:
    from typing import Self

    from conftest import Service
    from harness.servers import Nginx

EVENTS = [("Content-Type", "text/event-stream")]
NAME = "localhost"  # the service without client keys answers to loopback names only


def version() -> tuple[int, ...]:
    """The installed nginx's."""
    program = (
        shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/usr/bin:/bin") or "nginx"
    )
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True, timeout=30).stderr
    return tuple(map(int, re.search(r"nginx/([\d.]+)", said).group(1).split(".")))


# Over TLS and HTTP/2 nginx 1.22.1 keeps a head in its TLS buffer until the first body byte (an event, or a heartbeat);
# 1.26.3 sends it at once.
HEADS_AT_ONCE = version() >= (1, 26)


@dataclass
class Front:
    """The TLS server's source for harness.servers.nginx, its certificate, and the socket of its plain server."""

    source: Path
    certificate: Path
    plain: Path

    @contextlib.contextmanager
    def up(self, service: Service, plain: Path, replace: Mapping[str, str] | None = None) -> Iterator[Nginx]:
        replace = {PLAIN: f"unix:{plain}", **(replace or {})}
        ports = service.relay.port, service.relay.admin_port
        with servers.nginx(*ports, source=self.source, replace=replace) as proxy:
            yield proxy

    def tls(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False  # the harness' client names the address
        context.set_alpn_protocols(list(protocols) or ["http/1.1"])
        return context


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """nginx-tls.conf with what belongs to root replaced, in the spelling of the nginx that is installed."""
    folder = tmp_path_factory.mktemp("tls")
    source, plain = folder / "nginx", folder / "plain"
    shutil.copytree(REPO / "nginx", source, ignore=shutil.ignore_patterns("run", "nginx.conf"))
    (source / "tls").mkdir()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "1", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},IP:127.0.0.1",
         "-keyout", "relay.key", "-out", "relay.pem"],
        cwd=source / "tls", check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    certificate = folder / "relay.pem"
    (source / "tls/relay.pem").rename(certificate)
    (source / "tls/relay.key").rename(folder / "relay.key")
    (source / "tls").rmdir()  # the harness reads what is below the source as text

    new = version() >= (1, 25, 1)
    listen = source / "snippets" / ("listen-http2-1.25.1.conf" if new else "listen-http2.conf")
    text = (source / "nginx-tls.conf").read_text()
    for old, replacement in (
        (r"^user .*;", ""),
        (r"/run/nginx.pid", "run/nginx.pid"),
        (r"/var/log/nginx/", "run/"),
        (r"^http \{", "http {\n" + "".join(f"{name}_temp_path run/{name};\n" for name in TEMPORARY)),
        (r"listen 80;", f"listen {PLAIN};"),
        (r"listen \[::\]:80;", ""),
        (r"tls/relay\.(pem|key)", rf"{folder}/relay.\1"),
        (r"snippets/listen-http2.conf", f"snippets/{listen.name}"),
    ):
        text, count = re.subn(old, replacement, text, flags=re.MULTILINE)
        assert count, old
    (source / "nginx-tls.conf").unlink()
    (source / "nginx.conf").write_text(text)
    text, count = re.subn(r"listen 443", "listen 127.0.0.1:8080", listen.read_text())
    assert count == 1
    listen.write_text(re.sub(r"listen \[::\].*;", "", text))
    return Front(source, certificate, plain)


PLAIN = "PLAIN"  # where the plain server listens, until it is started
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@pytest.fixture(scope="module")
def tls(service: Service, front: Front) -> Iterator[Nginx]:
    with front.up(service, front.plain) as proxy:
        yield proxy


@dataclass
class Stream:
    """One request over HTTP/2 and what has come back."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False  # with END_STREAM: cleanly
    reset: int | None = None  # RST_STREAM's error code

    @property
    def status(self) -> int:
        return int(self.headers[":status"])


class Http2:
    """One TLS connection that speaks HTTP/2."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        plain = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = context.wrap_socket(plain, server_hostname=NAME)
        assert self._sock.selected_alpn_protocol() == "h2"
        self._authority = f"{NAME}:{port}"
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self.streams: dict[int, Stream] = {}
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def _flush(self) -> None:
        self._sock.sendall(self._h2.data_to_send())

    @property
    def most(self) -> int:
        """The streams that the server allows at a time."""
        return self._h2.remote_settings.max_concurrent_streams

    def send(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Stream:
        number = self._h2.get_next_available_stream_id()
        head = {":method": method, ":scheme": "https", ":authority": self._authority, ":path": path, **(headers or {})}
        self._h2.send_headers(number, list(head.items()), end_stream=not body)
        if body:
            self._h2.send_data(number, body, end_stream=True)
        self._flush()
        self.streams[number] = Stream()
        return self.streams[number]

    def leave(self, stream: Stream) -> None:
        """RST_STREAM: no more of this one; the connection goes on."""
        (number,) = (number for number, each in self.streams.items() if each is stream)
        self._h2.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
        self._flush()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Receive until the condition holds."""
        clock = Deadline(DEADLINE, what)
        while not condition():
            self._sock.settimeout(clock.left())
            data = self._sock.recv(65536)
            assert data, f"the connection was closed while waiting: {what}"
            for event in self._h2.receive_data(data):
                self._take(event)
            self._flush()

    def _take(self, event: h2.events.Event) -> None:
        stream = self.streams.get(getattr(event, "stream_id", None) or 0, Stream())
        if isinstance(event, h2.events.ResponseReceived):
            stream.headers.update(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            stream.body += event.data
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended = True
        elif isinstance(event, h2.events.StreamReset):
            stream.reset = int(event.error_code)


@pytest.fixture
def browser(tls: Nginx, front: Front) -> Iterator[Http2]:
    with Http2(tls.port, front.tls("h2")) as connection:
        yield connection


def begun(ex: Exchange) -> None:
    ex.head(headers=EVENTS)


# --- HTTP/2


def test_fifty_streams_over_one_connection(service: Service, browser: Http2):
    """All of them open at once, each event on its own stream the moment it is sent, in any order."""
    paths = [service.upstream.by_hand() for _ in range(50)]
    streams = [
        browser.send("POST", f"/v1{path}", {"content-type": "application/json"}, b'{"stream": true}') for path in paths
    ]
    exchanges = [service.upstream.next(path) for path in paths]
    assert browser.most >= 50
    for ex in exchanges:
        assert ex.body == b'{"stream": true}'
        begun(ex)
    if HEADS_AT_ONCE:
        browser.until(lambda: all(stream.headers for stream in streams), "every head, before any body byte")
    for turn in range(3):
        for number in range(49, -1, -1):
            exchanges[number].send(b"data: %d of %d\n\n" % (turn, number))
            expected = b"".join(b"data: %d of %d\n\n" % (each, number) for each in range(turn + 1))
            browser.until(lambda n=number, e=expected: streams[n].body == e, f"event {turn} of stream {number}")
    assert not any(stream.ended for stream in streams)
    for ex in exchanges:
        ex.end()
    browser.until(lambda: all(stream.ended for stream in streams), "every clean end")
    assert {stream.status for stream in streams} == {200}
    assert {stream.reset for stream in streams} == {None}
    for stream in streams:
        assert stream.headers["x-accel-buffering"] == "no"


def test_who_leaves_one_stream_of_a_connection_ends_its_request_upstream_only(service: Service, browser: Http2):
    staying, leaving = (service.upstream.by_hand() for _ in range(2))
    stays, leaves = (browser.send("GET", f"/v1{path}", {"accept": "text/event-stream"}) for path in (staying, leaving))
    exchanges = [service.upstream.next(path) for path in (staying, leaving)]
    for ex in exchanges:
        begun(ex)
        ex.send(b"data: 1\n\n")
    browser.until(lambda: bool(stays.body and leaves.body), "both first events")
    browser.leave(leaves)
    exchanges[1].wait_gone()  # long before the next heartbeat would notice
    exchanges[0].send(b"data: still here\n\n")
    browser.until(lambda: stays.body.endswith(b"data: still here\n\n"), "the other stream's event")
    exchanges[0].end()
    browser.until(lambda: stays.ended, "its clean end")


def test_a_cut_stream_does_not_end_cleanly_over_http2_either(service: Service, browser: Http2):
    path = service.upstream.by_hand()
    stream = browser.send("GET", f"/v1{path}", {"accept": "text/event-stream"})
    ex = service.upstream.next(path)
    begun(ex)
    ex.send(b"data: half an ev")
    browser.until(lambda: stream.body == b"data: half an ev", "what came")
    ex.abort()
    browser.until(lambda: stream.ended or stream.reset is not None, "an end")
    assert not stream.ended
    assert stream.reset is not None


def test_a_page_over_http2_is_of_the_relays_own_origin(service: Service, browser: Http2):
    """Host is right without a Host header: HTTP/2 has :authority."""
    path = service.upstream.serve(lambda ex: ex.reply(b"{}"))
    own = browser.send("GET", f"/v1{path}", {"origin": f"https://{browser._authority}"})
    foreign = browser.send("GET", f"/v1{path}", {"origin": "https://evil.example"})
    browser.until(lambda: own.ended and foreign.ended, "both answers")
    assert (own.status, foreign.status) == (200, 403)


def test_both_spellings_of_http2_say_the_same():
    new = (REPO / "nginx/snippets/listen-http2-1.25.1.conf").read_text()
    old = (REPO / "nginx/snippets/listen-http2.conf").read_text()
    listens = [re.findall(r"^listen (.*);", text, re.MULTILINE) for text in (old, new)]
    assert [each.replace(" http2", "") for each in listens[0]] == listens[1]
    assert all(" ssl http2" in each for each in listens[0])
    assert "\nhttp2 on;" in new
    assert not re.search(r"^http2", old, re.MULTILINE)


# --- TLS, and plain HTTP


def test_http1_over_tls_has_hsts_once_and_only_our_own(service: Service, front: Front, tls: Nginx):
    path = service.upstream.serve(
        lambda ex: ex.reply(b"{}", headers=[("Strict-Transport-Security", "max-age=1; includeSubDomains; preload")])
    )
    with Connection(tls.port, tls=front.tls()) as connection:
        response = connection.request("GET", f"/v1{path}", {"Host": NAME})
        assert response.status == 200
        assert response.all("Strict-Transport-Security") == [b"max-age=31536000"]
        (ex,) = service.upstream.seen(path)
        assert ex.all("X-Forwarded-Proto") == []


@pytest.mark.parametrize(
    ("newest", "ciphers", "accepted"),
    [
        pytest.param(ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", False, id="TLS 1.1"),
        pytest.param(ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM", True, id="TLS 1.2"),
        pytest.param(ssl.TLSVersion.TLSv1_2, "AES128-SHA:AES128-GCM-SHA256:@SECLEVEL=0", False, id="no secrecy"),
        pytest.param(ssl.TLSVersion.TLSv1_3, "ECDHE+AESGCM", True, id="TLS 1.3"),
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning")
def test_which_tls_is_spoken(
    front: Front, tls: Nginx, newest: ssl.TLSVersion, ciphers: str, accepted: bool, monkeypatch: pytest.MonkeyPatch
):
    context = front.tls()
    context.minimum_version = min(newest, ssl.TLSVersion.TLSv1_2)
    context.maximum_version = newest
    context.set_ciphers(ciphers)
    if accepted:
        Connection(tls.port, tls=context).close()
    else:
        with pytest.raises(ssl.SSLError):
            Connection(tls.port, tls=context)


def plain(front: Front, target: str) -> http.client.HTTPResponse:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(front.plain))
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: relay.example.com\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(sock)
        response.begin()
        response.text = response.read().decode()  # type: ignore[attr-defined]
        return response


def test_a_key_sent_in_the_clear_is_an_error_and_a_persons_visit_is_led_on(front: Front, tls: Nginx):
    refused = plain(front, "/v1/models")
    assert (refused.status, json.loads(refused.text)["error"]["code"]) == (403, "forbidden")
    assert refused.headers["Strict-Transport-Security"] is None  # RFC 6797 section 7.2
    led = plain(front, "/")
    assert (led.status, led.headers["Location"]) == (301, "https://relay.example.com/")
    assert plain(front, "/.well-known/acme-challenge/none").status == 404


def test_metrics_are_not_to_be_had_over_tls(front: Front, tls: Nginx):
    for path, status in (("/health/live", 200), ("/metrics", 404), ("/streams", 404)):
        with Connection(tls.port, tls=front.tls()) as connection:
            assert connection.request("GET", path, {"Host": NAME}).status == status


# --- Limits for each address


def test_an_address_that_has_too_much_open_is_told_and_others_go_on(service: Service, front: Front, tmp_path: Path):
    four = {"limit_conn relay_address 256": "limit_conn relay_address 4"}
    with front.up(service, tmp_path / "plain", four) as proxy:
        path = service.upstream.by_hand()
        with Http2(proxy.port, front.tls("h2")) as connection:
            streams = [connection.send("GET", f"/v1{path}", {"accept": "text/event-stream"}) for _ in range(4)]
            exchanges = [service.upstream.next(path) for _ in streams]
            fifth = connection.send("GET", f"/v1{path}")
            connection.until(lambda: fifth.ended, "the refusal")
            assert fifth.status == 429
            assert fifth.headers["content-type"] == "application/json"
            assert int(fifth.headers["retry-after"]) > 0
            assert json.loads(bytes(fifth.body))["error"]["code"] == "too_many_connections"

            with socket.create_connection(("127.0.0.1", proxy.port), DEADLINE, ("127.0.0.2", 0)) as other:
                wrapped = front.tls().wrap_socket(other, server_hostname=NAME)
                wrapped.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert wrapped.recv(100).startswith(b"HTTP/1.1 200")
                wrapped.close()

            for ex in exchanges:
                ex.reply(b"{}")
            connection.until(lambda: all(stream.ended for stream in streams), "the four")
            again = connection.send("GET", "/health/live")
            connection.until(lambda: again.ended, "a request after that")
            assert again.status == 200


# --- auth_request


@dataclass
class Guarded:
    """The relay behind an nginx that asks a shop about every stream."""

    shop: Upstream
    proxy: Nginx
    upstream: Upstream


def judge(ex: Exchange) -> None:
    """A shop that knows one session."""
    if b"session=good" in (ex.header("Cookie") or b""):
        ex.reply(b"", 204, "No Content", framing="none")
    elif ex.header("Cookie"):
        ex.reply(b"<h1>not you</h1>", 403, "Forbidden", [("Content-Type", "text/html")])
    else:
        ex.reply(b"", 401, "Unauthorized", [("WWW-Authenticate", 'Bearer realm="shop"')])


@pytest.fixture(scope="module")
def guarded() -> Iterator[Guarded]:
    env = {"RELAY_UPSTREAM_KEY": "the-key", "RELAY_ALLOW": "*", "RELAY_ALLOW_ANONYMOUS": "on"}
    asks = {"include snippets/relay-proxy.conf;": "auth_request /.relay-auth; include snippets/relay-proxy.conf;"}
    with (
        Upstream() as upstream,
        Upstream() as shop,
        servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **env}) as relay,
        servers.nginx(
            relay.port,
            relay.admin_port,
            "include snippets/auth-request.conf;",
            extra_http=f"upstream shop {{ server 127.0.0.1:{shop.port}; }}",
            replace=asks,
        ) as proxy,
    ):
        shop.serve(judge, "/relay-auth")
        yield Guarded(shop, proxy, upstream)


GOOD = {"Cookie": "session=good", "Authorization": "Bearer of-the-shop", "Content-Type": "application/json"}


@pytest.mark.parametrize("body", [b'{"stream": true}', [b'{"stream"', b": true}"]], ids=["length", "chunked"])
def test_the_shop_is_asked_and_the_relay_carries_the_stream(guarded: Guarded, body: bytes | list[bytes]):
    whole = body if isinstance(body, bytes) else b"".join(body)
    path = guarded.upstream.by_hand()
    asked = len(guarded.shop.seen())
    with Connection(guarded.proxy.port) as connection:
        connection.send("POST", f"/v1{path}?prompt=a-secret", GOOD, body)
        ex = guarded.upstream.next(path)
        assert (ex.body, ex.target) == (whole, f"{path}?prompt=a-secret".encode())
        assert ex.all("Authorization") == [b"Bearer the-key"]
        assert ex.all("Cookie") == []
        begun(ex)
        ex.send(b"data: 1\n\n")
        response = connection.read_head()
        assert response.read_event() == b"data: 1\n\n"

        (question,) = guarded.shop.seen()[asked:]
        assert question.finished.wait(DEADLINE)  # no worker of the shop is held by the open stream
        assert question.body == b""
        assert (question.method, question.target) == (b"GET", b"/relay-auth")
        assert question.all("X-Original-URI") == [f"/v1{path}".encode()]
        assert question.all("X-Original-Method") == [b"POST"]
        assert question.all("X-Forwarded-For") == [b"127.0.0.1"]
        assert question.all("Content-Length") == question.all("Transfer-Encoding") == []

        ex.end()
        assert response.finish() == (b"data: 1\n\n", "clean", "last chunk")


@pytest.mark.parametrize(
    ("cookie", "status", "code", "challenge"),
    [
        pytest.param(None, 401, "unauthorized", b'Bearer realm="shop"', id="nobody"),
        pytest.param("session=bad", 403, "forbidden", None, id="a stranger"),
    ],
)
def test_whom_the_shop_does_not_know_gets_its_status_as_json(
    guarded: Guarded, cookie: str | None, status: int, code: str, challenge: bytes | None
):
    before = len(guarded.upstream.seen())
    headers = {"Cookie": cookie} if cookie else {}
    response = request(guarded.proxy.port, "POST", "/v1/chat/completions", headers, b'{"stream": true}')
    assert response.status == status
    assert response.header("Content-Type") == b"application/json"
    assert response.header("WWW-Authenticate") == challenge
    assert response.header("x-should-retry") is None  # nothing was billed
    assert json.loads(response.finish().data)["error"]["code"] == code
    assert len(guarded.upstream.seen()) == before


def test_a_client_can_neither_ask_for_the_shops_word_nor_forge_it(guarded: Guarded):
    asked = len(guarded.shop.seen())
    assert request(guarded.proxy.port, "GET", "/.relay-auth", GOOD).status == 404
    assert len(guarded.shop.seen()) == asked
    forged = {"X-Original-URI": "/harmless", "X-Original-Method": "HEAD", "X-Forwarded-For": "6.6.6.6"}
    assert request(guarded.proxy.port, "DELETE", "/v1/files/x", forged).status == 401
    question = guarded.shop.seen()[-1]
    assert question.all("X-Original-URI") == [b"/v1/files/x"]
    assert question.all("X-Original-Method") == [b"DELETE"]
    assert question.all("X-Forwarded-For") == [b"127.0.0.1"]


def test_probes_need_no_session(guarded: Guarded):
    assert request(guarded.proxy.port, "GET", "/health/live").status == 200


@pytest.mark.parametrize("answer", ["down", "broken", "redirect"])
def test_without_a_yes_nothing_begins(guarded: Guarded, answer: str):
    """A shop that is away, fails, or sends to its login page."""
    before = len(guarded.upstream.seen())
    if answer == "down":
        guarded.shop.serve(lambda ex: ex.reset(), "/relay-auth")
    elif answer == "broken":
        guarded.shop.serve(lambda ex: ex.reply(b"", 503, "Service Unavailable"), "/relay-auth")
    else:
        guarded.shop.serve(lambda ex: ex.reply(b"", 302, "Found", [("Location", "/login")]), "/relay-auth")
    try:
        response = request(guarded.proxy.port, "POST", "/v1/chat/completions", GOOD, b"{}")
        assert response.status == 500
        assert json.loads(response.finish().data)["error"]["code"] in ("proxy_error", "relay_unreachable")
        assert len(guarded.upstream.seen()) == before
    finally:
        guarded.shop.serve(judge, "/relay-auth")
