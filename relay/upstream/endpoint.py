"""The upstream of one relay: its address, its keys, and one long-lived set of connections to it.

The only file of the service that imports requests. Its adapter and urllib3 beneath it keep the connections: pool,
reuse, TLS, proxies, their errors. What a request is, is decided here; relay.upstream.connect writes it and
relay.upstream.exchange reads the answer.
"""

from __future__ import annotations

import socket
import ssl
import time
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Timeout
from urllib3.util.wait import wait_for_read

from relay import errors
from relay.upstream.connect import HTTPPool, HTTPSPool
from relay.upstream.exchange import READ_SIZE, Aborted, Exchange
from relay.wire.headers import CREDENTIALS, check_field
from relay.wire.target import join

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from relay.settings import Settings

if not hasattr(urllib3, "BaseHTTPResponse"):
    raise ImportError("relay needs urllib3 2 or newer; `pip install -U requests urllib3` brings it")

#: What goes upstream stands in the exchange; nothing is added to it.
_NO_HEADERS: Any = requests.structures.CaseInsensitiveDict()
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
        # The clocks of a stream know why they end something; the sockets' own limits are the last resort behind them.
        self._timeout = Timeout(connect=settings.connect_timeout, read=settings.first_byte_timeout)
        proxy = settings.upstream_proxy
        self._proxies = {"http": proxy, "https": proxy} if proxy else None
        self._forwarded = bool(proxy) and not self.tls  # a plain HTTP proxy wants the whole URL and its password
        if proxy and self._forwarded:
            user, password = requests.utils.get_auth_from_url(proxy)
            if user or password:
                self._added.update(urllib3.make_headers(proxy_basic_auth=f"{user}:{password}"))
        self._added_names = {name.lower() for name in self._added}
        self._pool_size = (settings.max_streams or 900) + 8
        self._adapter: _Adapter | None = None

    def exchange(
        self,
        method: str,
        rest: str,
        query: str | None,
        headers: list[tuple[str, str]],
        body: bytes | None,
        overrides: Mapping[str, str] | None = None,
    ) -> Exchange:
        """A request that has not been sent yet.

        `rest` and `query` are what stands below the mount, raw (latin-1 text). `headers` are the client's that may
        pass. `body` None: no body and no Content-Length. `overrides` are set in place of anything else. Raises
        ValueError for one that cannot be sent as it is.
        """
        target = join(self._base_path, rest, query, self._query)
        if self._forwarded:
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
        return Exchange(self, method, head + body if body else head)

    def send(self, exchange: Exchange, *, within: float | None) -> Callable[[], None]:
        """Send the exchange's request, on a new connection if none stands idle; gives what returns it to the pool.

        `within`: seconds for each step, in place of the settings' limits. Raises UpstreamUnreachable, UpstreamFailed,
        ConnectTimeout; Aborted if the exchange was closed.
        """
        if self._adapter is None:
            # Two threads may race here at the first request: the loser's adapter has opened nothing.
            try:
                self._adapter = _Adapter(self._pool_size, self._ca, tls=self.tls)
            except OSError:
                raise errors.UpstreamUnreachable(
                    "the certificates in RELAY_UPSTREAM_CA cannot be loaded; it must be a PEM file"
                ) from None
        request = requests.PreparedRequest()
        request.method, request.url, request.headers = exchange.method, self.url, _NO_HEADERS
        # The body is opaque to requests and urllib3: our connection class finds the exchange in it.
        request.body = exchange  # type: ignore[assignment]
        timeout = Timeout(connect=within, read=within) if within else self._timeout
        try:
            raw: Any = self._adapter.send(request, stream=True, timeout=cast("Any", timeout), proxies=self._proxies)
        except Aborted:
            raise
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _translate(error, connected=exchange.connected) from None
        return raw.release_conn  # type: ignore[no-any-return]

    def send_idle(self, exchange: Exchange, wire: bytes) -> Callable[[], None] | None:
        """Send the exchange's request if that takes no waiting, because a connection stands idle; None: it would.

        Otherwise as `send`, without requests' and urllib3's own way there, which costs as much as all the rest.
        """
        pool = None if self._adapter is None else self._adapter.pool
        connection = None if pool is None else pool.take_idle()
        if pool is None or connection is None:
            return None
        give_back = partial(pool.give_back, connection)
        sock = connection.sock
        try:
            sent = (sock if self.tls else getattr(sock, "_sock", sock)).send(wire)
        except OSError:
            sent = 0
        if sent == 0:
            # Not a byte is gone. The kernel takes no more now, or the upstream has just hung up.
            connection.close()
            give_back()
            return None
        exchange.sending(connection)
        if sent < len(wire):
            connection.close()
            give_back()
            raise errors.UpstreamFailed("the upstream hung up before it had the whole request")
        return give_back

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
        if self._adapter is not None:
            self._adapter.close()
            self._adapter = None


class _Adapter(HTTPAdapter):
    """requests' adapter with one preloaded TLS context and our connection classes."""

    def __init__(self, pool_size: int, ca: str | None, *, tls: bool) -> None:
        self._context = _tls_context(ca) if tls else None
        self.pool: Any = None  # of connections, from the first request on
        super().__init__(pool_connections=4, pool_maxsize=pool_size)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)
        manager.pool_classes_by_scheme = {"http": HTTPPool, "https": HTTPSPool}
        return manager

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """The one pool that this adapter ever needs, looked up once."""
        if self.pool is None:
            self.pool = super().get_connection_with_tls_context(*args, **kwargs)
        return self.pool

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave the pool alone: requests would set `ca_certs`, and each new connection load that file (14 ms)."""

    def request_url(self, request: Any, proxies: Any) -> str:
        """What urllib3 calls the URL; the target that goes out stands in the exchange."""
        return str(request.url) if proxies and not self._context else "/"

    def build_response(self, req: Any, resp: Any) -> Any:
        """The raw response as it is: no cookies are kept, and nobody asks for headers or an encoding."""
        return resp


def _tls_context(ca: str | None) -> ssl.SSLContext:
    context = urllib3.util.ssl_.create_urllib3_context()
    # Some builds of Python set it (Debian 12's does): a connection that breaks off would seem to have ended.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.load_verify_locations(ca or certifi.where())
    return context


def _translate(error: BaseException, *, connected: bool) -> errors.RelayError:
    """What went wrong, from the nested exceptions of requests and urllib3. No address and no key in the text."""
    nest = _nest(error)
    cause = nest[-1]
    for each in nest:
        each.__traceback__ = None  # its frames are urllib3's, which name these errors, and the exchange
    if connected:
        return errors.UpstreamFailed("the upstream hung up before it had the whole request")
    if isinstance(error, (requests.ConnectTimeout, requests.ReadTimeout)):
        return errors.ConnectTimeout("no connection to the upstream in time (RELAY_CONNECT_TIMEOUT)")
    if isinstance(cause, ssl.SSLCertVerificationError):
        return errors.UpstreamUnreachable(
            f"the upstream's certificate is not trusted ({cause.verify_message}); for a private authority set "
            "RELAY_UPSTREAM_CA",
            code="upstream_certificate",
        )
    if isinstance(cause, ssl.SSLError):
        return errors.UpstreamUnreachable("the upstream does not speak TLS as it should; check its scheme")
    if isinstance(cause, socket.gaierror):
        return errors.UpstreamUnreachable("the upstream's host name cannot be resolved")
    detail = f": {cause.strerror}" if isinstance(cause, OSError) and cause.strerror else ""
    return errors.UpstreamUnreachable(f"the upstream cannot be reached{detail}")


def _nest(error: BaseException) -> list[BaseException]:
    """The exceptions that requests and urllib3 build around one another, from the outermost to the innermost."""
    nest = [error]
    while True:
        error = nest[-1]
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None or inner in nest:
            return nest
        nest.append(inner)
