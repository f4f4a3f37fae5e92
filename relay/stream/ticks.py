"""A timed stream of the relay's own making, for `relay doctor`: what goes out and when is known, so that whatever
arrives differently was changed on the way. No upstream is involved, and no Flask.

    GET {mount}/_relay/ticks?n=15&ms=200

`n` events, `ms` apart, each with `pad` characters that cannot be compressed. `silence` is a pause in seconds after the
first event, without heartbeats. `end=cut` breaks the connection off at the end, in place of the last chunk.
`framing=length` announces the body's length: nginx with buffering on passes chunks on as they come, and holds back
what has a length. Any other parameter is left alone, such as one that makes a request unlike the others. The first
event tells what the relay has seen of the request: how the last hop speaks to it cannot be seen from the client's end.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from relay import errors
from relay.observe import log
from relay.stream import waiting
from relay.stream.drain import drain
from relay.stream.waiting import GONE, client_socket
from relay.version import __version__
from relay.wire import sse
from relay.wire.headers import SANDBOX, UNBUFFERED

if TYPE_CHECKING:
    from relay.settings import Settings

Headers = list[tuple[str, str]]

#: What the stream's answer says of itself: the same as a relayed event stream's.
_HEADERS: Headers = [("Content-Type", f"{sse.MEDIA_TYPE}; charset=utf-8"), *SANDBOX, *UNBUFFERED]

_MOST_SECONDS = 150.0  # of one stream: the usual 100 s of silence and some more
_MOST_PADDING = 64 * 1024  # characters in one stream: it costs next to nothing
#: Streams at a time in one process. A doctor has five open; in plain threads each takes one from the shop's pages.
_MOST_OPEN, _MOST_OPEN_IN_THREADS = 20, 6
#: Streams that may begin at once, and how many more each second, in one process. A doctor begins four to eight.
_BURST, _EACH_SECOND = 100, 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for: times in seconds."""

    n: int
    interval: float
    pad: int
    silence: float
    cut: bool
    sized: bool

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Plan:
        """Read it from a query. Raises BadRequest for a value out of its bounds."""
        plan = cls(
            n=_number(query, "n", 10, 1, 200),
            interval=_number(query, "ms", 200, 10, 5000) / 1000,
            pad=_number(query, "pad", 0, 0, 4096),
            silence=_number(query, "silence", 0, 0, 120),
            cut=query.get("end", "") == "cut",
            sized=query.get("framing", "") == "length",
        )
        if (plan.n - 1) * plan.interval + plan.silence > _MOST_SECONDS or plan.n * plan.pad > _MOST_PADDING:
            raise errors.BadRequest(
                f"one stream of ticks lasts {_MOST_SECONDS:g} s at most and is padded with {_MOST_PADDING} characters "
                "at most"
            )
        return plan


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or not least <= int(text) <= most:
        raise errors.BadRequest(f"{name} must be a whole number from {least} to {most}")
    return int(text)


class Budget:
    """How many of these streams a process serves: so many at a time, and so many in a while."""

    def __init__(self, burst: int = _BURST, each_second: float = _EACH_SECOND) -> None:
        self.open = 0
        self._burst = burst
        self._each_second = each_second
        self._left = float(burst)
        self._at = time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> None:
        """Ask for one more stream. Raises TooMany."""
        most = _MOST_OPEN if waiting.cooperative() else _MOST_OPEN_IN_THREADS
        with self._lock:
            now = time.monotonic()
            self._left = min(self._left + (now - self._at) * self._each_second, self._burst)
            self._at = now
            if self.open < most and self._left >= 1:
                self._left -= 1
                return
        raise errors.TooMany(
            "the relay has been asked for too many streams of ticks; they are for `relay doctor`, now and then",
            code="too_many_ticks",
            retry_after=2,
        )

    def opened(self) -> None:
        with self._lock:
            self.open += 1

    def closed(self) -> None:
        with self._lock:
            self.open -= 1


budget = Budget()


def seen(environ: Mapping[str, Any]) -> dict[str, Any]:
    """How the last hop has spoken to the relay. No address, and nothing that a client wrote."""
    connection = {token.strip().lower() for token in str(environ.get("HTTP_CONNECTION", "")).split(",")}
    hops = str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")
    return {
        "protocol": "HTTP/1.0" if environ.get("SERVER_PROTOCOL") == "HTTP/1.0" else "HTTP/1.1",
        "forwarded": sum(1 for hop in hops if hop.strip()),
        "connection": sorted(connection & {"close", "keep-alive", "upgrade"}),
        "via": "HTTP_VIA" in environ,
    }


class Ticks:
    """The stream as a WSGI iterable, for when Flask's contexts are gone. `close` frees all of it, once."""

    def __init__(
        self,
        plan: Plan,
        environ: Mapping[str, Any],
        settings: Settings,
        *,
        start: Callable[[Headers], object],
        client: Any,
        closed: Callable[[], None],
    ) -> None:
        """`start` is called once with the answer's headers. `client`: the client's socket, or None where the server
        does not show it. `closed` is called by `close`."""
        self._plan = plan
        self._start = start
        self._head = environ.get("REQUEST_METHOD") == "HEAD"
        self._http10 = environ.get("SERVER_PROTOCOL") == "HTTP/1.0"
        self._run = os.urandom(8).hex()
        self._told = {
            "run": self._run,
            "version": __version__,
            "heartbeat": settings.heartbeat,
            "hold": settings.hold if settings.heartbeat else 0,
            "seen": seen(environ),
        }
        self._client = client
        self._closed: Callable[[], None] | None = closed
        self._gave = -1.0  # since when the server writes, monotonic seconds; negative: it does not
        self._writes = client_socket.Writes(client, settings.write_timeout)
        self._waiter = waiting.waiter(client, self._check_write)
        self._events = self._all()
        budget.opened()
        self._drain_at = drain.at
        drain.open.add(self)

    def __iter__(self) -> Ticks:
        return self

    def __next__(self) -> bytes:
        self._gave = -1.0
        try:
            data = next(self._events)
        except (StopIteration, errors.StreamCut):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach the server (relay.stream.relayed)
            log.fault(error, "making the doctor's ticks", self._run)
            self._cut()
        self._gave = time.monotonic()
        return data

    def _all(self) -> Generator[bytes, None, None]:
        plan = self._plan
        headers = list(_HEADERS)
        if plan.sized:
            headers.append(("Content-Length", str(sum(len(self._event(number, 0)) for number in range(plan.n)))))
        self._start(headers)
        began = at = time.monotonic()
        for number in range(0 if self._head else plan.n):
            if number:
                at += plan.interval + (plan.silence if number == 1 else 0)
                if not self._until(at):
                    if not plan.sized:
                        yield sse.error_frame(errors.Drained("the relay is restarting").json(self._run))
                    self._cut()
            yield self._event(number, (time.monotonic() - began) * 1000)
        if plan.cut and not self._head:
            self._cut()

    def _event(self, number: int, ms: float) -> bytes:
        """One event; its length does not depend on the time."""
        more = self._told if number == 0 else {}
        if self._plan.pad:
            more = more | {"pad": base64.b64encode(os.urandom(self._plan.pad)).decode()[: self._plan.pad]}
        rest = json.dumps({"of": self._plan.n, **more})[1:]
        return f'data: {{"tick": {number}, "ms": {ms:8.1f}, {rest}\n\n'.encode()

    def _until(self, at: float) -> bool:
        """Wait until then. False: the drain is over first. Raises StreamCut when the client has left."""
        while True:
            now = time.monotonic()
            if now >= self._drain_at:
                return False
            if now >= at:
                return True
            if self._waiter.wait(min(at, self._drain_at)) is GONE:
                raise errors.StreamCut

    def _cut(self) -> NoReturn:
        """End the connection so that nobody takes the body for whole, as a relayed stream does."""
        if self._client is not None:
            self._waiter.close()
            client_socket.cut(self._client, reset=self._http10)
        raise errors.StreamCut

    def close(self) -> None:
        """The server is done with this response, for whatever reason."""
        closed, self._closed = self._closed, None
        if closed is None:
            return
        self._events.close()
        self._waiter.close()
        drain.open.discard(self)
        budget.closed()
        closed()

    # From outside the stream's own greenlet or thread.

    def end_by(self, at: float) -> None:
        """The drain has begun: end then (monotonic seconds)."""
        self._drain_at = at
        self._waiter.wake()

    def break_write(self) -> None:
        """Free the server from a write that outlasts the drain."""
        if self._gave >= 0 and self._client is not None:
            client_socket.break_off(self._client)

    def _check_write(self) -> float:
        if self._gave >= 0 and self._writes.stuck(self._gave):
            client_socket.break_off(self._client)
        return self._writes.every
