"""A raw HTTP/1.1 client: sends the bytes that it is given, and says what came and how it ended.

Strict where a lenient client would hide a fault: framing errors raise, a body is "clean" only with
its last chunk, its full length or (close-delimited) a FIN, and everything else is "cut". It keeps
names and values as bytes, follows nothing, decodes nothing but the framing.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

from harness import DEADLINE, Deadline, DeadlineExceeded

Text = str | bytes
Headers = Iterable[tuple[Text, Text]] | Mapping[str, str]
Ended = Literal["clean", "cut"]

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) ([\t\x20-\x7e\x80-\xff]*)")
_HEADER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\r\n\0]*?)[ \t]*")
# Two line ends in a row, in any mix. A CR after an LF at the end of what has arrived waits for what
# follows, which may be its own LF; after another CR it does not: that stream ends lines with CR.
_EVENT_END = re.compile(rb"\r\n(?:\r\n|\n|\r(?=[^\n]))|(?<!\r)\n(?:\r\n|\n|\r(?=[^\n]))|\r\r\n?")


class ProtocolError(AssertionError):
    """What came is not HTTP/1.1."""


class NoResponse(ProtocolError):
    """The connection ended before a whole response head; `reset` says how."""

    def __init__(self, got: bytes, reset: bool) -> None:
        super().__init__(f"{'reset' if reset else 'closed'} before a response, after {got!r}")
        self.reset = reset


class EndedEarly(AssertionError):
    """The body ended before what was waited for."""


class Body(NamedTuple):
    """A body and how it ended."""

    data: bytes
    ended: Ended
    why: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def _bytes(value: Text) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else value


class Connection:
    """One TCP connection, used for one request after another.

    `rcvbuf`: the kernel's receive buffer, small for tests of clients that stop reading. `source`: the address that it
    comes from.
    """

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        rcvbuf: int | None = None,
        tls: ssl.SSLContext | None = None,
        source: str | None = None,
    ) -> None:
        self.port = port
        self.last_used = time.monotonic()
        self._buffer = bytearray()
        self._response: Response | None = None
        self._method = ""
        self._sock = socket.socket()
        try:
            if rcvbuf is not None:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
            self._sock.settimeout(DEADLINE)
            if source is not None:
                self._sock.bind((source, 0))
            self._sock.connect((host, port))
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._sock = tls.wrap_socket(self._sock, server_hostname=host)
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # One that is let go is closed; without this the socket would complain of it.
        if hasattr(self, "_sock"):
            self.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    # Sending

    def send(
        self,
        method: str,
        target: Text,
        headers: Headers = (),
        body: bytes | Iterable[bytes] = b"",
        *,
        version: str = "HTTP/1.1",
    ) -> None:
        """A request, without waiting for the answer.

        Host is added where it is missing; so is Content-Length, or, for a body of several pieces,
        chunked framing.
        """
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        lines = [(_bytes(name), _bytes(value)) for name, value in pairs]
        names = {name.lower() for name, _ in lines}
        if b"host" not in names:
            lines.insert(0, (b"Host", b"127.0.0.1:%d" % self.port))
        framed = names & {b"content-length", b"transfer-encoding"}
        if not isinstance(body, bytes):
            body = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in body if p) + b"0\r\n\r\n"
            if not framed:
                lines.append((b"Transfer-Encoding", b"chunked"))
        elif not framed and (body or method in ("POST", "PUT", "PATCH")):
            lines.append((b"Content-Length", b"%d" % len(body)))
        head = b"%b %b %b\r\n" % (method.encode(), _bytes(target), version.encode())
        self._method = method
        self.raw(head + b"".join(b"%b: %b\r\n" % line for line in lines) + b"\r\n" + body)

    def raw(self, data: bytes) -> None:
        """Bytes onto the wire as they are."""
        self._sock.settimeout(DEADLINE)
        try:
            self._sock.sendall(data)
        except TimeoutError:
            raise DeadlineExceeded(f"the server took no byte for {DEADLINE:g} s") from None

    # Receiving

    def read_head(self, deadline: float = DEADLINE) -> Response:
        """The next final response's head; 1xx before it are kept in `informational`."""
        if self._response is not None and self._response.ended is None:
            raise ValueError("the response before has not been read to its end")
        clock = Deadline(deadline, "a response head")
        informational: list[bytes] = []
        while True:
            while (at := self._buffer.find(b"\r\n\r\n")) < 0:
                reset = False
                try:
                    data = self._receive(clock)
                except ConnectionResetError:
                    data, reset = b"", True
                if not data:
                    raise NoResponse(bytes(self._buffer), reset)
            head = bytes(self._buffer[: at + 4])
            del self._buffer[: at + 4]
            response = Response(self, head, self._method)
            if response.status >= 200 or response.status == 101:
                response.informational = informational
                self._response = response
                return response
            informational.append(head)

    def request(
        self,
        method: str,
        target: Text,
        headers: Headers = (),
        body: bytes | Iterable[bytes] = b"",
        *,
        version: str = "HTTP/1.1",
        deadline: float = DEADLINE,
    ) -> Response:
        """Send, and read the head of the answer."""
        self.send(method, target, headers, body, version=version)
        return self.read_head(deadline)

    def _receive(self, clock: Deadline) -> bytes:
        """What is there, into the buffer; b"" is FIN, a reset raises."""
        self._sock.settimeout(clock.left())
        try:
            data = self._sock.recv(262144)
        except TimeoutError:
            clock.left()
            raise
        except ssl.SSLEOFError:
            data = b""
        self.last_used = time.monotonic()
        self._buffer += data
        return data

    # State and ends

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent on it now."""
        if self._sock.fileno() < 0 or self._buffer:
            return False
        if self._response is not None and not self._response.leaves_open:
            return False
        return not self.closed_by_peer

    @property
    def closed_by_peer(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        return bool(poll.poll(0))

    def wait_closed(self, deadline: float = DEADLINE) -> float:
        """Wait until the server has closed it; gives the monotonic time."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        if not poll.poll(deadline * 1000):
            raise DeadlineExceeded(f"the server kept the connection for {deadline:g} s")
        return time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()

    def reset(self) -> None:
        """Close with RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def half_close(self) -> None:
        """FIN to the server, and go on reading."""
        self._sock.shutdown(socket.SHUT_WR)


class Response:
    """A response whose head has been read. The body comes as fast as it is asked for.

    `status`, `reason`, `headers` (list of name and value, bytes, in order), `head` (verbatim),
    `informational` (heads of 1xx), `framing`. `body` is everything decoded so far, `wire` the same
    with its framing, `chunks` the sizes of the chunks begun so far, `arrivals` a list of
    (monotonic time, length of `body` then), `ended` None while it goes on.
    """

    def __init__(self, connection: Connection, head: bytes, method: str) -> None:
        self.connection = connection
        self.head = head
        status_line, *lines = head[:-4].split(b"\r\n")
        if not (match := _STATUS_LINE.fullmatch(status_line)):
            raise ProtocolError(f"status line {status_line!r}")
        self.status = int(match[1])
        self.reason: bytes = match[2]
        self.headers: list[tuple[bytes, bytes]] = []
        for line in lines:
            if not (match := _HEADER_LINE.fullmatch(line)):
                raise ProtocolError(f"header line {line!r}")
            self.headers.append((match[1], match[2]))
        self.informational: list[bytes] = []
        self.body = bytearray()
        self.wire = bytearray()
        self.arrivals: list[tuple[float, int]] = []
        self.ended: Ended | None = None
        self.why = ""
        self.trailers = b""
        self._read = 0  # how much of the body was given out
        self._chunked = Chunked()
        self._due = 0
        self.framing = self._frame(method)

    def _frame(self, method: str) -> Literal["chunked", "length", "close", "none"]:
        """RFC 9112 section 6.3, without its tolerance."""
        codings, lengths = self.all("Transfer-Encoding"), self.all("Content-Length")
        if (codings and lengths) or len(codings) > 1 or len(lengths) > 1:
            raise ProtocolError(f"contradictory framing: {self.headers!r}")
        if codings and codings[0].lower() != b"chunked":
            raise ProtocolError(f"transfer coding {codings[0]!r}")
        if lengths and not re.fullmatch(rb"[0-9]+", lengths[0]):
            raise ProtocolError(f"content length {lengths[0]!r}")
        if method == "HEAD" or self.status in (204, 304) or self.status < 200:
            self._end("clean", "no body")
            return "none"
        if codings:
            return "chunked"
        if lengths:
            self._due = int(lengths[0])
            if not self._due:
                self._end("clean", "full length")
            return "length"
        return "close"

    def header(self, name: str) -> bytes | None:
        """The first value of a header."""
        return next(iter(self.all(name)), None)

    def all(self, name: str) -> list[bytes]:
        wanted = name.lower().encode("latin-1")
        return [value for key, value in self.headers if key.lower() == wanted]

    @property
    def chunks(self) -> list[int]:
        return self._chunked.sizes

    @property
    def leaves_open(self) -> bool:
        """Whether the connection goes on after this body."""
        if self.ended != "clean" or self.framing == "close" or self.head[:8] == b"HTTP/1.0":
            return False
        return (self.header("Connection") or b"").lower() != b"close"

    # Reading

    def read_some(self, deadline: float = DEADLINE) -> bytes:
        """What has come, at least a byte; b"" at the end."""
        clock = Deadline(deadline, "another byte of the body")
        while self._read == len(self.body) and self.ended is None:
            self._fill(clock)
        return self._take(len(self.body))

    def read_until(self, wanted: bytes | Callable[[bytes], bool], deadline: float = DEADLINE) -> bytes:
        """The next bytes, up to and with `wanted`; or all that there are once it says yes.

        Raises EndedEarly if the body ends first, DeadlineExceeded if it does not come.
        """
        clock = Deadline(deadline, f"{wanted!r} in the body")
        searched = self._read
        while True:
            if isinstance(wanted, bytes):
                at = self.body.find(wanted, searched)
                if at >= 0:
                    return self._take(at + len(wanted))
                searched = max(self._read, len(self.body) - len(wanted) + 1)
            elif wanted(bytes(self.body[self._read :])):
                return self._take(len(self.body))
            self._fill_or_raise(clock, wanted)

    def read_exactly(self, n: int, deadline: float = DEADLINE) -> bytes:
        """The next n bytes."""
        clock = Deadline(deadline, f"{n} bytes of the body")
        while len(self.body) - self._read < n:
            self._fill_or_raise(clock, n)
        return self._take(self._read + n)

    def read_event(self, deadline: float = DEADLINE) -> bytes:
        """The next bytes up to and with a blank line (comments count as events)."""
        clock = Deadline(deadline, "an event")
        while not (match := _EVENT_END.search(self.body, self._read)):
            self._fill_or_raise(clock, "an event's end")
        return self._take(match.end())

    def finish(self, deadline: float = DEADLINE) -> Body:
        """Read to the end; gives the whole body, what was read before included."""
        clock = Deadline(deadline, f"the end of the body, {len(self.body)} bytes in")
        while self.ended is None:
            self._fill(clock)
        if self.ended == "clean" and self.connection._buffer:
            raise ProtocolError(f"bytes after the body: {bytes(self.connection._buffer[:200])!r}")
        self._read = len(self.body)
        return Body(bytes(self.body), self.ended, self.why)

    def close(self) -> None:
        self.connection.close()

    def reset(self) -> None:
        self.connection.reset()

    def half_close(self) -> None:
        self.connection.half_close()

    def _take(self, to: int) -> bytes:
        taken = bytes(self.body[self._read : to])
        self._read = to
        return taken

    def _end(self, ended: Ended, why: str) -> None:
        self.ended, self.why = ended, why

    def _fill_or_raise(self, clock: Deadline, wanted: object) -> None:
        if self.ended is not None:
            tail = bytes(self.body[self._read :][-200:])
            raise EndedEarly(f"{self.ended} end ({self.why}) while waiting for {wanted!r}; unread: {tail!r}")
        self._fill(clock)

    def _fill(self, clock: Deadline) -> None:
        """Decode what is buffered, else what one read brings."""
        buffer = self.connection._buffer
        if not buffer:
            try:
                if not self.connection._receive(clock):
                    self._end("clean" if self.framing == "close" else "cut", "FIN")
                    return
            except ConnectionResetError:
                self._end("cut", "RST")
                return
        if self.framing == "chunked":
            used = self._chunked.decode(buffer, self.body)
            if self._chunked.done:
                self.trailers = self._chunked.trailers
                self._end("clean", "last chunk")
        elif self.framing == "length":
            used = min(self._due, len(buffer))
            self.body += buffer[:used]
            self._due -= used
            if not self._due:
                self._end("clean", "full length")
        else:
            used = len(buffer)
            self.body += buffer
        self.wire += buffer[:used]
        del buffer[:used]
        self.arrivals.append((time.monotonic(), len(self.body)))


class Chunked:
    """RFC 9112 section 7.1, incremental: data is given out before its chunk is whole.

    `done` after the last chunk and its trailers, `sizes` of the chunks begun so far.
    """

    _LINE_LIMIT = 4096

    def __init__(self) -> None:
        self.done = False
        self.sizes: list[int] = []
        self.trailers = b""
        self._left = 0
        self._state: Literal["size", "data", "after", "trailer"] = "size"
        self._line = bytearray()

    def decode(self, source: bytearray, body: bytearray) -> int:
        """Append the data in `source` to `body`; gives how many bytes of it were used."""
        at = 0
        while at < len(source) and not self.done:
            if self._state == "data":
                piece = source[at : at + self._left]
                body += piece
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = "after"
                continue
            newline = source.find(b"\n", at)
            stop = newline + 1 if newline >= 0 else len(source)
            self._line += source[at:stop]
            at = stop
            if len(self._line) > self._LINE_LIMIT:
                raise ProtocolError(f"no chunk size but {bytes(self._line[:100])!r}")
            if newline >= 0:
                line, self._line = bytes(self._line), bytearray()
                self._take_line(line)
        return at

    def _take_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise ProtocolError(f"a line of the framing ends without CR: {line[:100]!r}")
        if self._state == "size":
            if not (match := re.fullmatch(rb"([0-9A-Fa-f]{1,16})(;[^\r\n]*)?\r\n", line)):
                raise ProtocolError(f"no chunk size but {line[:100]!r}")
            self._left = int(match[1], 16)
            if self._left:
                self.sizes.append(self._left)
            self._state = "data" if self._left else "trailer"
        elif self._state == "after":
            if line != b"\r\n":
                raise ProtocolError(f"no line end after a chunk but {line[:100]!r}")
            self._state = "size"
        elif line == b"\r\n":
            self.done = True
        else:
            self.trailers += line


def request(
    port: int,
    method: str,
    target: Text,
    headers: Headers = (),
    body: bytes | Iterable[bytes] = b"",
    *,
    version: str = "HTTP/1.1",
    deadline: float = DEADLINE,
) -> Response:
    """One request on a connection of its own; `close()` the response, or let it go."""
    connection = Connection(port)
    try:
        return connection.request(method, target, headers, body, version=version, deadline=deadline)
    except BaseException:
        connection.close()
        raise


class Client:
    """Requests to one server one after another, on one connection as long as it can be kept."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = 0
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def connection(self) -> Connection:
        """The one at hand if another request may be sent on it, else a new one.

        One that has been idle for a second is replaced: the server may be closing it right now.
        """
        held = self._connection
        if held is None or not held.reusable or time.monotonic() - held.last_used > 1:
            self.close()
            held = self._connection = Connection(self.port)
            self.connections += 1
        return held

    def request(
        self,
        method: str,
        target: Text,
        headers: Headers = (),
        body: bytes | Iterable[bytes] = b"",
        *,
        deadline: float = DEADLINE,
    ) -> Response:
        return self.connection().request(method, target, headers, body, deadline=deadline)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
