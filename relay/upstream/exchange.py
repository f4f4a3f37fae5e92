"""One request to the upstream and its answer, as bytes that have arrived. Reading never waits.

Knows sockets and HTTP/1.1 framing, and nothing of requests, clients, heartbeats or clocks: relay.upstream.endpoint
gives it a connection, and whoever uses it waits on `sock` in between.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any, Protocol

from relay import errors
from relay.wire import http1

if TYPE_CHECKING:
    from collections.abc import Callable

#: One read takes at most so much: large enough for what has queued up to go out in one write. recv gives back what
#: it does not fill.
READ_SIZE = 64 * 1024
#: A request up to this size fits into an empty send buffer, so that sending it does not wait for anybody.
_SENT_AT_ONCE = 16 * 1024

_NOTHING_THERE = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Aborted(Exception):
    """The exchange was closed while its request was being sent."""


class Connection(Protocol):
    """What an exchange needs of the connection that it is given."""

    sock: Any

    def close(self) -> None: ...


class Sender(Protocol):
    """What an exchange needs of the upstream."""

    tls: bool
    read_size: int

    def send(self, exchange: Exchange, *, within: float | None) -> Callable[[], None]:
        """Send the request on a connection; gives what returns it for reuse."""

    def send_idle(self, exchange: Exchange, wire: bytes) -> Callable[[], None] | None:
        """The same without waiting; None: that cannot be done."""


class Exchange:
    """`send` may wait, and may run in another thread or greenlet than the rest. Then `read_head` until the head is
    there, then `read`: both take what has arrived and never wait. `close` may come at any time, any number of times.
    """

    __slots__ = (
        "_answered", "_closed", "_connection", "_give_back", "_received", "_recv", "_upstream", "connected",
        "empty", "head", "method", "sock", "wire",
    )  # fmt: skip

    def __init__(self, upstream: Sender, method: str, wire: bytes) -> None:
        self._upstream = upstream
        self.method = method
        self.wire: bytes | None = wire  # the request as it goes out
        self.connected = False  # a connection stands, and the request is on its way or sent
        self.head: http1.Head  # once read_head has said so
        self._answered = False
        self.sock: Any = None
        self._connection: Connection | None = None
        self._give_back: Callable[[], None] | None = None  # set once the request is sent
        self._received = b""  # what has come of the head, then what came along with it
        self._recv: Callable[[int], bytes]
        #: Nothing can be read before `sock` is readable.
        self.empty = True
        self._closed = False

    # Sending.

    @property
    def sent(self) -> bool:
        return self._give_back is not None

    def send(self, *, within: float | None = None) -> None:
        """Connect if need be, and send the request.

        `within`: seconds for each step, in place of the settings' limits. Raises UpstreamUnreachable, UpstreamFailed
        or ConnectTimeout; Aborted if it was closed meanwhile.
        """
        give_back = self._upstream.send(self, within=within)
        self._has_been_sent(give_back)

    def send_at_once(self) -> bool:
        """Send the request if that takes no waiting: it is short, and a connection stands idle. Raises as `send`."""
        if self.wire is None or len(self.wire) > _SENT_AT_ONCE:
            return False
        give_back = self._upstream.send_idle(self, self.wire)
        if give_back is None:
            return False
        self._has_been_sent(give_back)
        return True

    def sending(self, connection: Connection) -> bytes:
        """The connection that will carry the request asks for its bytes."""
        if self._closed or self.wire is None:
            raise Aborted
        self._connection, self.sock = connection, connection.sock
        self.connected = True
        return self.wire

    def _has_been_sent(self, give_back: Callable[[], None]) -> None:
        self.wire = None  # a request of 32 MiB must not live as long as its answer
        self.sock.settimeout(0)
        # The plain socket beneath gevent's, which would only add its own way of waiting; TLS needs the whole of it.
        self._recv = self.sock.recv if self._upstream.tls else getattr(self.sock, "_sock", self.sock).recv
        self._give_back = give_back
        if self._closed:
            self._release()
            raise Aborted

    # Receiving.

    def read_head(self) -> bool:
        """Take what has come of the answer's head; True: `head` is there. Interim answers are passed over.

        Raises UpstreamFailed if the upstream hung up or did not answer with sound HTTP/1.
        """
        try:
            data = self._receive()
            if not data:
                raise errors.UpstreamFailed("the upstream hung up before it answered")
            data = self._received + data
            while length := http1.head_length(data):
                head = http1.parse_head(data[:length], self.method)
                data = data[length:]
                if head.status == 101:
                    raise http1.BadResponse("it switched protocols, which nobody asked for")
                if head.status >= 200:
                    self.head, self._answered = head, True
                    self.empty = self.empty and not data and not head.framing.done
                    break
                # 100, 102, 103: the answer is still to come (RFC 9110 section 15.2)
                if not data:
                    break
            self._received = data
        except _NOTHING_THERE:
            self.empty = True
        except http1.BadResponse as error:
            raise errors.UpstreamFailed(f"the upstream's answer cannot be relayed: {error}") from None
        except OSError:
            raise errors.UpstreamFailed("the upstream hung up before it answered") from None
        return self._answered

    def read(self) -> bytes | None:
        """Body bytes that have arrived; b"" after the last one; None: no byte of the body has.

        Raises UpstreamCut if the body has ended before it was whole or its framing is broken.
        """
        framing = self.head.framing
        try:
            if self._received:
                raw, self._received = self._received, b""
                self.empty = True
            elif framing.done:
                return b""
            elif framing.fault is not None:
                raise http1.BadResponse(framing.fault)
            else:
                raw = self._receive()
            if not raw:
                framing.end()
                return b""
            data = framing.feed(raw)
            if framing.done or framing.fault is not None:
                self.empty = False
            return data if data or framing.done else None
        except _NOTHING_THERE:
            self.empty = True
            return None
        except http1.Truncated:
            raise errors.UpstreamCut("the upstream closed the connection before its answer was complete") from None
        except http1.BadResponse as error:
            raise errors.UpstreamCut(f"the upstream's answer broke off: {error}") from None
        except OSError:
            raise errors.UpstreamCut("the connection to the upstream broke before its answer was complete") from None

    @property
    def complete(self) -> bool:
        """The body has been read to its end."""
        return self.head.framing.done

    def _receive(self) -> bytes:
        # Each read is followed by a wait even if it did not empty the socket: the loop serves all other streams in
        # between, and the wait costs nothing when bytes are there.
        self.empty = True
        if not self._upstream.tls:
            return self._recv(self._upstream.read_size)
        # TLS hands over record by record, and most events are one: take all there are.
        pieces = []
        left = self._upstream.read_size
        try:
            while left > 0:
                data = self._recv(left)
                pieces.append(data)
                left -= len(data)
                if not data:
                    break
            self.empty = False  # more may be in the TLS layer, or its end, where the socket does not show it
        except _NOTHING_THERE:
            if not pieces:
                raise
        except OSError:
            if not pieces:
                raise
            self.empty = False  # what came before the failure goes out first
        return b"".join(pieces)

    # The end.

    def close(self) -> None:
        """Give the connection back for reuse if the answer has been read to its end, else close it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.sent:
            self._release()
        elif self.sock is not None:
            # Another thread or greenlet is sending still: this wakes it, and it cleans up.
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _release(self) -> None:
        give_back, connection = self._give_back, self._connection
        if give_back is None or connection is None:
            return
        if not self._reusable():
            connection.close()
        self._connection = self.sock = None
        self._received = b""
        give_back()

    def _reusable(self) -> bool:
        if not self._answered or self._received:
            return False
        framing = self.head.framing
        return framing.done and not framing.excess and self.head.keeps_open
