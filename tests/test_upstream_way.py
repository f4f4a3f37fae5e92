"""The way to the upstream: each phase has a clock of its own, a dead address is not the end, and no fault is told of
the wrong one.

Upstreams here are sockets that do one thing wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from harness import DEADLINE, REPO, servers
from harness.authority import Authority
from harness.client import Connection, request
from harness.upstream import Upstream, deaf

from relay import errors
from relay.upstream import connect, pool
from relay.upstream.connect import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.upstream import Exchange

BODY = bytes(range(256)) * 32 * 1024  # 8 MiB
PATIENT = {"RELAY_CONNECT_TIMEOUT": "1s", "RELAY_HEALTH_TTL": "1h"}


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server whose connections are each handled by `serve`; small buffers, so that a client soon has to wait."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def handle(plain: socket.socket) -> None:
            with contextlib.suppress(OSError):
                sock = context.wrap_socket(plain, server_side=True) if context else plain
                with sock:
                    sock.settimeout(DEADLINE)
                    serve(sock)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def read_head(sock: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    return data.partition(b"\r\n\r\n")[2]


def answer(sock: socket.socket, body: bytes) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


# --- Sending has a clock of its own


def slowly(sock: socket.socket) -> None:
    """Reads 4 MB/s, so that 8 MiB take longer than connecting may."""
    got = read_head(sock)
    while len(got) < len(BODY):
        got += sock.recv(40_000)
        time.sleep(0.01)
    answer(sock, b"%d %r" % (len(got), got == BODY))


def after_a_pause(sock: socket.socket) -> None:
    got = read_head(sock)
    time.sleep(2.5)
    while len(got) < len(BODY):
        got += sock.recv(65536)
    answer(sock, b"%d %r" % (len(got), got == BODY))


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("serve", [slowly, after_a_pause])
def test_an_upload_may_take_longer_than_connecting(
    serve: Callable[[socket.socket], None], tls: bool, authority: Authority
) -> None:
    context = authority.issue("server", "DNS:localhost") if tls else None
    with listening(serve, context) as port:
        url = f"{'https' if tls else 'http'}://localhost:{port}/v1"
        env = {"RELAY_UPSTREAM_URL": url, "RELAY_UPSTREAM_CA": str(authority.certificate), **PATIENT}
        with servers.gunicorn(env) as relay:
            response = request(relay.port, "POST", "/v1/x", {}, BODY)
            assert response.finish().data == b"%d True" % len(BODY)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_an_upstream_that_takes_nothing_is_given_up_and_named(tls: bool, authority: Authority) -> None:
    over = threading.Event()

    def stop(sock: socket.socket) -> None:
        read_head(sock)
        over.wait(DEADLINE)

    with listening(stop, authority.issue("server", "DNS:localhost") if tls else None) as port:
        url = f"{'https' if tls else 'http'}://localhost:{port}/v1"
        env = {"RELAY_UPSTREAM_URL": url, "RELAY_UPSTREAM_CA": str(authority.certificate), "RELAY_SEND_TIMEOUT": "1s"}
        with servers.gunicorn(env) as relay:
            response = request(relay.port, "POST", "/v1/x", {}, BODY)
            error = json.loads(response.finish().data)["error"]
            assert (response.status, error["code"]) == (504, "send_timeout")
            assert "RELAY_SEND_TIMEOUT" in error["message"]
            assert '"reason": "send_timeout"' in relay.log()
        over.set()


# --- An answer before the request is all sent


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("then", ["stops-reading", "closes", "resets"])
@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["at-once", "after-a-100"])
def test_an_answer_comes_through_although_the_upstream_has_not_the_whole_request(
    before: bytes, then: str, tls: bool, authority: Authority
) -> None:
    over = threading.Event()

    def refuse(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(before)
        sock.sendall(b"HTTP/1.1 413 Too Much\r\nContent-Length: 8\r\nRetry-After: 7\r\n\r\ntoo much")
        if then == "stops-reading":
            over.wait(DEADLINE)
            return
        time.sleep(0.2)  # what was sent must have arrived before the reset, which overtakes it
        if then == "resets":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with listening(refuse, authority.issue("server", "DNS:localhost") if tls else None) as port:
        url = f"{'https' if tls else 'http'}://localhost:{port}/v1"
        env = {"RELAY_UPSTREAM_URL": url, "RELAY_UPSTREAM_CA": str(authority.certificate), **PATIENT}
        with servers.gunicorn(env) as relay:
            for _ in range(2):  # the second has a connection of its own
                response = request(relay.port, "POST", "/v1/x", {}, BODY)
                assert response.finish().data == b"too much"
                assert (response.status, response.header("Retry-After")) == (413, b"7")
    over.set()


# --- Several addresses


def address(port: int, host: str = "127.0.0.1") -> Any:
    return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)


def test_a_second_address_is_tried_while_the_first_is_silent(names: list[Any]) -> None:
    with deaf() as silent, listening(lambda sock: answer(sock, b"")) as port:
        names += [address(silent), address(port)]
        with connect.connect(Peer("two.example", 1), None, within=DEADLINE) as sock:
            assert sock.getpeername()[1] == port
        began = time.monotonic()
        names[:] = [address(silent), address(port)]
        with connect.connect(Peer("two.example", 1), None, within=DEADLINE) as sock:
            assert sock.getpeername()[1] == port
        # The silent one comes last now, so that nobody waits for it.
        assert connect._in_turn(names)[0] == address(port)
        assert time.monotonic() - began < DEADLINE


@pytest.mark.parametrize("dead", ["127.0.0.1", "255.255.255.255"], ids=["refused", "unreachable"])
def test_an_address_that_fails_at_once_is_passed_over(names: list[Any], dead: str) -> None:
    with socket.socket() as taken, listening(lambda sock: answer(sock, b"")) as port:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        names += [address(taken.getsockname()[1], dead), address(port)]
        with connect.connect(Peer("two.example", 1), None, within=DEADLINE) as sock:
            assert sock.getpeername()[1] == port


def test_when_no_address_answers_the_last_failure_is_raised(names: list[Any]) -> None:
    with socket.socket() as one, socket.socket() as two, deaf() as silent:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        names += [address(one.getsockname()[1]), address(two.getsockname()[1])]
        with pytest.raises(ConnectionRefusedError):
            connect.connect(Peer("two.example", 1), None, within=DEADLINE)
        names[:] = [address(silent), address(one.getsockname()[1])]
        with pytest.raises(TimeoutError):
            connect.connect(Peer("two.example", 1), None, within=1.0)


def test_families_take_turns() -> None:
    six = [(socket.AF_INET6, 1, 6, "", (f"::{n}", 1, 0, 0)) for n in range(1, 4)]
    four = [address(1, f"127.0.0.{n}") for n in range(1, 3)]
    assert [each[4][0] for each in connect._in_turn([*six, *four])] == ["::1", "127.0.0.1", "::2", "127.0.0.2", "::3"]
    assert [each[4][0] for each in connect._in_turn([*four, *six])] == ["127.0.0.1", "::1", "127.0.0.2", "::2", "::3"]


@pytest.mark.parametrize("how", ["refused", "timeout", "not-tls"])
def test_a_failed_connection_makes_the_name_be_asked_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it failed: the address may be an old one."""
    asked = []

    def getaddrinfo(_host: str, port: int, *_: object) -> list[Any]:
        asked.append(port)
        return [address(port)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with contextlib.ExitStack() as ends:
        context = None
        if how == "refused":
            taken = ends.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        elif how == "timeout":
            port = ends.enter_context(deaf())
        else:
            port = ends.enter_context(listening(lambda sock: answer(sock, b"")))
            context = connect.tls_context(None, None)
        for _ in range(2):
            with pytest.raises(OSError, match=r".*"):
                connect.connect(Peer("moved.example", port, context), None, within=1.0)
    if how == "not-tls":  # the address was right, and what answers there is another matter
        assert len(asked) >= 1
    else:
        assert asked == [port, port]


# --- Connections that stand idle


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_connection_is_used_again_within_its_limits(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    kept = pool.Pool(8, 15.0)
    connection = pool.Connection(pair[0])
    kept.put(connection)
    now[0] += 14.0
    assert kept.take() is connection
    assert connection.reused
    kept.put(connection)
    now[0] += 16.0
    assert kept.take() is None, "idle for too long"
    assert pair[0].fileno() == -1


def test_a_connection_has_an_age(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    kept = pool.Pool(8, 30.0)
    connection = pool.Connection(pair[0])
    for _ in range(20):
        kept.put(connection)
        now[0] += 14.0
        assert kept.take() is connection
    now[0] += 30.0
    kept.put(connection)
    assert kept.take() is None, "the name may have moved"


@pytest.mark.parametrize("what", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", b""], ids=["bytes", "an-end"])
def test_a_connection_on_which_something_has_arrived_is_dropped(
    pair: tuple[socket.socket, socket.socket], what: bytes
) -> None:
    kept = pool.Pool(8, 15.0)
    kept.put(pool.Connection(pair[0]))
    pair[1].sendall(what) if what else pair[1].close()
    assert kept.take() is None


def test_a_forked_process_has_connections_of_its_own() -> None:
    """Preloading servers and test runners fork after a first request; two processes on one connection mix answers."""
    program = """
import os, sys
from relay.settings import Settings
from relay.upstream.endpoint import Upstream
url = sys.argv[1]
upstream = Upstream(Settings.from_mapping({"RELAY_UPSTREAM_URL": url}), url)
assert upstream.probe("/warm", within=10) == 200
child = os.fork()
who = "child" if child == 0 else "parent"
for _ in range(3):
    assert upstream.probe(f"/{who}", within=10) == 200
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert upstream.probe("/parent", within=10) == 200
"""
    with Upstream(lambda ex: ex.reply(b"{}")) as upstream:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, upstream.base_url],
            cwd=REPO, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        of = {who: {ex.connection for ex in upstream.seen() if ex.path.endswith(who)} for who in ("parent", "child")}
        assert len(of["child"]) == 1
        assert not of["child"] & of["parent"]


def test_the_kernel_watches_for_a_peer_that_is_gone() -> None:
    with (
        listening(lambda sock: answer(sock, b"")) as port,
        connect.connect(Peer("127.0.0.1", port), None, within=DEADLINE) as sock,
    ):
        option = {
            name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT", "TCP_NODELAY")
        }
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert option["TCP_KEEPIDLE"] + option["TCP_KEEPINTVL"] * option["TCP_KEEPCNT"] <= 30
        assert option["TCP_USER_TIMEOUT"] == 25_000
        connect.watch_peer(sock, 60.0)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


# --- Heads


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[Upstream, int]]:
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
        yield upstream, relay.port


@pytest.mark.parametrize(("count", "status"), [(10, 200), (11, 502), (1000, 502)])
@pytest.mark.parametrize("together", [True, False])
def test_interim_answers_are_counted(plain: tuple[Upstream, int], count: int, status: int, together: bool) -> None:
    upstream, port = plain
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"

    def serve(ex: Exchange) -> None:
        with contextlib.suppress(OSError):
            if together:
                ex.raw(early * count)
            else:
                for _ in range(count):
                    ex.raw(early)
            ex.reply(b"{}")

    path = upstream.serve(serve)
    response = request(port, "POST", "/v1" + path, {}, b"{}")
    response.finish()
    assert response.status == status
    upstream.forget(path)


def test_a_head_that_comes_byte_by_byte_is_read(plain: tuple[Upstream, int]) -> None:
    upstream, port = plain
    head = b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 30_000 + b"\r\nContent-Length: 2\r\n\r\n{}"

    def serve(ex: Exchange) -> None:
        for byte in head:
            ex.raw(bytes([byte]))
        ex.finished.set()

    path = upstream.serve(serve)
    response = request(port, "GET", "/v1" + path)
    assert (response.status, response.finish().data) == (200, b"{}")
    upstream.forget(path)


# --- Whose fault it is


def with_client_certificates(authority: Authority) -> ssl.SSLContext:
    context = authority.issue("wants", "DNS:localhost,IP:127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.certificate)
    return context


def client_certificate(authority: Authority) -> Path:
    """A PEM file of a certificate and its key."""
    authority.issue("client", "DNS:client")
    file = authority.folder / "client-both.pem"
    file.write_bytes(b"".join((authority.folder / name).read_bytes() for name in ("client.pem", "client.key")))
    return file


def error_of(port: int, status: int = 502, body: bytes = b"{}") -> dict[str, str]:
    response = request(port, "POST", "/v1/x", {}, body)
    said = response.finish().data
    assert response.status == status, said
    error: dict[str, str] = json.loads(said)["error"]
    return error


def test_an_upstream_that_wants_a_client_certificate(authority: Authority, tmp_path: Path) -> None:
    with Upstream(lambda ex: ex.reply(b"{}"), tls=with_client_certificates(authority)) as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_UPSTREAM_CA": str(authority.certificate)}
        with servers.gunicorn(env) as relay:
            error = error_of(relay.port)
            assert error["code"] == "upstream_certificate"
            assert "RELAY_UPSTREAM_CERT" in error["message"]
        certificate = client_certificate(authority)
        with servers.gunicorn(env | {"RELAY_UPSTREAM_CERT": str(certificate)}) as relay:
            assert request(relay.port, "POST", "/v1/x", {}, b"{}").status == 200
        strangers = client_certificate(Authority(tmp_path))
        with servers.gunicorn(env | {"RELAY_UPSTREAM_CERT": str(strangers)}) as relay:
            error = error_of(relay.port)
            assert (error["code"], "does not accept" in error["message"]) == ("upstream_certificate", True)


@pytest.mark.parametrize("status", [407, 403])
def test_what_the_proxy_says_is_not_the_upstreams(status: int) -> None:
    """A forwarding proxy that wants a login answers in the upstream's place."""
    with Upstream(lambda ex: ex.reply(b"no", status, headers=[("Proxy-Authenticate", "Basic")])) as proxy:
        port = proxy.base_url.rpartition(":")[2].partition("/")[0]
        env = {
            "RELAY_UPSTREAM_URL": "http://upstream.example/v1",
            "RELAY_UPSTREAM_PROXY": f"http://127.0.0.1:{port}",
        }
        with servers.gunicorn(env) as relay:
            if status == 407:
                error = error_of(relay.port)
                assert "RELAY_UPSTREAM_PROXY" in error["message"]
                assert "407" in error["message"]
            else:  # an upstream may say it, too, and nothing tells them apart
                assert request(relay.port, "POST", "/v1/x", {}, b"{}").status == 403
        env = {"RELAY_UPSTREAM_URL": proxy.base_url}
        with servers.gunicorn(env) as relay:
            assert request(relay.port, "POST", "/v1/x", {}, b"{}").status == status


def test_a_proxy_that_is_down_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for url in ("http://upstream.example/v1", "https://upstream.example/v1"):
            proxy = f"http://127.0.0.1:{taken.getsockname()[1]}"
            with servers.gunicorn({"RELAY_UPSTREAM_URL": url, "RELAY_UPSTREAM_PROXY": proxy}) as relay:
                error = error_of(relay.port)
                assert error["code"] == "upstream_unreachable"
                assert "the proxy (RELAY_UPSTREAM_PROXY) cannot be reached" in error["message"]


def test_a_leaving_client_ends_the_wait_for_a_connection() -> None:
    with deaf() as port:
        env = {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{port}/v1", "RELAY_CONNECT_TIMEOUT": "60s"}
        with servers.gunicorn(env) as relay:
            with Connection(relay.port) as connection:
                connection.send("POST", "/v1/x", {}, b"{}")
            relay.wait_log("client_gone", DEADLINE)


def test_no_fault_shows_a_password() -> None:
    from relay.upstream import faults

    error = faults.not_connected(connect.OfTheProxy(ConnectionRefusedError(111, "Connection refused")), 5.0)
    assert isinstance(error, errors.UpstreamUnreachable)
    assert os.strerror(111) in error.message
