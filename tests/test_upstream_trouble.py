"""Trouble on the way to the upstream: slow, dead, half-answered and misnamed.

Beside tests/test_upstream_way.py, with an exchange of the test's own process where no server is needed.
"""

from __future__ import annotations

import contextlib
import errno
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
from harness.client import request
from harness.upstream import Upstream as Answering
from harness.upstream import deaf
from test_upstream_connections import Proxy
from test_upstream_way import BODY, address, answer, listening, read_head

from relay import errors
from relay.cli.doctor import probe
from relay.settings import Settings
from relay.stream.waiting import OTHER, threads
from relay.upstream import connect, dns, exchange, faults
from relay.upstream.connect import Peer
from relay.upstream.endpoint import Upstream
from relay.upstream.pool import Connection
from relay.wire import http1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.authority import Authority


@pytest.fixture(scope="module")
def context(authority: Authority) -> ssl.SSLContext:
    return authority.issue("server", "DNS:localhost,IP:127.0.0.1")


def upstream_at(port: int, scheme: str = "http", **settings: str) -> Upstream:
    url = f"{scheme}://localhost:{port}"
    return Upstream(Settings.from_mapping({"RELAY_UPSTREAM_URL": url, **settings}), url)


def until(done: Callable[[], bool]) -> None:
    by = time.monotonic() + 20
    while not done():
        assert time.monotonic() < by
        time.sleep(0.01)


# --- Sending


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_head_that_dribbles_does_not_move_the_clock_of_sending(
    tls: bool, authority: Authority, context: ssl.SSLContext
) -> None:
    def dribble(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(int(DEADLINE / 0.05)):
            sock.sendall(b"x")
            time.sleep(0.05)

    with listening(dribble, context if tls else None) as port:
        settings = {"RELAY_SEND_TIMEOUT": "1s", "RELAY_UPSTREAM_CA": str(authority.certificate)}
        ours = upstream_at(port, "https" if tls else "http", **settings).exchange("POST", "/x", None, [], BODY)
        with pytest.raises(errors.SendTimeout, match="RELAY_SEND_TIMEOUT"):
            ours.send()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_the_kernel_is_as_patient_as_the_clock_of_sending_and_no_more_so_afterwards(
    tls: bool, authority: Authority, context: ssl.SSLContext
) -> None:
    """TCP_USER_TIMEOUT ends a connection whose window is closed, too."""
    go_on = threading.Event()

    def serve(sock: socket.socket) -> None:
        got = read_head(sock)
        go_on.wait(DEADLINE)
        while len(got) < len(BODY):
            got += sock.recv(65536)
        answer(sock, b"ok")
        sock.recv(1)

    with listening(serve, context if tls else None) as port:
        settings = {"RELAY_SEND_TIMEOUT": "90s", "RELAY_UPSTREAM_CA": str(authority.certificate)}
        ours = upstream_at(port, "https" if tls else "http", **settings).exchange("POST", "/x", None, [], BODY)
        sending = threading.Thread(target=ours.send)
        sending.start()
        by = time.monotonic() + DEADLINE
        while not ours.connected and time.monotonic() < by:
            time.sleep(0.01)
        seen = set()
        while 90_000 not in seen and time.monotonic() < by:
            seen.add(ours.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
        assert 90_000 in seen
        go_on.set()
        sending.join(DEADLINE)
        until(ours.read_head)
        assert ours.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000
        ours.close()


@pytest.mark.parametrize("reused", [True, False], ids=["reused", "new"])
@pytest.mark.parametrize("size", [2, len(BODY)], ids=["short", "long"])
def test_only_a_reused_connection_that_ends_at_once_may_be_tried_again(reused: bool, size: int) -> None:
    def hang_up(sock: socket.socket) -> None:
        sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with listening(hang_up) as port:
        upstream = upstream_at(port)
        if reused:
            upstream.put(Connection(socket.create_connection(("127.0.0.1", port))))
        ours = upstream.exchange("POST", "/x", None, [], b"x" * size)

        def ask() -> None:
            ours.send()
            until(ours.read_head)

        with pytest.raises(errors.UpstreamFailed, match="hung up") as failure:
            ask()
        assert failure.value.may_retry is reused
        ours.close()


def test_what_is_left_of_a_request_that_was_sent_in_part_follows() -> None:
    """A full send buffer is no hang-up."""

    class Taking:
        """A socket that takes ten bytes at first."""

        def __init__(self, sock: socket.socket) -> None:
            self._real = sock
            self.first = True

        def send(self, data: Any) -> int:
            part, self.first = (data[:10] if self.first else data), False
            return self._real.send(part)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    with Answering(lambda ex: ex.reply(ex.body)) as answering:
        upstream = upstream_at(answering.port)
        sock = socket.create_connection(("127.0.0.1", answering.port))
        upstream.put(Connection(Taking(sock)))
        ours = upstream.exchange("POST", "/x", None, [], b"whole")
        assert ours.send_at_once() is False
        ours.send()
        until(ours.read_head)
        ours.close()
        sock.close()
        assert [ex.body for ex in answering.seen()] == [b"whole"]


# --- Addresses


def test_the_last_address_has_its_turn_within_a_short_time(names: list[Any]) -> None:
    with deaf() as one, deaf() as two, listening(lambda sock: answer(sock, b"")) as port:
        names += [address(one), address(two), address(port)]
        with connect.connect(Peer("three.example", 1), None, within=0.3) as sock:
            assert sock.getpeername()[1] == port


def test_an_address_without_tls_comes_last_and_the_name_is_asked_again(
    names: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []
    monkeypatch.setattr(dns, "forget", lambda host, _port: forgotten.append(host))
    with listening(lambda sock: answer(sock, b"")) as wrong, listening(lambda sock: answer(sock, b"")) as other:
        names += [address(wrong), address(other)]
        with pytest.raises(ssl.SSLError):
            connect.connect(Peer("two.example", 1, connect.tls_context(None, None)), None, within=DEADLINE)
        assert connect._in_turn(names)[0] == address(other)
        assert forgotten == ["two.example"]


@pytest.mark.parametrize(("waited", "last"), [(1.0, True), (0.0, False)], ids=["after-a-while", "at-once"])
def test_who_gives_up_doubts_an_address_that_has_had_its_time(names: list[Any], waited: float, last: bool) -> None:
    """A greenlet is ended from outside when the connect timeout has passed, and when the client has left."""
    names += [address(1), address(2)]
    connect._doubt(KeyboardInterrupt(), {address(1): time.monotonic() - waited})
    assert (connect._in_turn(names)[0] == address(2)) is last


# --- Proxies


class SecureProxy(Proxy):
    """A forward proxy that speaks TLS."""

    context: ssl.SSLContext

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            secure = self.context.wrap_socket(client, server_side=True)
            inner, outer = socket.socketpair()
            self._sockets += [secure, inner, outer]
            self._start(_both_ways, secure, outer)
            super()._serve(inner)


def _both_ways(secure: Any, plain: socket.socket) -> None:
    """Between TLS and a plain socket, in one thread: OpenSSL does not read and write at the same time."""
    import select

    secure.settimeout(0)
    with contextlib.suppress(OSError):
        while True:
            readable, _, _ = select.select([secure, plain], [], [], DEADLINE)
            if secure in readable:
                try:
                    while data := secure.recv(65536):
                        plain.sendall(data)
                    return
                except ssl.SSLWantReadError:
                    pass
            if plain in readable:
                data = plain.recv(65536)
                if not data:
                    secure.settimeout(DEADLINE)
                    secure.unwrap()
                    return
                secure.settimeout(DEADLINE)
                secure.sendall(data)
                secure.settimeout(0)


def test_tls_goes_through_a_proxy_with_tls_whole(authority: Authority, context: ssl.SSLContext) -> None:
    """Uploads too, which the inner layer must not lose where the outer takes no more."""
    proxy = SecureProxy()
    proxy.context = context
    with proxy, Answering(lambda ex: ex.reply(ex.body), tls=context, host="localhost") as upstream:
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_UPSTREAM_CA": str(authority.certificate),
            "RELAY_UPSTREAM_PROXY": f"https://localhost:{proxy.port}",
        }
        with servers.gunicorn(env) as relay:
            for body in (b"short", BODY, b"short again"):
                response = request(relay.port, "POST", "/v1/x", {}, body)
                received = response.finish()
                assert (response.status, received.data == body, received.ended) == (200, True, "clean")
    assert len(proxy.heads) == 1
    assert proxy.heads[0].startswith(b"CONNECT ")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_does_not_answer_is_named(scheme: str) -> None:
    with deaf() as port:
        env = {
            "RELAY_UPSTREAM_URL": f"{scheme}://upstream.example/v1",
            "RELAY_UPSTREAM_PROXY": f"http://127.0.0.1:{port}",
            "RELAY_CONNECT_TIMEOUT": "0.5s",
        }
        with servers.gunicorn(env) as relay:
            response = request(relay.port, "POST", "/v1/x", {}, b"{}")
            error = json.loads(response.finish().data)["error"]
            assert (response.status, error["code"]) == (504, "connect_timeout")
            assert "RELAY_UPSTREAM_PROXY" in error["message"]


def _unverified(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = code, "it is so"
    return error


@pytest.mark.parametrize(
    ("code", "says", "not_says"),
    [
        pytest.param(62, "RELAY_UPSTREAM_URL", "RELAY_UPSTREAM_CA", id="other-name"),
        pytest.param(64, "RELAY_UPSTREAM_URL", "RELAY_UPSTREAM_CA", id="other-address"),
        pytest.param(20, "RELAY_UPSTREAM_CA", "RELAY_UPSTREAM_URL", id="unknown-authority"),
        pytest.param(10, "it is so", "RELAY_", id="expired"),
    ],
)
def test_a_certificate_is_refused_with_what_helps(code: int, says: str, not_says: str) -> None:
    message = faults.not_connected(_unverified(code), 5.0).message
    assert says in message
    assert not_says not in message


def test_a_proxys_tls_alert_is_not_about_the_certificate_for_the_upstream() -> None:
    error = ssl.SSLError(1, "alert")
    error.reason = "TLSV1_ALERT_UNKNOWN_CA"
    message = faults.not_connected(connect.OfTheProxy(error), 5.0).message
    assert "proxy" in message
    assert "RELAY_UPSTREAM_CERT" not in message


@pytest.mark.parametrize(
    ("status", "field", "proxys"),
    [
        pytest.param(503, "X-Squid-Error: ERR_DNS_FAIL 0", True, id="squid-no-such-name"),
        pytest.param(502, "Proxy-Status: proxy.example; error=connection_refused", True, id="proxy-status"),
        pytest.param(504, "X-Squid-Error: ERR_READ_TIMEOUT 0", False, id="it-had-the-request"),
        pytest.param(502, "Via: 1.1 squid", False, id="the-upstreams"),
        pytest.param(200, "Proxy-Status: a; error=dns_error", False, id="no-failure"),
    ],
)
def test_a_proxy_that_reached_nobody_is_not_told_as_the_upstream(status: int, field: str, proxys: bool) -> None:
    head = http1.parse_head(f"HTTP/1.1 {status} X\r\n{field}\r\nContent-Length: 0\r\n\r\n".encode(), "POST")
    error = faults.of_proxy(head)
    assert (error is not None) is proxys
    assert error is None or ("the proxy" in error.message and str(status) in error.message)


# --- Linear time


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def test_a_trailer_that_comes_byte_by_byte_takes_linear_time() -> None:
    def feed(length: int) -> None:
        framing = http1.Chunked()
        framing.feed(b"1\r\nx\r\n0\r\n")
        for byte in b"A: " + b"b" * length + b"\r\nB: c\r\n\r\n":
            framing.feed(bytes([byte]))
        assert framing.done

    feed(1000)
    assert _cpu(lambda: feed(60_000)) < 20 * max(_cpu(lambda: feed(6000)), 0.005)


def test_a_trailer_has_a_bound_in_pieces_too() -> None:
    framing = http1.Chunked()
    framing.feed(b"0\r\nA: ")
    taken = 0
    with contextlib.suppress(http1.BadResponse):
        while taken < http1.MAX_TRAILER + 10:
            framing.feed(b"b")
            taken += 1
    assert taken <= http1.MAX_TRAILER


@pytest.mark.parametrize("what", [b"x", b"HTTP/1.1 103 Early Hints\r\n\r\n"], ids=["a-head", "interim-answers"])
def test_the_doctor_waits_for_no_head_without_end(what: bytes) -> None:
    def dribble(sock: socket.socket) -> None:
        read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nX-Long: " if what == b"x" else what)
        while True:
            sock.sendall(what)
            time.sleep(0.05)

    with listening(dribble) as port, pytest.raises(probe.Unreachable):
        probe.get(probe.Target("http", "127.0.0.1", port, ""), "/", [], patience=1.0)


# --- Forks


def test_a_forked_process_waits_for_no_thread_that_it_does_not_have() -> None:
    """One that looks a name up or probes at that moment is in the parent only."""
    program = """
import os, socket, sys, threading
from relay.settings import Settings
from relay.upstream import dns
from relay.upstream.endpoint import Upstream
from relay.upstream.health import Health
real, stuck, entered = socket.getaddrinfo, threading.Event(), threading.Event()
def hangs(*args):
    entered.set()
    stuck.wait()
    return real(*args)
socket.getaddrinfo = hangs
url = sys.argv[1]
settings = Settings.from_mapping({"RELAY_UPSTREAM_URL": url, "RELAY_HEALTH_TTL": "0"})
upstream = Upstream(settings, url)
health = Health("relay", settings, lambda: upstream)
threading.Thread(target=health.known, daemon=True).start()
assert entered.wait(10)
dns._lock.acquire()
health._lock.acquire()
child = os.fork()
if child == 0:
    socket.getaddrinfo = real
    os._exit(0 if health.known().status == "ok" else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    with Answering(lambda ex: ex.reply(b"{}"), host="localhost") as upstream:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, upstream.base_url],
            cwd=REPO, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_a_forked_process_has_a_watchdog_of_its_own() -> None:
    """Under plain threads it frees the server from writes that are stuck."""
    program = """
import os, socket, threading
from relay.stream.waiting import threads
ours, _theirs = socket.socketpair()
kept = threads.ThreadWaiter(ours, lambda: 0.05)
assert threads._watchdog._running
threads._watchdog._lock.acquire()
child = os.fork()
if child == 0:
    looked = threading.Event()
    def look():
        looked.set()
        return 0.05
    again = threads.ThreadWaiter(ours, look)
    looked.clear()
    os._exit(0 if looked.wait(10) else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=REPO, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_thread_waits_for_a_word_without_a_deadline() -> None:
    """As a stream does while its request is being sent, on a server that shows no client's socket."""
    waiter = threads.ThreadWaiter(None, lambda: 1.0)
    threading.Timer(0.1, waiter.wake).start()
    assert waiter.wait(float("inf")) is OTHER
    waiter.close()


# --- Peers that vanish


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=30)


@pytest.fixture
def far() -> Iterator[tuple[str, Callable[[], None]]]:
    """A network namespace at the other end of a cable: its name, and what pulls the cable out."""
    here, there = f"rl{os.getpid() % 100_000}a", f"rl{os.getpid() % 100_000}b"
    space = f"relay-tests-{os.getpid()}"
    try:
        _ip("netns", "add", space)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"network namespaces need root and iproute2: {error}")
    try:
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", space)
        _ip("addr", "add", "198.18.77.1/30", "dev", here)
        _ip("link", "set", here, "up")
        _ip("-n", space, "addr", "add", "198.18.77.2/30", "dev", there)
        _ip("-n", space, "link", "set", there, "up")
        yield space, lambda: _ip("-n", space, "addr", "flush", "dev", there)
    finally:
        _ip("netns", "del", space)
        subprocess.run(["ip", "link", "del", here], check=False, capture_output=True, timeout=30)


_FAR = """
import socket
listener = socket.create_server(("198.18.77.2", 8000))
print("ready", flush=True)
kept = []
while True:
    sock, _ = listener.accept()
    kept.append(sock)
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n1\\r\\nx\\r\\n")
"""


@pytest.mark.parametrize("when", ["mid-stream", "pooled"])
def test_a_peer_that_vanishes_is_noticed(
    far: tuple[str, Callable[[], None]], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's watch, a tenth as patient as it is: after a second of silence, or of nothing acknowledged."""
    monkeypatch.setattr(connect, "_KEEPALIVE_IDLE", 1)
    monkeypatch.setattr(connect, "_KEEPALIVE_INTERVAL", 1)
    monkeypatch.setattr(connect, "UNACKNOWLEDGED", 3.0)
    space, vanish = far
    with subprocess.Popen(
        ["ip", "netns", "exec", space, sys.executable, "-c", _FAR], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            url = "http://198.18.77.2:8000"
            upstream = Upstream(Settings.from_mapping({"RELAY_UPSTREAM_URL": url}), url)
            ours = upstream.exchange("POST", "/x", None, [], b"{}")
            if when == "pooled":
                upstream.put(upstream.connect(5.0))
                vanish()
                assert ours.send_at_once()
            else:
                ours.send()
                until(ours.read_head)
                vanish()
            expected = errors.UpstreamFailed if when == "pooled" else errors.UpstreamCut
            with pytest.raises(expected) as failure:
                until(ours.read_head if when == "pooled" else lambda: ours.read() == b"")
            if when == "pooled":
                assert "vanished" in failure.value.message
                assert failure.value.may_retry is False
            ours.close()
        finally:
            server.kill()


@pytest.mark.parametrize("code", sorted(exchange._VANISHED))
def test_a_dead_connection_is_not_told_as_a_hang_up(code: int) -> None:
    ours = upstream_at(9).exchange("GET", "/x", None, [], None)
    assert "vanished" in ours._broke(OSError(code, os.strerror(code))).message
    assert "hung up" in ours._broke(OSError(errno.ECONNRESET, "reset")).message
