"""The upstream's side: one long-lived set of connections, one exchange on them, its bytes as they arrive.

The only file that imports requests. Its adapter and urllib3 beneath it keep the connections: pool, reuse, TLS,
proxies, their errors. What goes over a connection is written and read here, through the methods that urllib3's
connection classes have for it, because the usual readers hold bytes back (`iter_content`, `iter_lines`), cannot go on
after a timeout (`read1`), re-encode the request target and take 103 for the answer. This file knows nothing of
clients, heartbeats or clocks: whoever uses it waits.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.wait import wait_for_read

from relay import errors, http1
from relay.paths import join

if TYPE_CHECKING:
    from relay.settings import Settings

if not hasattr(urllib3, "BaseHTTPResponse"):
    raise ImportError("relay needs urllib3 2 or newer; `pip install -U requests urllib3` brings it")

#: One read takes at most so much: large enough for whatever has queued up to go out in one write, and twice what an
#: idle stream may cost is never allocated, since recv shrinks its buffer to what came.
READ_SIZE = 64 * 1024
#: The sockets' own limit is only the last resort behind the stream's clocks, which know why they end something.
_GRACE = 5.0


class Aborted(Exception):
    """The exchange was given up while it was being opened."""


class Exchange:
    """One request and its answer. `open` blocks until the answer's head is there; then `read` never blocks.

    `open` may run in another thread or greenlet than the rest. `close` may be called at any time and any number of
    times; it gives the connection back for reuse if the body has been read to its end, else closes it.
    """

    __slots__ = (
        "_closed", "_connection", "_dry", "_first", "_read_size", "_response", "_upstream", "connected", "head",
        "method", "sock", "wire",
    )  # fmt: skip

    def __init__(self, upstream: Upstream, method: str, wire: bytes) -> None:
        self._upstream = upstream
        self.method = method
        self.wire: bytes | None = wire  # the request as it goes out
        self.connected = False  # a connection stands; the request is on its way
        self.head: http1.Head
        self.sock: Any = None
        self._connection: _Mixin | None = None
        self._response: requests.Response | None = None
        self._first = b""  # what came along with the head
        self._dry = False
        self._closed = False
        self._read_size = upstream.read_size

    def open(self, *, within: float | None = None) -> None:
        """Send the request and wait for the head of the answer.

        `within`: seconds for each step on the way, in place of the settings' limits. Raises UpstreamUnreachable,
        UpstreamFailed, ConnectTimeout or FirstByteTimeout; Aborted if it was closed meanwhile.
        """
        request = requests.PreparedRequest()
        request.method, request.url = self.method, self._upstream.url
        request.headers = requests.structures.CaseInsensitiveDict()
        # The body is opaque to requests and urllib3; our connection class finds the exchange in it.
        request.body = self  # type: ignore[assignment]
        try:
            self._response = self._upstream.adapter.send(
                request,
                stream=True,
                timeout=(within, within) if within else self._upstream.timeouts,
                proxies=self._upstream.proxies,
            )
        except Aborted:
            raise
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if self._closed:
                raise Aborted from None
            raise self._translate(error) from None
        finally:
            self.wire = None  # a request of 32 MiB must not live as long as its stream
        if self._closed:
            self._release()
            raise Aborted

    def read(self) -> bytes | None:
        """Body bytes that have arrived; b"" after the last one; None: nothing there now, wait for `sock`.

        Raises UpstreamCut if the body has ended before it was whole or its framing is broken.
        """
        framing = self.head.framing
        try:
            if self._first:
                data, self._first = framing.feed(self._first), b""
                if data:
                    return data
            while not framing.done:
                # Each read is followed by a wait, even if more is there: the loop serves all other streams in between.
                if self._dry:
                    self._dry = False
                    return None
                raw = self._read_tls() if self._upstream.tls else self.sock.recv(self._read_size)
                self._dry = True
                if not raw:
                    framing.end()
                    break
                data = framing.feed(raw)
                if data:
                    return data
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except http1.Truncated:
            raise errors.UpstreamCut("the upstream closed the connection before its answer was complete") from None
        except http1.BadResponse as error:
            raise errors.UpstreamCut(f"the upstream's answer broke off: {error}") from None
        except OSError:
            raise errors.UpstreamCut("the connection to the upstream broke before its answer was complete") from None
        return b""

    def _read_tls(self) -> bytes:
        """All that has arrived, up to the usual size. TLS gives it record by record, and most events are one."""
        recv, left = self.sock.recv, self._read_size
        pieces = [recv(left)]
        try:
            while pieces[-1] and (left := left - len(pieces[-1])) > 0:
                pieces.append(recv(left))
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        return b"".join(pieces)

    def drain(self, limit: int) -> None:
        """Read the rest of a short body and throw it away, waiting for it, so that its connection can be used again.

        Gives up silently after `limit` bytes, after a second of silence and when the body is cut.
        """
        while limit > 0:
            try:
                data = self.read()
            except errors.UpstreamCut:
                return
            if data is None:
                if not wait_for_read(self.sock, timeout=1.0):
                    return
            elif not data:
                return
            else:
                limit -= len(data)

    def close(self) -> None:
        """Give the connection back or close it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._response is not None:
            self._release()
        elif self.sock is not None:
            # Still being opened by another thread, which this wakes; it then closes and gives back.
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _release(self) -> None:
        response, connection = self._response, self._connection
        self._response = self._connection = self.sock = None
        self._first = b""
        if response is None or connection is None:
            return
        framing = self.head.framing
        if not (framing.done and self.head.keeps_open) or framing.excess:
            connection.close()
        response.raw.release_conn()

    # What our connection class calls, from inside `open`.

    def sending(self, connection: _Mixin) -> bytes:
        if self._closed or self.wire is None:
            raise Aborted
        self.connected = True
        self._connection, self.sock = connection, connection.sock
        return self.wire

    def answered(self, head: http1.Head, rest: bytes) -> None:
        self.head, self._first = head, rest
        self.sock.settimeout(0)  # from here on nobody waits inside a read

    def _translate(self, error: BaseException) -> errors.RelayError:
        """What went wrong, from the nested exceptions of requests and urllib3. No address and no key in the text."""
        cause = _innermost(error)
        if isinstance(cause, http1.BadResponse):
            return errors.UpstreamFailed(f"the upstream's answer cannot be relayed: {cause}")
        if not self.connected:
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
        if isinstance(error, requests.Timeout):
            return errors.FirstByteTimeout("the upstream did not answer in time (RELAY_FIRST_BYTE_TIMEOUT)")
        return errors.UpstreamFailed("the upstream hung up before it answered")


class Upstream:
    """The upstream of one relay. Opens nothing before the first exchange."""

    def __init__(self, settings: Settings, url: str) -> None:
        """`url`: the upstream's base URL, without a slash at its end."""
        parts = urlsplit(url)
        self.url = url
        self.host = parts.netloc
        self._base_path = parts.path
        self._query = settings.upstream_query
        self._ca = settings.upstream_ca
        self._added = dict(settings.upstream_headers)
        if settings.upstream_key:
            name = settings.upstream_key_header
            bearer = name.lower() == "authorization"
            self._added[name] = f"Bearer {settings.upstream_key}" if bearer else settings.upstream_key
        self._replaced = {name.lower() for name in self._added}
        self.tls = parts.scheme == "https"
        self.read_size = min(READ_SIZE, settings.buffer)
        self.timeouts = (settings.connect_timeout, settings.first_byte_timeout + _GRACE)
        proxy = settings.upstream_proxy
        self.proxies = {"http": proxy, "https": proxy} if proxy else None
        self._forwarded = bool(proxy) and not self.tls  # a plain HTTP proxy wants the whole URL
        self._pool_size = (settings.max_streams or 900) + 8
        self._adapter: _Adapter | None = None

    @property
    def adapter(self) -> _Adapter:
        if self._adapter is None:
            # Two threads may race here at the first request: the loser's adapter has opened nothing.
            self._adapter = _Adapter(self._pool_size, self._ca, tls=self.tls)
        return self._adapter

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
        pass. `body` None: no body and no Content-Length. `overrides` are set in place of anything else.
        """
        target = join(self._base_path, rest, query, self._query)
        if self._forwarded:
            target = f"http://{self.host}{target}"
        added = self._added
        replaced = self._replaced
        if overrides:
            lower = {name.lower() for name in overrides}
            added = {name: value for name, value in added.items() if name.lower() not in lower} | dict(overrides)
            replaced = replaced | lower
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in headers if name.lower() not in replaced]
        lines += [f"{name}: {value}" for name, value in added.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
        return Exchange(self, method, head + body if body else head)

    def close(self) -> None:
        """Close the idle connections."""
        if self._adapter is not None:
            self._adapter.close()
            self._adapter = None


class _Adapter(HTTPAdapter):
    """requests' adapter with one preloaded TLS context and our connection classes."""

    def __init__(self, pool_size: int, ca: str | None, *, tls: bool) -> None:
        self._context = _tls_context(ca) if tls else None
        super().__init__(pool_connections=4, pool_maxsize=pool_size)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave the pool alone: requests would set `ca_certs`, and each new connection load that file (14 ms)."""

    def build_response(self, req: Any, resp: Any) -> requests.Response:
        """Only the raw response: no cookies are kept, nobody asks for an encoding."""
        response = requests.Response()
        response.raw = resp
        return response


def _tls_context(ca: str | None) -> ssl.SSLContext:
    context = urllib3.util.ssl_.create_urllib3_context()
    context.load_verify_locations(ca or certifi.where())
    return context


class _Mixin:
    """A urllib3 connection that writes an exchange's request and reads its answer's head itself."""

    sock: Any
    timeout: Any
    _exchange: Exchange | None = None

    def close(self) -> None:
        super().close()  # type: ignore[misc]

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **_: Any) -> None:
        if self.sock is None:
            self.connect()  # type: ignore[attr-defined]
        wire = body.sending(self)
        self.sock.settimeout(self.timeout)
        self._exchange = body
        self.sock.sendall(wire)

    def getresponse(self) -> urllib3.HTTPResponse:
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            raise RuntimeError("no request has been sent on this connection")
        self.sock.settimeout(self.timeout)
        data = b""
        while True:
            length = http1.head_length(data) if data else 0
            if length == 0:
                piece = self.sock.recv(READ_SIZE)
                if not piece:
                    raise ConnectionResetError("closed before the head of an answer")
                data += piece
                continue
            head = http1.parse_head(data[:length], exchange.method)
            data = data[length:]
            if head.status == 101:
                raise http1.BadResponse("it switched protocols, which nobody asked for")
            if head.status >= 200:
                break  # 102, 103 and the like are interim (RFC 9110 section 15.2): the answer is still to come
        exchange.answered(head, data)
        return urllib3.HTTPResponse(status=head.status, preload_content=False, decode_content=False)

    @property
    def is_connected(self) -> bool:
        """Whether an idle connection may be used again: nothing may have arrived on it, an end least of all."""
        if self.sock is None:
            return False
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False


class _HTTPConnection(_Mixin, HTTPConnection):  # type: ignore[misc]
    pass


class _HTTPSConnection(_Mixin, HTTPSConnection):  # type: ignore[misc]
    pass


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def _innermost(error: BaseException) -> BaseException:
    """The exception at the bottom of the nest that requests and urllib3 build around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(inner, BaseException):
            inner = next((arg for arg in error.args if isinstance(arg, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error
