"""One request to the upstream and its answer, as bytes that have arrived. Reading never waits.

Knows sockets and HTTP/1.1 framing, and nothing of clients, heartbeats or a stream's clocks: relay.upstream.endpoint
makes its connection, and who uses it waits on `sock` in between.
"""

from __future__ import annotations

import errno
import select
import ssl
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from relay import errors
from relay.upstream import faults
from relay.upstream.connect import UNACKNOWLEDGED, watch_peer
from relay.upstream.pool import shut
from relay.wire import http1

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.upstream.pool import Connection

#: One read takes at most so much: large enough for what has queued up to go out in one write. recv gives back what
#: it does not fill.
READ_SIZE = 64 * 1024
#: A request up to this size fits into an empty send buffer, so that sending it does not wait for anybody.
_SENT_AT_ONCE = 16 * 1024

#: Answers before the final one (100, 103): a client of HTTP has no use for more.
_MOST_INTERIM = 10
#: Seconds from sending in which a reused connection may turn out to have been closed by the upstream meanwhile.
_STALE = 1.0

_NO_ANSWER = "the upstream hung up before it answered"
_NOT_ALL = "the upstream hung up before it had the whole request"
_GONE = "the upstream vanished before it answered: the connection to it is dead"
#: What the kernel's watch over a connection says (relay.upstream.connect.watch_peer).
_VANISHED = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}

_NOTHING_THERE = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Aborted(Exception):
    """The exchange was closed while its request was being sent."""


class Sender(Protocol):
    """What an exchange needs of the upstream."""

    tls: bool
    read_size: int

    forwarded: bool  # through a proxy that reads the requests
    nested: bool  # TLS within a proxy's TLS
    connecting_to: str  # in words
    send_timeout: float

    def take(self) -> Connection | None:
        """A connection that stands idle."""

    def connect(self, within: float | None) -> Connection:
        """A new connection. Raises UpstreamUnreachable or ConnectTimeout."""

    def put(self, connection: Connection) -> None:
        """Take back a connection that may be used again."""

    def distrust(self) -> None:
        """A connection that stood idle was dead: others may be."""


class Exchange:
    """`send` may wait, and may run in another thread or greenlet than the rest. Then `read_head` until the head is
    there, then `read`: both take what has arrived and never wait. `close` may come at any time, any number of times.
    """

    __slots__ = (
        "_answered", "_began_at", "_closed", "_connection", "_interim", "_long_watch", "_partial", "_received", "_recv",
        "_searched", "_upstream", "connected", "empty", "head", "method", "sent_at", "sock", "wire",
    )  # fmt: skip

    def __init__(self, upstream: Sender, method: str, wire: bytes | bytearray) -> None:
        self._upstream = upstream
        self.method = method
        self.wire: bytes | bytearray | None = wire  # the request as it goes out
        self.connected = False  # a connection stands, and the request is on its way or sent
        self.head: http1.Head  # once read_head has said so
        self._answered = False
        self.sock: Any = None
        self._connection: Connection | None = None
        self.sent_at: float | None = None  # when the request was sent, monotonic seconds
        self._began_at = 0.0  # when sending began
        self._long_watch = False  # the kernel's watch over the connection is longer than usual
        self._partial = False  # the answer came before all of it was
        self._received: bytes | bytearray = b""  # what has come of the head, then what came along with it
        self._searched = 0  # how far it was searched for the head's end
        self._interim = 0
        self._recv: Callable[[int], bytes]
        #: Nothing can be read before `sock` is readable.
        self.empty = True
        self._closed = False

    # Sending.

    @property
    def sent(self) -> bool:
        return self.sent_at is not None

    @property
    def connecting_to(self) -> str:
        """What a connection is made to, in words."""
        return self._upstream.connecting_to

    @property
    def answered(self) -> bool:
        """`head` is there."""
        return self._answered

    def send(self, *, within: float | None = None) -> None:
        """Connect if need be, and send the request.

        `within`: seconds for each step, in place of the settings' limits. Raises UpstreamUnreachable, UpstreamFailed,
        ConnectTimeout or SendTimeout; Aborted if it was closed meanwhile.
        """
        begun = self._connection  # `send_at_once` has sent a part
        connection = begun or self._upstream.take() or self._upstream.connect(within)
        if self._closed or self.wire is None:
            connection.close()
            raise Aborted
        if begun is None:
            self._begin(connection)
        patience = within or self._upstream.send_timeout
        if len(self.wire) > _SENT_AT_ONCE and patience > UNACKNOWLEDGED:
            watch_peer(connection.sock, patience)  # a closed window counts as unacknowledged
            self._long_watch = True
        try:
            self._write(self.wire, patience)
        except BaseException:
            self._drop()
            raise
        self._has_been_sent()

    def send_at_once(self) -> bool:
        """Send the request if that takes no waiting: it is short, and a connection stands idle. Raises as `send`."""
        wire = self.wire
        if wire is None or len(wire) > _SENT_AT_ONCE or self._upstream.nested:
            return False
        connection = self._upstream.take()
        if connection is None:
            return False
        sock = connection.sock
        try:
            sent = (sock if self._upstream.tls else getattr(sock, "_sock", sock)).send(wire)
        except OSError:
            sent = 0
        if sent == 0:
            # Not a byte is gone. The kernel takes no more now, or the upstream has just hung up.
            connection.close()
            return False
        self._begin(connection)
        if sent < len(wire):
            self.wire = wire[sent:]
            return False
        self._has_been_sent()
        return True

    def _begin(self, connection: Connection) -> None:
        self._connection, self.sock = connection, connection.sock
        self._began_at = time.monotonic()
        self.connected = True
        # The plain socket beneath gevent's, which would only add its own way of waiting; TLS needs the whole of it.
        self._recv = self.sock.recv if self._upstream.tls else getattr(self.sock, "_sock", self.sock).recv

    def _write(self, wire: bytes | bytearray, patience: float) -> None:
        """Send all of it, unless the answer comes before. Raises SendTimeout when the upstream takes nothing for
        `patience` seconds, and UpstreamFailed when it hangs up."""
        sock = self.sock
        send = partial(_send_waiting, sock, patience) if self._upstream.nested else sock.send
        sock.settimeout(0)
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN | select.POLLOUT)
        rest = memoryview(wire)
        give_up = time.monotonic() + patience
        while True:
            try:
                rest = rest[send(rest[:READ_SIZE]) :]
                if not rest:
                    return
                give_up = time.monotonic() + patience
            except _NOTHING_THERE:
                pass
            except OSError as error:
                # It may have answered before it hung up: what it said of that counts.
                if self._has_answered_early():
                    return
                if isinstance(error, TimeoutError):  # the kernel's, whose watch over the connection is as long
                    raise self._takes_nothing(patience) from None
                raise faults.tls(error) or self._hung_up(_NOT_ALL) from None
            # After each piece, for TLS cannot be read any more once a write has failed. Only what the upstream takes
            # moves the clock: an answer that dribbles does not.
            ready = poller.poll(max(give_up - time.monotonic(), 0) * 1000)
            if not ready:
                raise self._takes_nothing(patience)
            if ready[0][1] & ~select.POLLOUT and self._has_answered_early():
                return
            if time.monotonic() >= give_up and not ready[0][1] & select.POLLOUT:
                raise self._takes_nothing(patience)

    def _takes_nothing(self, patience: float) -> Exception:
        if self._closed:
            return Aborted()
        return errors.SendTimeout(
            f"the upstream has taken nothing of the request for {patience:g} s (RELAY_SEND_TIMEOUT)"
        )

    def _has_answered_early(self) -> bool:
        """Whether the head of the answer is there although the request is not all sent: it then says enough."""
        try:
            while True:
                if self.read_head():
                    self._partial = True
                    return True
                if self.empty:
                    return False
        except errors.UpstreamFailed as error:
            if self._closed:
                raise Aborted from None
            if error.message == _NO_ANSWER:
                raise self._hung_up(_NOT_ALL) from None
            raise

    def _has_been_sent(self) -> None:
        self.wire = None  # a request of 32 MiB must not live as long as its answer
        self.sock.settimeout(0)
        self.sent_at = time.monotonic()
        if self._closed:
            self._release()
            raise Aborted

    # Receiving.

    def read_head(self) -> bool:
        """Take what has come of the answer's head; True: `head` is there. Interim answers are passed over.

        Raises UpstreamFailed if the upstream hung up or its answer is not valid HTTP/1.
        """
        if self._answered:
            return True
        try:
            data = self._receive()
            if not data:
                raise self._hung_up()
            received = self._with_earlier(data) if self._received else data
            while length := http1.head_length(received, self._searched):
                head = http1.parse_head(bytes(received[:length]), self.method)
                received = bytes(received[length:])
                self._searched = 0
                if head.status == 101:
                    raise http1.BadResponse("it switched protocols, which nobody asked for")
                if head.status >= 200:
                    if self._upstream.forwarded and (fault := faults.of_proxy(head)) is not None:
                        raise fault
                    self.head, self._answered = head, True
                    if self._long_watch:
                        watch_peer(self.sock, UNACKNOWLEDGED)
                    self.empty = self.empty and not received and not head.framing.done
                    break
                # 100, 102, 103: the answer is still to come (RFC 9110 section 15.2)
                self._interim += 1
                if self._interim > _MOST_INTERIM:
                    raise http1.BadResponse(f"it has more than {_MOST_INTERIM} interim answers")
                if not received:
                    break
            else:
                self._searched = max(len(received) - 3, 0)
            self._received = received
        except _NOTHING_THERE:
            self.empty = True
        except http1.BadResponse as error:
            raise errors.UpstreamFailed(f"the upstream's answer cannot be relayed: {error}") from None
        except OSError as error:
            raise self._broke(error) from None
        return self._answered

    def _with_earlier(self, data: bytes) -> bytes | bytearray:
        """What has come of the head, and `data`: one that comes byte by byte must not be copied for each."""
        if isinstance(self._received, bytes):
            self._received = bytearray(self._received)
        self._received += data
        return self._received

    def _broke(self, error: OSError) -> errors.RelayError:
        """The connection has failed in place of an answer."""
        return faults.tls(error) or self._hung_up(_GONE if error.errno in _VANISHED else _NO_ANSWER)

    def _hung_up(self, message: str = _NO_ANSWER) -> errors.UpstreamFailed:
        """The upstream has closed the connection in place of an answer.

        On one that stood idle it may have done so before it saw the request: SDKs then ask again, as they would without
        a relay between. Later than that it had the request, and may bill it.
        """
        error = errors.UpstreamFailed(message)
        connection = self._connection
        if connection is not None and connection.reused and not self._received and not self._interim:
            self._upstream.distrust()
            if time.monotonic() - (self.sent_at or self._began_at) < _STALE:
                error.may_retry = True
        return error

    def read(self) -> bytes | None:
        """Body bytes that have arrived; b"" after the last one; None: no byte of the body has.

        Raises UpstreamCut if the body has ended before it was whole or its framing is broken.
        """
        framing = self.head.framing
        try:
            if self._received:
                raw, self._received = bytes(self._received), b""
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
            shut(self.sock)  # another thread or greenlet is sending still

    def _release(self) -> None:
        connection = self._connection
        if connection is None:
            return
        reusable = self._reusable()
        self._connection = self.sock = None
        self._received = b""
        if reusable:
            self._upstream.put(connection)
        else:
            connection.close()

    def _drop(self) -> None:
        """The request was not sent, and its connection is of no use."""
        connection, self._connection, self.sock = self._connection, None, None
        if connection is not None:
            connection.close()

    def _reusable(self) -> bool:
        if not self._answered or self._received or self._partial:
            return False
        framing = self.head.framing
        return framing.done and not framing.excess and self.head.keeps_open


def _send_waiting(sock: Any, patience: float, piece: Any) -> int:
    """Send to a socket that cannot do it without waiting, for at most `patience` seconds. urllib3's TLS within TLS
    loses what the outer layer does not take at once."""
    sock.settimeout(patience)
    try:
        return sock.send(piece)  # type: ignore[no-any-return]
    finally:
        sock.settimeout(0)
