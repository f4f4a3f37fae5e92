"""urllib3's connections and pools, as an exchange needs them. Knows neither requests nor what is asked for.

A connection writes an exchange's request as it stands and leaves the answer to relay.upstream.exchange, through the
methods that urllib3 has for both, because the usual readers hold bytes back (`iter_content`, `iter_lines`), cannot go
on after a timeout (`read1`), re-encode the request target and take 103 for the answer.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any, cast

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

from relay.upstream import dns

if TYPE_CHECKING:
    from collections.abc import Callable


class _Mixin:
    """A urllib3 connection that writes an exchange's request as it stands and leaves the answer to it."""

    sock: Any
    timeout: Any
    port: int
    _dns_host: str

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        if isinstance(self.sock, ssl.SSLSocket):
            # An end without TLS's goodbye is a cut (RFC 9112 section 9.8), which Python would take for an end.
            self.sock.suppress_ragged_eofs = False  # type: ignore[attr-defined]

    def _new_conn(self) -> socket.socket:
        """As urllib3's, with names from relay.upstream.dns."""
        try:
            addresses = dns.resolve(self._dns_host.strip("[]"), self.port)
        except socket.gaierror as error:
            raise NameResolutionError(self._dns_host, cast("Any", self), error) from error
        failure: Exception = OSError("the host has no address")
        for family, kind, protocol, _, address in addresses:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self.timeout)
                sock.connect(address)
                # Requests are written whole, so waiting for more to send would only delay them.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        dns.forget(self._dns_host.strip("[]"), self.port)
        failure.__traceback__ = None  # it would hold this frame, which holds it
        if isinstance(failure, TimeoutError):
            raise ConnectTimeoutError(self, "no connection in time") from failure
        raise NewConnectionError(cast("Any", self), "no connection") from failure

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **_: Any) -> None:
        if self.sock is None:
            self.connect()
        wire = body.sending(self)
        self.sock.settimeout(self.timeout)
        self.sock.sendall(wire)

    def getresponse(self) -> urllib3.HTTPResponse:
        """Only the handle that gives the connection back to its pool; the exchange reads the answer."""
        return urllib3.HTTPResponse(preload_content=False, decode_content=False)

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


class _PoolMixin:
    """A urllib3 pool whose idle connections can be had without asking for a request."""

    _get_conn: Callable[[], Any]
    _put_conn: Callable[[Any], None]

    def take_idle(self) -> Any:
        """A connection that stands idle, and on which nothing has arrived; None: there is none."""
        connection = self._get_conn()
        if connection.sock is not None:
            return connection
        self._put_conn(connection)
        return None

    def give_back(self, connection: Any) -> None:
        self._put_conn(connection)


class HTTPPool(_PoolMixin, urllib3.HTTPConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPConnection


class HTTPSPool(_PoolMixin, urllib3.HTTPSConnectionPool):  # type: ignore[misc]
    ConnectionCls = _HTTPSConnection
