"""A request's body, read once its stream has a slot and Flask's contexts are gone. Then the request upstream is made.

Reading waits in the server's own `wsgi.input`, whichever server that is. The stream looks at the clocks meanwhile and
ends the wait by closing the reading side of the client's socket.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from relay import errors
from relay.gate.bodies import memory
from relay.web.request import body_source

if TYPE_CHECKING:
    from relay.upstream.exchange import Exchange
    from relay.web.request import Expected

#: Seconds without a byte, and bytes per second over so many seconds, below which an upload is given up.
_SILENCE = 15.0
_PACE, _OVER = 4096, 10.0
#: One read. A server waits until it has so much, and until then its progress does not show.
_PIECE = 8 * 1024
#: Bytes after which others get their turn: a client on the same host sends as fast as they are read.
_STEP = 128 * 1024
#: Seconds until a client that found the memory full may come again.
_RETRY_AFTER = 2

Body = bytes | bytearray | None
Finish = Callable[[Body], Generator[None, None, "Exchange"]]


def _is_there(environ: dict[str, Any], expected: Expected) -> bool:
    """Whether the server has the whole body already, as ours can tell: reading it waits for nobody."""
    has_read = getattr(environ.get("gunicorn.socket"), "has_read", None)
    return has_read is not None and expected.length is not None and has_read(expected.length)


class Intake:
    """What prepares the exchange of one stream (relay.stream.relayed.Intake)."""

    __slots__ = (
        "_expected", "_finish", "_memory", "_source", "_stopped", "_taken", "_window_at", "_window_from",
        "exchange", "reading", "received", "uploads",
    )  # fmt: skip

    def __init__(self, environ: dict[str, Any], expected: Expected | None, body_memory: int, finish: Finish) -> None:
        """`expected`: the body that is to be read; None: there is none. `body_memory`: the most bytes that all bodies
        of this process may hold. `finish` makes the exchange from the body, and yields to let other streams run."""
        self._source: Any = body_source(environ) if expected is not None else None
        self._expected = expected
        self._memory = body_memory
        self._finish: Finish | None = finish
        self._taken = 0  # bytes that are counted for this body
        self._stopped: errors.RelayError | None = None
        # The window in which progress is measured: its beginning, and the bytes that had come by then.
        self._window_at, self._window_from = 0.0, 0
        self.exchange: Exchange
        self.uploads = expected is not None and not _is_there(environ, expected)
        self.reading = False
        self.received = 0

    def start(self, now: float) -> None:
        """Start the clocks (monotonic seconds)."""
        self.reading = True
        self._window_at = now

    def overdue(self, now: float) -> bool:
        """Whether the upload has been given up, by its clocks. Called from elsewhere while it is read."""
        elapsed, moved = now - self._window_at, self.received - self._window_from
        if not moved:
            late = elapsed >= _SILENCE
        else:
            late = elapsed >= _OVER and moved + _PIECE < _PACE * elapsed
            if elapsed >= _OVER:
                self._window_at, self._window_from = now, self.received
        if late:
            self.stop(
                errors.RequestTimeout(
                    f"the request body came too slowly: nothing for {_SILENCE:g} s, or under {_PACE // 1024} KiB/s"
                    f" over {_OVER:g} s"
                )
            )
        return late

    def stop(self, error: errors.RelayError) -> None:
        """Say why reading ends before the body is whole."""
        self._stopped = self._stopped or error

    def steps(self) -> Iterator[None]:
        """Read the body and make the exchange; yields to let other streams run. Raises RelayError."""
        body: Body = None
        if self._expected is not None:
            try:
                body = yield from self._read(self._expected)
            finally:
                self.reading = False
                self._source = None
        finish, self._finish = self._finish, None
        assert finish is not None  # noqa: S101 - it is called once
        self.exchange = yield from finish(body)

    def release(self) -> None:
        """The body is no longer held. Idempotent."""
        taken, self._taken = self._taken, 0
        if taken:
            memory.give_back(taken)

    def _read(self, expected: Expected) -> Generator[None, None, Body]:
        announced, most = expected.length, expected.most
        step_at = _STEP
        read = self._source.read
        body: bytes | bytearray = b""
        while announced is None or len(body) < announced:
            try:
                piece = read(_PIECE if announced is None else min(_PIECE, announced - len(body)))
            except Exception:  # noqa: BLE001 - each server has its own for a body that is cut or malformed
                raise (self._stopped or expected.cut()) from None
            if not piece:
                break
            if len(body) + len(piece) > most:
                raise expected.too_large()
            if not memory.take(len(piece), self._memory):
                raise errors.Full(
                    "the relay holds as many bytes of request bodies as it may (RELAY_BODY_MEMORY); try again",
                    retry_after=_RETRY_AFTER,
                )
            self._taken += len(piece)
            self.received += len(piece)
            if not body:
                body = piece
            else:
                if isinstance(body, bytes):
                    body = bytearray(body)
                body += piece
            if self.received >= step_at:
                step_at = self.received + _STEP
                yield
        if announced is not None and len(body) != announced:
            raise self._stopped or expected.cut()
        if self._stopped is not None and announced is None:
            raise self._stopped  # a server may take the end of the connection for the end of the last chunk
        return body
