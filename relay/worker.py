"""gunicorn's gevent worker, with what a server of long streams needs: a drain, and errors that say what was wrong.

`worker_class = "relay.worker.Worker"`, which the shipped gunicorn.conf.py sets. A mounted relay runs under gunicorn's
own worker as well; then a stopping worker lets streams run into `graceful_timeout` and kills them.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import sys
import time
import weakref
from typing import Any

import gevent
import gevent.socket
from gunicorn.http import errors as http_errors
from gunicorn.http import message as http_message
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.workers import ggevent

from relay import errors
from relay.observe import log
from relay.observe.metrics import metrics
from relay.service import load, open_streams
from relay.shared import lame_duck
from relay.stream.drain import drain
from relay.stream.waiting.client_socket import break_off, gone
from relay.version import __version__, on_disk

#: Seconds between two looks at idle connections while the worker drains.
_LOOK = 0.1
#: Seconds that an idle connection is kept then: longer than the proxy in front keeps it (3 s in
#: nginx/snippets/relay-upstream.conf). The side that closes first must be the one that sends requests, or one of them
#: meets a closed connection. Enough for a request that comes in pieces, too.
_KEEP_IDLE = 3.5
#: Seconds after which an answer says of its connection what is true then, and not what was true when it was asked for.
_SHORT = 1.0
#: Seconds that streams have to send their error frame before a write that is stuck is given up.
_LAST_WORD = 1.0

#: Bytes of a request's head, and seconds from its first byte to its last.
_MOST_HEAD, _HEAD_TIME = 64 * 1024, 15.0
#: Seconds for the rest of a body that was refused unread; then the connection is closed.
_REST_TIME = 15.0


class HeadTooLarge(http_errors.ParseException):  # type: ignore[misc]
    """A request's head is longer in all than any honest one."""


class HeadTooSlow(http_errors.ParseException):  # type: ignore[misc]
    """A request's head dribbles."""


#: What gunicorn's parser refuses, and how that is told. Its own message would repeat the request line, query and all.
_REFUSALS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (http_errors.LimitRequestLine, 414, "URI Too Long", "the request line is longer than the server takes"),
    (http_errors.LimitRequestHeaders, 431, "Request Header Fields Too Large", "there are too many or too long headers"),
    (http_errors.UnsupportedTransferCoding, 501, "Not Implemented", "only the transfer coding chunked is understood"),
    (HeadTooLarge, 431, "Request Header Fields Too Large", "the request's head is over 64 KiB"),
    (HeadTooSlow, 408, "Request Timeout", "the request's head did not come within 15 s"),
    (http_errors.ExpectationFailed, 417, "Expectation Failed", "only 100-continue may be expected"),
    (http_errors.InvalidHTTPVersion, 400, "Bad Request", "the request is not in HTTP/1.1 or HTTP/1.0"),
    (http_errors.InvalidHeaderName, 400, "Bad Request", "a header's name is malformed"),
    (http_errors.InvalidHeader, 400, "Bad Request", "a header is malformed or contradicts another"),
    (http_errors.ParseException, 400, "Bad Request", "the request is not HTTP"),
)

#: Errors of a client's connection: whatever a network may do. gunicorn logs a traceback for all but three of them.
_NETWORK = frozenset(
    getattr(errno, name)
    for name in (
        "EPIPE", "ECONNRESET", "ECONNABORTED", "ENOTCONN", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "ENETDOWN",
        "EBADF", "ESHUTDOWN", "EPROTO",
    )
)  # fmt: skip


# gunicorn refuses a request target with bytes beyond ASCII (RFC 3986 does not know them). Browsers and curl send them
# when a person types them, nginx passes them on and upstreams take them; they go upstream as they came.
http_message.RFC9112_TARGET_INVALID = re.compile(r"[^\x21-\x7e\x80-\xff]")


class Worker(ggevent.GeventWorker):  # type: ignore[misc]
    """A gevent worker that ends its streams with a word of explanation before gunicorn ends them without."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients: set[Any] = set()  # their connections
        self._idle: dict[Any, float] = {}  # those without a request, and since when (monotonic)
        self._load = load.Load(self.age)
        self._loop_is_over = False
        self._lame = False  # since it was looked at last
        logging.getLogger("gunicorn.error").addFilter(_not_the_network)

    def load_wsgi(self) -> None:
        _count_as(os.getpid())
        if (installed := on_disk()) != __version__:
            self.log.warning(
                "relay %s is installed and this worker runs %s, perhaps with parts of the other; restart the service",
                installed,
                __version__,
            )
        super().load_wsgi()
        open_streams.serve()
        # With thousands of streams open, a full collection stops them all for 100 ms and more. What is there now stays
        # for good, so it is not looked at again; and streams are freed by their reference counts, not by the collector.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)

    # Idle connections.

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        if type(client) is gevent.socket.socket:
            client.__class__ = _Client
        self._clients.add(client)
        self._load.set(len(self._clients))
        self._idle[client] = time.monotonic()
        _heads[client] = _Head()
        try:
            super().handle(listener, client, addr)
        finally:
            self._clients.discard(client)
            if not drain.draining:
                self._load.set(len(self._clients))
            self._idle.pop(client, None)
            _held.pop(client, None)
            _heads.pop(client, None)
            _waiting.discard(client)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        self._idle.pop(sock, None)
        if (head := _heads.get(sock)) is not None:
            head.coming = False
        _check_coding(req)
        req.version = min(req.version, (1, 1))  # gunicorn would answer HTTP/1.2 in HTTP/1.2 (RFC 9110 section 2.5)
        _untie(req)
        if not req.should_close():
            req.should_close = _Closes(self)
        waits = getattr(req, "_expected_100_continue", False) and isinstance(sock, _Client)
        if waits:
            # gunicorn would ask for the body here. It is asked for once there is a slot (say_continue).
            req._expected_100_continue = False  # noqa: SLF001
            _waiting.add(sock)
        super().handle_request(listener_name, req, sock, addr)
        if waits and sock in _waiting:
            raise StopIteration  # refused without its body, which may come or not: nothing can follow here
        now = time.monotonic()
        if now >= drain.at:
            # A head that went out before the drain had no `Connection: close`; what came next here would be too late.
            raise StopIteration
        _discard(req.body)
        self._idle[sock] = now
        if head is not None:
            head.begin()

    # Stopping.

    def run(self) -> None:
        load.Server.load = self._load
        ggevent.StreamServer = load.Server  # gunicorn has no setting for it
        gevent.spawn(self._drain_when_stopped)
        if self.cfg.reload:
            self.cfg.set("worker_int", self._drain_before(self.cfg.worker_int))
        try:
            super().run()
        finally:
            self._loop_is_over = True

    def notify(self) -> None:
        """Tell the master that this worker lives. Without a master it drains: gunicorn would exit at once."""
        if self.ppid == os.getppid():
            super().notify()
            if lame_duck.lasts() != self._lame:
                self._lame = not self._lame
                self.log.info("Not ready any more, still accepting" if self._lame else "Ready again")
        elif not drain.draining:
            self.log.warning("The master is gone: this worker drains and ends")
            self.handle_exit(0, None)

    @property
    def leaves(self) -> bool:
        """Whether it is about to stop, so that no connection is to be used again."""
        return not self.alive or self._lame or lame_duck.stopping()

    def _drain_when_stopped(self) -> None:
        """Whatever stops a worker, such as `max_requests`, clears `alive`, and not all of it is a signal."""
        while not self._loop_is_over and not drain.draining:
            if not self.alive:
                drain.at = time.monotonic() + drain.seconds
                gevent.spawn(self._drain)
                return
            gevent.sleep(_LOOK)

    def _drain_before(self, then: Any) -> Any:
        """The hook that gunicorn calls before it ends a worker whose code has changed (`--reload`)."""

        def stop(worker: Any) -> None:
            gevent.sleep(2 * _LOOK)  # until the drain has begun
            while drain.open and time.monotonic() < drain.at + 3 * _LAST_WORD:
                gevent.sleep(_LOOK)
            then(worker)

        return stop

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT or SIGQUIT: end at once. This runs in a signal handler, so it only sets things off."""
        gevent.spawn(self._quit)

    def _quit(self) -> None:
        """What gunicorn does, but for an exit that may come when the worker is exiting: that is a traceback."""
        self.alive = False
        self.cfg.worker_int(self)
        gevent.sleep(0.1)
        if not self._loop_is_over:
            sys.exit(0)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM, from the master: it stops or reloads. This runs in a signal handler, so it only sets things off."""
        super().handle_exit(sig, frame)
        if not drain.draining:
            drain.at = time.monotonic() + drain.seconds
            gevent.spawn(self._drain)

    def _drain(self) -> None:
        """Let streams go on until the drain's end, then end them; meanwhile close what is idle."""
        drain.begin(drain.at)
        load.forget(self.age)
        while True:
            now = time.monotonic()
            for client, since in list(self._idle.items()):
                # One with a request on its way in is not idle; it is served, and closed by its answer.
                if now >= min(since + _KEEP_IDLE, drain.at) and gone(client) is False:
                    try:
                        client.shutdown(2)
                    except OSError:
                        pass
            if now >= drain.at + _LAST_WORD:
                drain.break_writes()
            if now >= drain.at + 3 * _LAST_WORD:
                # All streams are over. A request whose body does not come never became one.
                for client in list(self._clients):
                    break_off(client)
            gevent.sleep(_LOOK)

    # Refusing.

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer a request that gunicorn cannot parse as the relay answers everything: with its JSON."""
        request_id = os.urandom(16).hex()
        for refusal in _REFUSALS:
            kind, status, reason, message = refusal
            if isinstance(exc, kind):
                break
        else:
            status, reason = 500, "Internal Server Error"
            message = "the relay failed; its log says why under this request id"
            self.log.error("Request %s failed in the server", request_id, exc_info=exc)
        error = errors.BadRequest(message) if status < 500 else errors.RelayError(message)
        error.status = status
        metrics().refused(error.code)
        log.refused(error, request_id, "", str((addr or ("unix",))[0]), "")
        body = error.json(request_id).encode()
        head = (
            f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\n\r\n"
        )
        try:
            client.settimeout(1.0)
            client.sendall(head.encode() + body)
        except OSError:
            pass  # the client did not wait for it


def _check_coding(req: Any) -> None:
    """Refuse a body in another coding than chunked, which gunicorn would pass on coded (RFC 9112 section 6.1)."""
    for name, value in req.headers:
        if name == "TRANSFER-ENCODING" and value.strip().lower() != "chunked":
            raise http_errors.UnsupportedTransferCoding(value)


def _discard(body: Any) -> None:
    """Read what an answer left of its request: the next head begins behind it."""
    reader = body.reader
    if isinstance(reader, LengthReader) and not reader.length:
        return  # nearly always
    whole = False
    with gevent.Timeout(_REST_TIME, exception=False):
        try:
            piece = body.read(_MOST_HEAD)
            while piece:
                piece = body.read(_MOST_HEAD)
            whole = True
        except http_errors.ParseException:
            pass  # where the next request begins is unknown
    if not whole:
        raise StopIteration


def _untie(req: Any) -> None:
    """Let a request with a chunked body be freed without the collector: its body's reader holds it, and it the body."""
    reader = req.body.reader
    if isinstance(reader, ChunkedReader):
        reader.req = weakref.proxy(req)


def _count_as(pid: int) -> None:
    """Tell prometheus_client which process this is: it would ask the kernel at each step of each metric."""
    try:
        from prometheus_client import values
    except ModuleNotFoundError:
        return
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        values.ValueClass = values.MultiProcessValue(lambda: pid)  # type: ignore[no-untyped-call]


class _Closes:
    """What a request's answer says of its connection, asked when its head goes out and again at its end: the same both
    times. A client that was not told sends its next request just when the connection is closed."""

    __slots__ = ("_began", "_said", "_worker")

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._began = time.monotonic()
        self._said: bool | None = worker.leaves or None

    def __call__(self) -> bool:
        if self._said is None:
            # A short request is as it began: an answer that says "ready" does not close.
            self._said = time.monotonic() - self._began > _SHORT and self._worker.leaves
        return self._said


class _Head:
    """The head of a client's next request: how much of it has come, and since when."""

    __slots__ = ("after", "began", "coming", "size", "tail")

    def __init__(self) -> None:
        # The last bytes that were read. gunicorn may hold the beginning of a head already, which came with what was
        # before it, so that the end of a head may lie in what is read and the bytes before.
        self.tail = b""
        self.begin()

    def begin(self) -> None:
        """What is read from now on is a head."""
        self.coming = True
        self.began: float | None = None  # monotonic seconds
        self.size = 0
        self.after = 0  # bytes that have come with its end


_heads: dict[Any, _Head] = {}  # by client
#: The clients that send their body once they are told to (`Expect: 100-continue`).
_waiting: set[Any] = set()
#: What `join_next` holds back of each client's: None while nothing has been written yet.
_held: dict[_Client, bytes | None] = {}


class _Client(gevent.socket.socket):  # type: ignore[misc]
    """A client's connection. An event fits into the kernel's buffer almost always, so it is tried to send it at once:
    gevent's own sendall asks the kernel for the size of that buffer first, for every event."""

    __slots__ = ()

    def recv(self, *args: Any) -> bytes:
        """While a request's head comes: all of it at once, within its time and size. gunicorn's parser looks through
        what it has at each piece, and a head that dribbles would cost the square of its length."""
        data: bytes = super().recv(*args)
        head = _heads.get(self)
        if head is None:
            return data
        if not head.coming:
            head.tail = data[-3:]
            return data
        if not head.size and (end := data.find(b"\r\n\r\n")) >= 0:  # nearly always
            head.size, head.tail, head.after = len(data), data[-3:], len(data) - end - 4
            return data
        read = bytearray(head.tail)
        before, patience = len(read), self.gettimeout()
        head.began = head.began or time.monotonic()
        try:
            while True:
                seen = max(len(read) - 3, 0)
                read += data
                head.size += len(data)
                if not data or read.find(b"\r\n\r\n", seen) >= 0:
                    break
                if head.size > _MOST_HEAD:
                    raise HeadTooLarge if b"\n" in read else http_errors.LimitRequestLine(head.size, _MOST_HEAD)
                left = head.began + _HEAD_TIME - time.monotonic()
                if left <= 0:
                    raise HeadTooSlow
                self.settimeout(left)
                data = super().recv(*args)
        except TimeoutError:
            raise HeadTooSlow from None
        finally:
            self.settimeout(patience)
        head.tail = bytes(read[-3:])
        return bytes(read[before:])

    def has_read(self, size: int) -> bool:
        """Whether so many bytes of the request's body have been read along with its head, so that no more is waited
        for."""
        head = _heads.get(self)
        return head is not None and 0 < size <= head.after and self not in _waiting

    def say_continue(self) -> None:
        """Tell a client that asked first to send its body (RFC 9110 section 10.1.1)."""
        if self in _waiting:
            _waiting.discard(self)
            self.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def join_next(self) -> None:
        """Let the next `sendall` wait for the one after it, which comes at once: one packet, and one wake-up of the
        client, for a head and the first event, or for the last event and the end."""
        _held.setdefault(self, None)

    def sendall(self, data: bytes, flags: int = 0) -> None:
        if self in _held:
            held = _held[self]
            if held is None:
                _held[self] = data
                return
            del _held[self]
            data = held + data
        try:
            sent = self._sock.send(data, flags)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            super().sendall(memoryview(data)[sent:], flags)


def _not_the_network(record: logging.LogRecord) -> bool:
    """Whether a record is worth its place: a client's connection that broke is not, and has no traceback."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, OSError) and error.errno in _NETWORK)
