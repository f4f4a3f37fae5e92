"""A scriptable upstream: a raw HTTP/1.1 server in threads of the test process.

It reads requests as bytes and writes what it is told, right or wrong: half a chunk, a lying
Content-Length, a reset. It interprets nothing that the test does not ask for.

Two ways to script it. A *handler* is a function of an Exchange that runs in the connection's
thread::

    path = upstream.serve(lambda ex: ex.reply(b"hello"))

*By hand* the test's own thread plays the upstream, which makes lock-step tests linear::

    path = upstream.by_hand()
    connection.send("GET", "/v1" + path)
    ex = upstream.next(path)
    ex.head(headers=[("Content-Type", "text/event-stream")])
    response = connection.read_head()
    ex.send(b"data: 1\\n\\n")
    assert response.read_event() == b"data: 1\\n\\n"
    ex.end()
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import ssl
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

from harness import DEADLINE, Deadline, DeadlineExceeded

Framing = Literal["chunked", "length", "close", "none"]
Header = tuple[str | bytes, str | bytes]

# A handler that waits for something that never comes: below the watchdog's 60 s, so that it is
# the handler that is named.
_PATIENCE = 50.0


class PeerGone(Exception):
    """The relay has closed the connection that a handler is still writing to."""


def _bytes(value: str | bytes) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else value


class Exchange:
    """One request and the answer to it.

    Read: `method`, `target`, `version` (bytes as on the wire), `headers` (list of name and value,
    in order), `body`, `whole` (False: the request was cut short), `connection` and `number` (the
    connection, and the request on it, both counted from 1), `written` (bytes that the kernel has
    taken so far, framing included: it stands still while the relay does not read).
    """

    def __init__(
        self,
        sock: socket.socket,
        connection: int,
        number: int,
        request_line: bytes,
        stopping: threading.Event,
    ) -> None:
        self._sock = sock
        self._stopping = stopping
        self._framing: Framing | None = None
        self._due = 0
        self.connection = connection
        self.number = number
        self.request_line = request_line
        parts = request_line.split(b" ")
        self.method, self.target, self.version = parts if len(parts) == 3 else (b"", request_line, b"")
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.whole = False
        self.arrived = time.monotonic()
        self.written = 0
        self.finished = threading.Event()  # nothing more will be written
        self.keep_alive = False

    def __repr__(self) -> str:
        return f"<Exchange {self.connection}.{self.number} {self.request_line!r}>"

    @property
    def path(self) -> str:
        return self.target.partition(b"?")[0].decode("latin-1")

    def header(self, name: str) -> bytes | None:
        """The first value of a request header."""
        return next(iter(self.all(name)), None)

    def all(self, name: str) -> list[bytes]:
        wanted = name.lower().encode("latin-1")
        return [value for key, value in self.headers if key.lower() == wanted]

    # Answering

    def head(
        self,
        status: int = 200,
        reason: str | bytes = "OK",
        headers: Iterable[Header] = (),
        framing: Framing = "chunked",
        length: int | None = None,
    ) -> None:
        """Status line and headers, at once. Only the framing's own header is added.

        `length`: the Content-Length to declare, true or not. "none": no framing header and no
        body (HEAD, 204, 304).
        """
        self._framing = framing
        lines = [b"HTTP/1.1 %d %s" % (status, _bytes(reason))]
        lines += [_bytes(name) + b": " + _bytes(value) for name, value in headers]
        if framing == "chunked":
            lines.append(b"Transfer-Encoding: chunked")
        elif framing == "length":
            if length is None:
                raise ValueError("framing 'length' needs a length")
            self._due = length
            lines.append(b"Content-Length: %d" % length)
        self.raw(b"\r\n".join(lines) + b"\r\n\r\n")

    def send(self, data: bytes) -> None:
        """Body bytes, as one chunk in chunked framing; nothing if empty."""
        if not data:
            return
        if self._framing == "chunked":
            self.raw(b"%x\r\n" % len(data) + data + b"\r\n")
        elif self._framing in ("length", "close"):
            self._due -= len(data)
            self.raw(data)
        else:
            raise ValueError(f"no body with framing {self._framing!r}")

    def raw(self, data: bytes) -> None:
        """Bytes onto the wire as they are. Raises PeerGone when there is nobody to take them."""
        view = memoryview(data)
        while view:
            try:
                taken = self._sock.send(view)
            except TimeoutError:
                raise DeadlineExceeded(f"the relay takes no byte of {self!r}") from None
            except OSError as error:  # SSL errors are OSErrors too
                self.finished.set()
                raise PeerGone(str(error)) from None
            self.written += taken
            view = view[taken:]

    def end(self) -> None:
        """The proper end of the body: last chunk, full length, or FIN."""
        if self._framing == "chunked":
            self.raw(b"0\r\n\r\n")
        elif self._framing == "length" and self._due:
            raise ValueError(f"{self._due} bytes are missing: abort() if that is the point")
        elif self._framing == "close":
            self._close()
        elif self._framing is None:
            raise ValueError("no head was sent")
        self.finished.set()

    def reply(
        self,
        body: bytes = b"",
        status: int = 200,
        reason: str | bytes = "OK",
        headers: Iterable[Header] = (),
        framing: Framing = "length",
    ) -> None:
        """A whole answer."""
        self.head(status, reason, headers, framing, len(body))
        if framing != "none":
            self.send(body)
        self.end()

    def abort(self) -> None:
        """Close with FIN where the body stands: everything sent arrives, no end does."""
        self._close()
        self.finished.set()

    def reset(self) -> None:
        """Close with RST. What the relay's kernel has not received by now is lost."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        _discard(self._sock)
        self.finished.set()

    def _close(self) -> None:
        if isinstance(self._sock, ssl.SSLSocket) and self._framing == "close":
            # Without a close_notify a TLS peer must take the end for a cut.
            with contextlib.suppress(OSError, ValueError):
                self._sock.settimeout(0.2)
                self._sock.unwrap()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        _discard(self._sock)

    # Waiting

    def wait(self, event: threading.Event, deadline: float = DEADLINE) -> None:
        """Wait for the test's word."""
        clock = Deadline(deadline, f"the word for {self!r} to go on")
        while not event.wait(0.1):
            if self._stopping.is_set():
                raise PeerGone("the upstream is being stopped")
            clock.left()

    def wait_gone(self, deadline: float = DEADLINE) -> float:
        """Wait until the relay has closed this connection; gives the monotonic time of it."""
        until = time.monotonic() + deadline
        # A second at a time: the descriptor may be closed here meanwhile, by the handler, and be another connection's.
        while not self._is_gone(min(1.0, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise DeadlineExceeded(f"{self!r} still had its connection after {deadline:g} s")
        now = time.monotonic()
        self.finished.set()
        self.keep_alive = False
        return now

    @property
    def gone(self) -> bool:
        """Whether the relay has closed this connection by now."""
        return self._is_gone(0)

    def _is_gone(self, within: float) -> bool:
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        except ValueError:  # closed here
            return True
        return bool(poll.poll(within * 1000))


Handler = Callable[[Exchange], None]


class Upstream:
    """The server. A context manager; leaves no thread and no socket behind.

    `handler` answers what no path was given for (by default 404, and an empty list of models for
    the relay's health probe). `tls`: a server context. `sndbuf`: the kernel's send buffer, small
    for tests of backpressure. `base_path` comes before every path, in `base_url` too.

    `errors` are the tracebacks of handlers that failed, which `check()` (and the end of the `with`)
    raises; `accepted` and `open` count connections.
    """

    def __init__(
        self,
        handler: Handler | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        base_path: str = "",
        sndbuf: int | None = None,
        patience: float = DEADLINE,
    ) -> None:
        self.handler: Handler = handler or _not_found
        self.base_path = base_path
        self.errors: list[str] = []
        self.accepted = 0
        self.open = 0
        self._tls = tls
        self._host = host
        self._sndbuf = sndbuf
        self._patience = patience  # seconds that a write may stand still
        self._routes: dict[str, Handler] = {}
        self._named: set[str] = set()  # of its paths, those that a test has named
        self._numbers = itertools.count(1)
        self._seen: dict[str, list[Exchange]] = {}
        self._taken: dict[str, int] = {}
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._live: set[Exchange] = set()
        self._threads: set[threading.Thread] = set()
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._sndbuf is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._sndbuf)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="upstream-accept", daemon=True)
        self._acceptor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopping.set()
            sockets, live, threads = list(self._sockets), list(self._live), list(self._threads)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for exchange in live:
            exchange.finished.set()
        for thread in [self._acceptor, *threads]:
            thread.join(DEADLINE)
        if kind is None:
            self.check()

    @property
    def base_url(self) -> str:
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{self._host}:{self.port}{self.base_path}"

    def check(self) -> None:
        """Raise what handlers have raised since the last time."""
        with self._changed:
            errors, self.errors = self.errors, []
        if errors:
            raise AssertionError("a handler of the upstream failed:\n" + "\n".join(errors))

    # Scripting

    def serve(self, handler: Handler, path: str | None = None) -> str:
        """Answer a path with `handler`, a new path if none is named; gives the path.

        `path` is what follows the mount and the base path: call the relay at "/v1" + path.
        """
        if path is None:
            path = f"/scripted/{next(self._numbers)}"
        else:
            self._named.add(path)
        with self._changed:
            self._routes[self.base_path + path] = handler
        return path

    def by_hand(self, path: str | None = None) -> str:
        """A path whose requests the test answers itself, from `next(path)`."""
        return self.serve(_by_hand, path)

    def forget(self, path: str) -> None:
        """Drop a path and its recorded exchanges (they hold bodies)."""
        with self._changed:
            self._routes.pop(self.base_path + path, None)
            self._seen.pop(self.base_path + path, None)
            self._taken.pop(path, None)

    def forget_named(self) -> None:
        """Drop every path that somebody has named, such as the API's own."""
        while self._named:
            self.forget(self._named.pop())

    # Looking

    def seen(self, path: str | None = None) -> list[Exchange]:
        """The requests so far, of one path or of all, in the order in which they arrived."""
        with self._changed:
            if path is not None:
                return list(self._seen.get(self.base_path + path, ()))
            return sorted(itertools.chain(*self._seen.values()), key=lambda ex: ex.arrived)

    def wait_for(self, n: int, path: str | None = None, deadline: float = DEADLINE) -> Exchange:
        """The n-th request (counted from 1), once it is there."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.seen(path)) >= n, deadline):
                raise DeadlineExceeded(
                    f"request {n} to {path or 'the upstream'} did not arrive within {deadline:g} s;"
                    f" the last that did: {self.seen()[-5:]!r}"
                )
            return self.seen(path)[n - 1]

    def next(self, path: str, deadline: float = DEADLINE) -> Exchange:
        """The next request to a path that `next` has not given out yet."""
        n = self._taken.get(path, 0) + 1
        exchange = self.wait_for(n, path, deadline)
        self._taken[path] = n
        return exchange

    def wait_open(self, n: int, deadline: float = DEADLINE) -> float:
        """Wait until exactly `n` connections are open; gives the monotonic time.

        A connection whose handler is waiting for the test counts as open until it is done.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.open == n, deadline):
                raise DeadlineExceeded(f"{self.open} connections are open, not {n}")
            return time.monotonic()

    # Serving

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._stopping.is_set():
                    sock.close()
                    return
                self.accepted += 1
                self.open += 1
                number = self.accepted
                self._sockets.add(sock)
                thread = threading.Thread(
                    target=self._serve, args=(sock, number), name=f"upstream-{number}", daemon=True
                )
                self._threads.add(thread)
                self._changed.notify_all()
            thread.start()

    def _serve(self, plain: socket.socket, connection: int) -> None:
        sock = plain
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(self._patience)
            if self._tls is not None:
                # Replaces `plain`, which is detached: the set follows, so that stopping reaches it.
                sock = self._tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
                with self._changed:
                    self._sockets.add(sock)
                sock.do_handshake()
            self._converse(sock, connection)
        except OSError:
            pass  # the peer refused the certificate, or left: for the relay to notice
        except Exception:  # noqa: BLE001 - check() raises it where the test sees it
            self._failed()
        finally:
            _discard(sock)
            with self._changed:
                self._sockets -= {plain, sock}
                self._threads.discard(threading.current_thread())
                self.open -= 1
                self._changed.notify_all()

    def _converse(self, sock: socket.socket, connection: int) -> None:
        incoming = _Incoming(sock)
        for number in itertools.count(1):
            exchange = self._request(incoming, sock, connection, number)
            if exchange is None or not exchange.whole:
                return
            try:
                with self._changed:
                    handler = self._routes.get(exchange.path, self.handler)
                handler(exchange)
                assert exchange.finished.is_set(), f"the handler left {exchange!r} without an end"
            except PeerGone:
                return
            except Exception:  # noqa: BLE001 - check() raises it where the test sees it
                if not self._stopping.is_set():
                    self._failed()
                return
            finally:
                with self._changed:
                    self._live.discard(exchange)
            if not exchange.keep_alive or sock.fileno() < 0:
                return

    def _request(self, incoming: _Incoming, sock: socket.socket, connection: int, number: int) -> Exchange | None:
        sock.settimeout(None)  # an idle connection waits as long as it is kept
        head = incoming.head()
        sock.settimeout(self._patience)
        if head is None:
            return None
        request_line, *lines = head.split(b"\r\n")
        exchange = Exchange(sock, connection, number, request_line, self._stopping)
        for line in lines:
            name, _, value = line.partition(b":")
            exchange.headers.append((name, value.strip(b" \t")))
        exchange.keep_alive = (exchange.header("Connection") or b"").lower() != b"close"
        if (exchange.header("Expect") or b"").lower() == b"100-continue":
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = exchange.header("Content-Length")
        if exchange.header("Transfer-Encoding") is not None:
            body = incoming.chunked()
        else:
            body = incoming.exactly(int(length)) if length else b""
        exchange.whole = body is not None
        exchange.body = body or b""
        with self._changed:
            self._live.add(exchange)
            if self._stopping.is_set():
                exchange.finished.set()
            self._seen.setdefault(exchange.path, []).append(exchange)
            self._changed.notify_all()
        return exchange

    def _failed(self) -> None:
        with self._changed:
            self.errors.append(traceback.format_exc())


class _Incoming:
    """Buffered reading of requests; None for what was cut short."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def _more(self) -> bool:
        try:
            data = self._sock.recv(65536)
        except OSError:
            return False
        self._buffer += data
        return bool(data)

    def _until(self, mark: bytes) -> bytes | None:
        while (at := self._buffer.find(mark)) < 0:
            if not self._more():
                return None
        found = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return found

    def head(self) -> bytes | None:
        return self._until(b"\r\n\r\n")

    def exactly(self, n: int) -> bytes | None:
        while len(self._buffer) < n:
            if not self._more():
                return None
        found = bytes(self._buffer[:n])
        del self._buffer[:n]
        return found

    def chunked(self) -> bytes | None:
        body = b""
        while (line := self._until(b"\r\n")) is not None:
            size = int(line.partition(b";")[0], 16)
            if size == 0:
                while (line := self._until(b"\r\n")) is not None:  # trailers
                    if not line:
                        return body
                return None
            piece = self.exactly(size)
            if piece is None or self.exactly(2) != b"\r\n":
                return None
            body += piece
        return None


def _discard(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.close()


def _not_found(exchange: Exchange) -> None:
    headers = [("Content-Type", "application/json")]
    if exchange.method == b"GET" and exchange.path.endswith("/models"):
        exchange.reply(b'{"object":"list","data":[]}', headers=headers)
    else:
        exchange.reply(b'{"error":{"message":"unscripted"}}', 404, "Not Found", headers)


def _by_hand(exchange: Exchange) -> None:
    # What the relay has left needs no end: its test is over, and others of its module may go on for longer than this.
    if not exchange.finished.wait(_PATIENCE) and not exchange.gone:
        raise AssertionError(f"the test never ended {exchange!r}")
    exchange.finished.set()


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A loopback port that neither accepts nor refuses: a connect to it hangs."""
    fillers: list[socket.socket] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        try:
            clock = Deadline(DEADLINE, "a full listen queue")
            dropped = 0
            while dropped < 2:  # SYNs in a row: one may only have been slow
                clock.left()
                filler = socket.socket()
                fillers.append(filler)
                filler.settimeout(0.2)
                try:
                    filler.connect(address)
                    dropped = 0
                except TimeoutError:
                    dropped += 1
            yield address[1]
        finally:
            for filler in fillers:
                filler.close()
