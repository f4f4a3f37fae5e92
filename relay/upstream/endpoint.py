"""The upstream of one relay: its address, its keys, and one long-lived set of connections to it.

What a request is, is decided here; relay.upstream.exchange sends it and reads the answer, relay.upstream.connect makes
connections and relay.upstream.pool keeps them.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from urllib3.util.wait import wait_for_read

from relay import errors
from relay.upstream import dns, faults
from relay.upstream.breaker import Breaker
from relay.upstream.connect import OfTheProxy, Peer, Proxy, connect, proxy_of, tls_context
from relay.upstream.exchange import READ_SIZE, Exchange
from relay.upstream.pool import Connection, Pool
from relay.wire.headers import CREDENTIALS, check_field
from relay.wire.target import join

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from relay.settings import Settings

#: Bytes of a probe's answer that are read; no list of models is longer.
_MOST_PROBED = 4 * 1024 * 1024


class Upstream:
    """The upstream of one relay. Opens nothing before the first exchange."""

    def __init__(self, settings: Settings, url: str) -> None:
        """`url`: the upstream's base URL, without a slash at its end."""
        parts = urlsplit(url)
        self.url = url
        self.host = parts.netloc
        self.tls = parts.scheme == "https"
        self.read_size = min(READ_SIZE, settings.buffer)
        self._base_path = parts.path
        self._query = settings.upstream_query
        self._ca = settings.upstream_ca
        self._added = dict(settings.upstream_headers)
        if settings.upstream_key:
            name = settings.upstream_key_header
            bearer = name.lower() == "authorization"
            self._added[name] = f"Bearer {settings.upstream_key}" if bearer else settings.upstream_key
        self.send_timeout = settings.send_timeout
        self.connecting_to = "the upstream" + (f" through {faults.PROXY}" if settings.upstream_proxy else "")
        self._connect_timeout = settings.connect_timeout
        self._certificate = settings.upstream_cert
        self._port = parts.port or (443 if self.tls else 80)
        self._name = parts.hostname or ""
        self._proxy_url = settings.upstream_proxy
        self.forwarded = bool(self._proxy_url) and not self.tls  # a plain HTTP proxy wants the whole URL
        self.nested = self.tls and (self._proxy_url or "").startswith("https:")
        self._way: tuple[Peer, Proxy | None] | None = None  # made at the first connection
        if self._proxy_url and self.forwarded and (login := proxy_of(self._proxy_url).authorization):
            self._added["Proxy-Authorization"] = login
        self._added_names = {name.lower() for name in self._added}
        self._breaker = Breaker(self.put, self._forget_names)
        self._pool = Pool((settings.max_streams or 900) + 8, settings.upstream_idle)

    def exchange(
        self,
        method: str,
        rest: str,
        query: str | None,
        headers: list[tuple[str, str]],
        body: bytes | bytearray | None,
        overrides: Mapping[str, str] | None = None,
    ) -> Exchange:
        """A request that has not been sent yet.

        `rest` and `query` are what stands below the mount, raw (latin-1 text). `headers` are the client's that may
        pass. `body` None: no body and no Content-Length; a bytearray is taken over.
        `overrides` are set in place of anything else. Raises
        ValueError for one that cannot be sent as it is.
        """
        target = join(self._base_path, rest, query, self._query)
        if self.forwarded:
            target = f"http://{self.host}{target}"
        added, replaced = self._added, self._added_names
        if overrides:
            for name, value in overrides.items():
                check_field(name, value)
            names = {name.lower() for name in overrides}
            if not names.isdisjoint(CREDENTIALS):
                names |= CREDENTIALS  # a key of the shop's takes the place of whatever the client brought
            added = {name: value for name, value in added.items() if name.lower() not in names} | dict(overrides)
            replaced = replaced | names
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() not in replaced]
        lines += [f"{name}: {value}" for name, value in added.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        if isinstance(body, bytearray):
            body[:0] = head  # in place: a body of 32 MiB is not held twice
            return Exchange(self, method, body)
        return Exchange(self, method, head + body if body else head)

    # Connections, for an exchange (relay.upstream.exchange.Sender).

    def take(self) -> Connection | None:
        return self._pool.take()

    def put(self, connection: Connection) -> None:
        self._pool.put(connection)

    def distrust(self) -> None:
        self._pool.clear()

    def connect(self, within: float | None) -> Connection:
        seconds = within or self._connect_timeout
        return self._breaker.connect(partial(self._connect, seconds), seconds)

    def _connect(self, seconds: float) -> Connection:
        way = self._way or self._find_way()
        try:
            return Connection(connect(*way, within=seconds))
        except (OSError, OfTheProxy) as error:
            raise faults.not_connected(error, seconds) from None

    def _forget_names(self) -> None:
        """A look-up hangs, and others would wait with it."""
        if self._way is not None:
            peer, proxy = self._way
            first = peer if proxy is None else proxy.peer
            dns.forget(first.host, first.port)

    def _find_way(self) -> tuple[Peer, Proxy | None]:
        """Load certificates. Two threads may race here at the first request; both come to the same."""
        context: ssl.SSLContext | None = None
        if self.tls:
            try:
                context = tls_context(self._ca, self._certificate)
            except OSError as error:
                raise errors.UpstreamUnreachable(_unusable(self._ca, self._certificate, error)) from None
        proxy = proxy_of(self._proxy_url, self._ca) if self._proxy_url else None
        self._way = Peer(self._name, self._port, context), proxy
        return self._way

    def probe(self, rest: str, *, within: float) -> int:
        """The status of the answer to a GET, all of it within so many seconds. Its body is thrown away.

        Raises UpstreamUnreachable, UpstreamFailed, ConnectTimeout or FirstByteTimeout.
        """
        deadline = time.monotonic() + within
        path, mark, query = rest.partition("?")
        exchange = self.exchange("GET", path, query if mark else None, [], None)
        status = 0
        try:
            exchange.send(within=within)
            answered = False
            while not answered:
                if not wait_for_read(exchange.sock, max(deadline - time.monotonic(), 0)):
                    raise errors.FirstByteTimeout(f"the upstream did not answer within {within:g} s")
                answered = exchange.read_head()
            status = exchange.head.status
            # Only an answer that was read to its end leaves a connection that can be used again.
            taken = 0
            while taken < _MOST_PROBED:
                if exchange.empty and not wait_for_read(exchange.sock, max(deadline - time.monotonic(), 0)):
                    break
                data = exchange.read()
                if data == b"":
                    break
                taken += len(data or b"")
        except errors.UpstreamCut:
            pass
        finally:
            exchange.close()
        return status

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.clear()


def _unusable(ca: str | None, certificate: str | None, error: OSError) -> str:
    """Which of the two files cannot be used: the one whose loading fails by itself."""
    if certificate is not None:
        try:
            tls_context(ca, None)
        except OSError:
            pass
        else:
            why = "its key has a password" if "password" in str(error) else "certificate and key do not fit, or no PEM"
            return f"the file in RELAY_UPSTREAM_CERT cannot be used ({why}); it holds a certificate and its key, in PEM"
    return "the certificates in RELAY_UPSTREAM_CA cannot be loaded; it must be a PEM file"
