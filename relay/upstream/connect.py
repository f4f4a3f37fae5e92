"""A new connection to the upstream: names, addresses, a proxy's tunnel, TLS. Knows no requests and keeps nothing.

Addresses are tried as RFC 8305 says: the next one when the one before has failed or has not answered for a quarter of a
second, IPv6 and IPv4 in turn. One that did not answer is tried last for a while.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import requests
import urllib3
from urllib3.util.ssltransport import SSLTransport

from relay.upstream import dns
from relay.wire import http1

if TYPE_CHECKING:
    from relay.upstream.dns import AddressInfo

#: Seconds until the next address is tried beside one that has not answered (RFC 8305 section 5).
_STAGGER = 0.25
#: Seconds for which an address that failed or did not answer is tried last.
_DEAD = 60.0
_MOST_DEAD = 1000
#: A peer that vanished without a word is noticed after 10 s of silence and three probes 5 s apart, or when what was
# sent has not been acknowledged for as long. Seconds, but the third. With both set, Linux goes by the latter alone.
_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_PROBES = 10, 5, 3
UNACKNOWLEDGED = 25.0
#: What `connect_ex` says of a connection under way (the last one on Windows).
_UNDER_WAY = {0, errno.EINPROGRESS, errno.EALREADY, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}

_dead: dict[tuple[object, ...], float] = {}  # addresses, and until when they come last


class ProxyRefused(OSError):
    """The proxy did not open a tunnel. `status` is what it answered, 0 if that was no HTTP."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the proxy answered {status}")
        self.status = status


class OfTheProxy(Exception):
    """Something failed on the way to the proxy, and not to the upstream; `error` says what."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Peer:
    """A host to connect to. `tls`: the context for it; None: plain."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. `authorization`: the value of its header; empty without user and password."""

    peer: Peer
    authorization: str


def proxy_of(url: str, ca: str | None = None) -> Proxy:
    """The proxy of a URL such as `http://user:password@proxy.example:3128`. `ca`: a PEM bundle to trust besides the
    public authorities, for proxy and upstream may be of different ones."""
    parts = urlsplit(url)
    login = ":".join(requests.utils.get_auth_from_url(url))
    basic = base64.b64encode(login.encode("utf-8")).decode("ascii")
    tls = parts.scheme == "https"
    context = tls_context(None, None) if tls else None
    if context is not None and ca:
        context.load_verify_locations(ca)
    peer = Peer(parts.hostname or "", parts.port or (443 if tls else 80), context)
    return Proxy(peer, f"Basic {basic}" if login != ":" else "")


def tls_context(ca: str | None, certificate: str | None) -> ssl.SSLContext:
    """A context that trusts the PEM bundle `ca` (None: requests' own) and shows the PEM file `certificate`, if any.

    Made once: to load a bundle takes 14 ms, in which the process serves nobody. Raises OSError for an unusable file.
    """
    context = urllib3.util.ssl_.create_urllib3_context()
    # Some builds of Python set it (Debian 12's does): a connection that breaks off would seem to have ended. OpenSSL
    # before 3 does not know it, and says so by itself.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(ca or requests.utils.DEFAULT_CA_BUNDLE_PATH)
    if certificate is not None:
        context.load_cert_chain(certificate, password=_no_password)
    return context


def connect(peer: Peer, proxy: Proxy | None, *, within: float) -> socket.socket:
    """A connection to the upstream, through a tunnel of the proxy if there is one and the peer uses TLS.

    `within`: seconds for all of it. Raises OSError (socket.gaierror, TimeoutError, ssl.SSLError among them),
    ProxyRefused or, for what failed before the proxy was reached, OfTheProxy.
    """
    deadline = time.monotonic() + within
    if proxy is None:
        return _reach(peer, deadline)
    try:
        sock = _reach(proxy.peer, deadline)
    except OSError as error:
        raise OfTheProxy(error) from None
    if peer.tls is None:
        return sock
    with _closed_on_failure(sock):
        _open_tunnel(sock, peer, proxy.authorization, deadline)
    return _over_tls(sock, peer, deadline)


# One host's addresses.


def _reach(peer: Peer, deadline: float) -> socket.socket:
    try:
        addresses = _in_turn(dns.resolve(peer.host, peer.port))
        sock, address = _first_of(addresses, deadline)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # requests are written whole
        watch_peer(sock, UNACKNOWLEDGED)
        if peer.tls is None:
            return sock
        began = time.monotonic()
        try:
            return _over_tls(sock, peer, deadline)
        except BaseException as error:
            _doubt(error, {address: began})
            raise
    except BaseException:  # a caller that gave up waited for a connection, too
        dns.forget(peer.host, peer.port)
        raise


def _in_turn(addresses: list[AddressInfo]) -> list[AddressInfo]:
    """The addresses in the order of trying: families in turn (RFC 8305 section 4), those that seemed dead last."""
    first = addresses[0][0]
    ours = [each for each in addresses if each[0] == first]
    others = [each for each in addresses if each[0] != first]
    mixed = [each for pair in zip(ours, others, strict=False) for each in pair]
    mixed += ours[len(others) :] + others[len(ours) :]
    now = time.monotonic()
    return sorted(mixed, key=lambda each: _dead.get(each[4], 0.0) > now)


def _first_of(addresses: list[AddressInfo], deadline: float) -> tuple[socket.socket, AddressInfo]:
    """A connection to the first of the addresses to which one comes about, and that address."""
    waiting = list(addresses)
    trying: dict[int, tuple[socket.socket, AddressInfo]] = {}
    begun: dict[AddressInfo, float] = {}
    poller = select.poll()
    failure: OSError = TimeoutError("no address answered in time")
    try:
        while waiting or trying:
            if waiting:
                address = waiting.pop(0)
                family, kind, protocol, _, name = address
                sock = socket.socket(family, kind, protocol)
                trying[sock.fileno()] = sock, address
                begun[address] = time.monotonic()
                sock.settimeout(0)
                code = sock.connect_ex(name)
                if code not in _UNDER_WAY:
                    failure = _failed(trying, sock, code)
                    continue
                poller.register(sock.fileno(), select.POLLOUT)
            left = _left(deadline)
            patience = min(_STAGGER, left / (len(waiting) + 1))  # the last one's turn comes, however short the time
            for number, _ in poller.poll(patience * 1000):
                sock, address = trying[number]
                poller.unregister(number)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    del trying[number]
                    _dead.pop(address[4], None)
                    _remember_dead(*(each for _, each in trying.values()))  # slower by the stagger, or gone
                    return sock, address
                failure = _failed(trying, sock, code)
        raise failure
    except BaseException as error:
        _doubt(error, {each: begun[each] for _, each in trying.values()})
        raise
    finally:
        for sock, _ in trying.values():
            sock.close()


def _failed(trying: dict[int, tuple[socket.socket, AddressInfo]], sock: socket.socket, code: int) -> OSError:
    _, address = trying.pop(sock.fileno())
    _remember_dead(address)
    sock.close()
    return OSError(code, os.strerror(code))


def _doubt(error: BaseException, begun: dict[AddressInfo, float]) -> None:
    """Try these addresses last if they have failed, or have had their time before the caller gave up."""
    given_up = not isinstance(error, OSError)
    late = time.monotonic() - _STAGGER
    _remember_dead(*(address for address, began in begun.items() if not given_up or began < late))


def _remember_dead(*addresses: AddressInfo) -> None:
    if len(_dead) > _MOST_DEAD:
        _dead.clear()
    for address in addresses:
        _dead[address[4]] = time.monotonic() + _DEAD


# What goes over a connection before the request.


def _over_tls(sock: socket.socket, peer: Peer, deadline: float) -> socket.socket:
    if peer.tls is None:
        return sock
    with _closed_on_failure(sock):
        sock.settimeout(_left(deadline))
        if isinstance(sock, ssl.SSLSocket):  # TLS to the proxy, and TLS to the upstream within it
            return _TLSWithinTLS(  # type: ignore[return-value]
                sock, peer.tls, server_hostname=peer.host, suppress_ragged_eofs=False
            )
        # An end without TLS's goodbye is a cut (RFC 9112 section 9.8), which Python would take for an end.
        return peer.tls.wrap_socket(sock, server_hostname=peer.host, suppress_ragged_eofs=False)


class _TLSWithinTLS(SSLTransport):
    """urllib3's, where the end that the peer has said is an end and no error, as with one layer."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> int | bytes:
        try:
            return super().recv(buflen, flags)
        except ssl.SSLZeroReturnError:
            return b""


def _open_tunnel(sock: socket.socket, peer: Peer, authorization: str, deadline: float) -> None:
    """Have the proxy open a tunnel (RFC 9110 section 9.3.6). Raises ProxyRefused."""
    host = f"[{peer.host}]" if ":" in peer.host else peer.host
    lines = [f"CONNECT {host}:{peer.port} HTTP/1.1", f"Host: {host}:{peer.port}"]
    if authorization:
        lines.append(f"Proxy-Authorization: {authorization}")
    sock.settimeout(_left(deadline))
    sock.sendall("\r\n".join([*lines, "\r\n"]).encode("latin-1"))
    received = bytearray()
    try:
        while not (length := http1.head_length(received, max(len(received) - 3, 0))):
            sock.settimeout(_left(deadline))
            data = sock.recv(1)  # not a byte of what follows the head: that is the upstream's
            if not data:
                raise ProxyRefused(0)
            received += data
        status = http1.parse_head(bytes(received[:length]), "CONNECT").status
    except http1.BadResponse:
        raise ProxyRefused(0) from None
    if not 200 <= status < 300:
        raise ProxyRefused(status)


def watch_peer(sock: socket.socket, unacknowledged: float) -> None:
    """Have the kernel end a connection whose peer is gone without a word. `unacknowledged`: seconds that what was sent
    may wait for its acknowledgement, or for a window to open (tcp(7), TCP_USER_TIMEOUT)."""
    options = (
        ("SO_KEEPALIVE", socket.SOL_SOCKET, 1),
        ("TCP_KEEPIDLE", socket.IPPROTO_TCP, _KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", socket.IPPROTO_TCP, _KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", socket.IPPROTO_TCP, _KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", socket.IPPROTO_TCP, int(unacknowledged * 1000)),
    )
    sock = getattr(sock, "socket", sock)  # beneath TLS within TLS
    for name, level, value in options:
        number = getattr(socket, name, None)  # what the system does not have is left out
        if number is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(level, number, value)


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _left(deadline: float) -> float:
    """Seconds until a deadline. Raises TimeoutError once it has passed: a timeout of 0 would mean no waiting."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no connection in time")
    return left


def _no_password() -> str:
    raise OSError("the key has a password")
