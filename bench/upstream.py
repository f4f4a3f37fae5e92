"""The upstream: serves the streams that requests ask for, over HTTP and HTTPS. One thread, plain epoll.

    python -m bench.upstream [CERTIFICATE KEY]

Prints one JSON line with its ports, and ends when its standard input does. Does not judge who asks: any POST that
carries a wish (bench.work) gets its stream. `GET /bench/stats` says what it has served, and `GET /bench/finish` ends
all streams that have no number of events, each at its next event.
"""

from __future__ import annotations

import gc
import json
import resource
import select
import socket
import ssl
import sys
from functools import lru_cache
from heapq import heappop, heappush
from time import monotonic_ns
from typing import Any

from bench import work

_WAIT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
#: Of a stream without gaps: what is written before the next one has its turn, in bytes or in events.
_SLICE, _TURN = 256 * 1024, 32
#: One read of a request.
_READ = 16 * 1024
_JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


class Connection:
    """One connection and the stream on it."""

    __slots__ = ("chunks", "close_after", "due", "epoch", "gap", "inbox", "last", "number", "out", "shaking", "sock",
                 "streaming", "watched")  # fmt: skip

    def __init__(self, sock: Any, *, shaking: bool) -> None:
        self.sock = sock
        self.shaking = shaking  # in its TLS handshake
        self.inbox = b""
        self.out = memoryview(b"")  # what could not be written yet
        self.chunks: list[bytes] | None = None  # of a stream without gaps
        self.watched = False  # for being writable
        self.streaming = False
        self.number = self.last = self.gap = self.due = self.epoch = 0
        self.close_after = False


class Upstream:
    """All connections, and the times at which their streams' next events are due."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._epoll = select.epoll()
        self._tls = tls
        self._listeners: dict[int, tuple[socket.socket, bool]] = {}
        self._connections: dict[int, Connection] = {}
        self._due: list[tuple[int, int, Connection]] = []
        self._order = 0
        self._epoch = 0  # streams without a number of events belong to one, and end with it
        self._accepted = self._streams = self._open = self._aborted = 0

    def listen(self, *, tls: bool) -> int:
        """Open a port on loopback; gives its number."""
        sock = socket.create_server(("127.0.0.1", 0), backlog=8192)
        sock.settimeout(0)
        self._listeners[sock.fileno()] = sock, tls
        self._epoll.register(sock, select.EPOLLIN)
        return int(sock.getsockname()[1])

    def serve(self) -> None:
        """Serve until standard input ends."""
        stdin = sys.stdin.fileno()
        self._epoll.register(stdin, select.EPOLLIN | select.EPOLLHUP)
        waited_for = [self._epoll.fileno()]
        due, connections, poll = self._due, self._connections, self._epoll.poll
        while True:
            # select takes microseconds where epoll's own time limit takes milliseconds.
            select.select(waited_for, (), (), max(due[0][0] - monotonic_ns(), 0) / 1e9 if due else None)
            for fd, mask in poll(0):
                connection = connections.get(fd)
                if connection is not None:
                    self._happened(connection, mask)
                elif fd == stdin:
                    return
                else:
                    listener, tls = self._listeners[fd]
                    self._accept(listener, tls=tls)
            now = monotonic_ns()
            budget = 1000  # so that requests are read however late it is
            while due and due[0][0] <= now and budget:
                budget -= 1
                connection = heappop(due)[2]
                if connection.streaming:
                    self._emit(connection)

    def _accept(self, listener: socket.socket, *, tls: bool) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            self._accepted += 1
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls and self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._connections[sock.fileno()] = Connection(sock, shaking=tls)
            self._epoll.register(sock, select.EPOLLIN)

    def _happened(self, connection: Connection, mask: int) -> None:
        try:
            if mask & ~select.EPOLLOUT:
                self._read(connection)
            if mask & select.EPOLLOUT and connection.sock is not None:
                self._write_rest(connection)
        except _WAIT:
            pass
        except OSError:
            self._close(connection)

    def _read(self, connection: Connection) -> None:
        if connection.shaking:
            connection.sock.do_handshake()
            connection.shaking = False
        while True:
            data = connection.sock.recv(_READ)
            if not data:
                self._close(connection)
                return
            connection.inbox += data
            if connection.streaming:
                continue
            request = _whole_request(connection.inbox)
            if request:
                connection.inbox = b""
                self._answer(connection, request)
                if connection.sock is None:
                    return
            if self._tls is None or not isinstance(connection.sock, ssl.SSLSocket):
                return

    def _answer(self, connection: Connection, request: bytes) -> None:
        wish = work.WISH.search(request)
        if wish is None:
            self._answer_json(connection, request)
            return
        now = monotonic_ns()
        events, gap_us, at_us, close, pouring = map(int, wish.groups())
        connection.number, connection.last, connection.gap = 0, events, gap_us * 1000
        connection.epoch = self._epoch
        connection.close_after = close == 1
        connection.streaming = True
        self._streams += 1
        self._open += 1
        self._write(connection, work.HEAD + (b"Connection: close\r\n\r\n" if close else b"\r\n"))
        if gap_us == 0:
            connection.chunks = (work.flood_chunks, _in_one, _large)[pouring](events)
            self._watch(connection)
            return
        connection.due = now
        if at_us >= 0:
            # Its own time within a gap, on a clock that all streams share.
            connection.due = now - now % connection.gap + at_us * 1000
            if connection.due < now:
                connection.due += connection.gap
        self._schedule(connection)

    def _answer_json(self, connection: Connection, request: bytes) -> None:
        answer: dict[str, Any] = {"object": "list", "data": []}
        if request.startswith(b"GET /bench/finish"):
            self._epoch += 1
        if request.startswith(b"GET /bench/"):
            answer = {
                "accepted": self._accepted, "streams": self._streams, "open": self._open, "aborted": self._aborted,
            }  # fmt: skip
        body = json.dumps(answer).encode()
        self._write(connection, _JSON % (len(body), body))

    def _schedule(self, connection: Connection) -> None:
        self._order += 1
        heappush(self._due, (connection.due, self._order, connection))

    def _emit(self, connection: Connection) -> None:
        number = connection.number
        if number == connection.last if connection.last else connection.epoch != self._epoch:
            self._finish(connection)
            return
        connection.number = number + 1
        connection.due += connection.gap
        try:
            self._write(connection, work.event_chunk(number, monotonic_ns()))
        except OSError:
            self._close(connection)
            return
        if not connection.watched:
            self._schedule(connection)

    def _finish(self, connection: Connection) -> None:
        connection.streaming = False
        self._open -= 1
        try:
            self._write(connection, work.END_CHUNK)
        except OSError:
            self._close(connection)
            return
        if connection.close_after and not connection.watched:
            self._close(connection)

    def _write(self, connection: Connection, data: bytes) -> None:
        if connection.watched:
            connection.out = memoryview(bytes(connection.out) + data)
            return
        try:
            sent = connection.sock.send(data)
        except _WAIT:
            sent = 0
        if sent < len(data):
            connection.out = memoryview(data)[sent:]
            self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        connection.watched = True
        self._epoll.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)

    def _write_rest(self, connection: Connection) -> None:
        if connection.out:
            connection.out = connection.out[connection.sock.send(connection.out[:_SLICE]) :]
        if not connection.out and connection.chunks is not None:
            self._pour(connection, connection.chunks)
        if connection.out or connection.chunks is not None:
            return
        connection.watched = False
        self._epoll.modify(connection.sock, select.EPOLLIN)
        if connection.streaming:
            self._schedule(connection)
        elif connection.close_after:
            self._close(connection)

    def _pour(self, connection: Connection, chunks: list[bytes]) -> None:
        """Write some events of a stream without gaps, each by itself."""
        send = connection.sock.send
        stop = min(connection.number + _TURN, len(chunks))
        while connection.number < stop and not connection.out:
            data = chunks[connection.number]
            sent = send(data)
            connection.number += 1
            if sent < len(data):
                connection.out = memoryview(data)[sent:]
        if connection.number == len(chunks):
            connection.chunks = None
            connection.streaming = False
            self._open -= 1

    def _close(self, connection: Connection) -> None:
        if connection.sock is None:
            return
        if connection.streaming:
            connection.streaming, connection.chunks = False, None
            self._open -= 1
            self._aborted += 1
        del self._connections[connection.sock.fileno()]
        if isinstance(connection.sock, ssl.SSLSocket):
            # TLS says goodbye before it goes; the other side's is not waited for.
            try:
                connection.sock.unwrap()
            except (OSError, ValueError):
                pass
        connection.sock.close()
        connection.sock = None


@lru_cache(maxsize=2)
def _in_one(events: int) -> list[bytes]:
    return [b"".join(work.flood_chunks(events))]


def _large(events: int) -> list[bytes]:
    return [*[work.large_chunk()] * events, work.END_CHUNK]


def _whole_request(inbox: bytes) -> bytes:
    """The request, if all of it is there. Relays write bodies with a length, or in chunks."""
    head, found, body = inbox.partition(b"\r\n\r\n")
    if not found:
        return b""
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return inbox if body.endswith(b"0\r\n\r\n") else b""
    _, _, length = lower.partition(b"\r\ncontent-length:")
    return inbox if len(body) >= int(length.partition(b"\r\n")[0] or 0) else b""


def main() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    tls = None
    if len(sys.argv) == 3:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(sys.argv[1], sys.argv[2])
    upstream = Upstream(tls)
    ports = {"port": upstream.listen(tls=False), "tls_port": upstream.listen(tls=True) if tls else 0}
    print(json.dumps(ports), flush=True)
    gc.disable()  # nothing here needs it, and its pauses would be everybody's latency
    upstream.serve()


if __name__ == "__main__":
    main()
