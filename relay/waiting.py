"""The one seam between a stream and the kind of server that it runs in: waiting.

A stream waits for several things at once: its upstream, its client's going, a clock, a word from elsewhere in the
process. Under gevent the hub's watchers do that and thousands wait in one thread; under plain threads poll does, and a
departed client is noticed within `_TICK`. Nothing here knows what is waited for, or why.
"""

from __future__ import annotations

import enum
import fcntl
import select
import socket
import ssl
import struct
import sys
import termios
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

#: Seconds between two looks at the client and at `wake` under plain threads, while something else is waited for.
_TICK = 0.05
#: A stream without any clock of its own still looks after its writes so often.
_LONGEST_TICK = 15.0


class Wake(enum.Enum):
    """Why a wait ended."""

    READY = enum.auto()  # bytes have arrived upstream
    GONE = enum.auto()  # the client has closed its connection
    OTHER = enum.auto()  # the deadline has passed, the task has ended, or somebody called `wake`: look again


READY, GONE, OTHER = Wake.READY, Wake.GONE, Wake.OTHER


class Task:
    """Work that blocks, done beside the stream: `finished`, then `error` or None."""

    def __init__(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        self._work = work
        self._done = done
        self.finished = False
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - whoever waits for the task raises it
            self.error = error
        self.finished = True
        self._done()


class ThreadWaiter:
    """Waits in a plain thread."""

    def __init__(self, client: Any, tick: Callable[[], float]) -> None:
        """`client`: the client's socket, or None where the server does not show it. `tick` is called now and then
        while the stream does not wait (it is writing, then); it returns the seconds until it wants to be called again.
        """
        self._client = None if isinstance(client, ssl.SSLSocket) else client
        self._tick = tick
        self._event = threading.Event()
        self._poll: select.poll | None = None
        self._upstream: Any = None
        self.waiting = False
        if client is not None:
            _watchdog.add(self)

    def run(self, work: Callable[[], None]) -> Task:
        task = Task(work, self.wake)
        threading.Thread(target=task, name="relay-open", daemon=True).start()
        return task

    def abort(self, task: Task) -> None:
        """A thread cannot be interrupted: closing its socket wakes it, and its own time limits end it."""

    def watch(self, upstream: Any) -> None:
        """From now on `wait` also waits for bytes from this socket."""
        self._upstream = upstream
        self._poll = select.poll()
        self._poll.register(upstream.fileno(), select.POLLIN)
        if self._client is not None:
            self._poll.register(self._client.fileno(), select.POLLIN)

    def wake(self) -> None:
        self._event.set()

    def wait(self, deadline: float) -> Wake:
        """Wait until something happens or `deadline` (monotonic seconds) has passed."""
        self.waiting = True
        try:
            while True:
                if self._event.is_set():
                    self._event.clear()
                    return OTHER
                if self._client is not None and client_gone(self._client) is not False:
                    if client_gone(self._client):
                        return GONE
                    self._stop_watching_client()
                left = deadline - time.monotonic()
                if left <= 0:
                    return OTHER
                if self._poll is None:
                    self._event.wait(min(left, _TICK if self._client is not None else left))
                elif any(fd == self._upstream.fileno() for fd, _ in self._poll.poll(min(left, 1.0) * 1000)):
                    return READY
        finally:
            self.waiting = False

    def _stop_watching_client(self) -> None:
        if self._poll is not None and self._client is not None:
            self._poll.unregister(self._client.fileno())
        self._client = None

    def close(self) -> None:
        _watchdog.discard(self)
        self._poll = self._client = self._upstream = None

    def check(self) -> float:
        return 1.0 if self.waiting else self._tick()


class _Watchdog:
    """One thread that looks after the writes of all streams in this process, which nobody else can while they block."""

    def __init__(self) -> None:
        self._waiters: weakref.WeakSet[ThreadWaiter] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._running = False

    def add(self, waiter: ThreadWaiter) -> None:
        with self._lock:
            self._waiters.add(waiter)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="relay-watchdog", daemon=True).start()

    def discard(self, waiter: ThreadWaiter) -> None:
        with self._lock:
            self._waiters.discard(waiter)

    def _run(self) -> None:
        while True:
            with self._lock:
                waiters = list(self._waiters)
                if not waiters:
                    self._running = False
                    return
            pause = min(max(waiter.check(), _TICK) for waiter in waiters)
            del waiters
            time.sleep(min(pause, 1.0))


_watchdog = _Watchdog()


class GeventWaiter:
    """Waits in a greenlet, on the hub's own watchers."""

    __slots__ = ("_client", "_greenlet", "_hub", "_read", "_tick", "_timer", "_timer_at", "_woken", "gone")

    def __init__(self, client: Any, tick: Callable[[], float]) -> None:
        import gevent

        self._hub = gevent.get_hub()
        self._tick = tick
        self._greenlet: Any = None  # who waits in `wait`
        self._read: Any = None
        self._timer: Any = None
        self._timer_at = float("inf")
        self._woken = False
        self.gone = False
        self._client: Any = None
        if client is not None and not isinstance(client, ssl.SSLSocket):
            self._client = self._hub.loop.io(client.fileno(), 1)
            self._client.start(self._client_readable, client)

    def run(self, work: Callable[[], None]) -> Task:
        import gevent

        task = Task(work, self.wake)
        task.greenlet = gevent.spawn(task)  # type: ignore[attr-defined]
        return task

    def abort(self, task: Task) -> None:
        """End it where it blocks: in a name look-up, a connect, a TLS handshake, or waiting for an answer."""
        task.greenlet.kill(block=False)  # type: ignore[attr-defined]

    def watch(self, upstream: Any) -> None:
        self._read = self._hub.loop.io(upstream.fileno(), 1)

    def wake(self) -> None:
        self._woken = True
        if self._greenlet is not None:
            self._hub.loop.run_callback(self._deliver)

    def wait(self, deadline: float) -> Wake:
        import gevent

        if self.gone:
            return GONE
        if self._woken:
            self._woken = False
            return OTHER
        if deadline < self._timer_at:
            self._arm(deadline)
        elif self._timer is None:
            self._arm(time.monotonic() + _LONGEST_TICK)
        self._greenlet = gevent.getcurrent()
        read = self._read
        if read is not None:
            read.start(self._greenlet.switch, READY)
        try:
            return self._hub.switch()  # type: ignore[no-any-return]
        finally:
            self._greenlet = None
            if read is not None:
                read.stop()

    def close(self) -> None:
        for watcher in (self._client, self._read, self._timer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._client = self._read = self._timer = None
        self._timer_at = float("-inf")

    # Called by the hub. A switch from here runs the stream until it waits again.

    def _arm(self, at: float) -> None:
        # The timer stays armed across events, since deadlines only move away; when it goes off too early, the stream
        # looks at its clocks and waits on.
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        self._timer_at = at
        self._timer = self._hub.loop.timer(max(at - time.monotonic(), 0.0))
        self._timer.start(self._timed_out, update=True)

    def _timed_out(self) -> None:
        self._timer_at = float("inf")
        self._timer.close()
        self._timer = None
        if self._greenlet is not None:
            self._greenlet.switch(OTHER)
        else:
            self._arm(time.monotonic() + self._tick())

    def _deliver(self) -> None:
        if self._greenlet is not None and self._woken:
            self._woken = False
            self._greenlet.switch(OTHER)

    def _client_readable(self, client: Any) -> None:
        gone = client_gone(client)
        if gone is False:
            return
        self._client.stop()
        if gone:
            self.gone = True
            if self._greenlet is not None:
                self._greenlet.switch(GONE)


def cooperative() -> bool:
    """Whether this process runs on gevent: its sockets are patched."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("socket")


def waiter(client: Any, tick: Callable[[], float]) -> ThreadWaiter | GeventWaiter:
    """The kind that fits this process."""
    return GeventWaiter(client, tick) if cooperative() else ThreadWaiter(client, tick)


def client_gone(client: Any) -> bool | None:
    """True: the client has closed its side. False: nothing new. None: it sends more, so its end cannot be seen."""
    try:
        return None if _peek(client) else True
    except BlockingIOError:
        return False
    except OSError:
        return True


def _peek(client: Any) -> bytes:
    # Of a gevent socket the plain one beneath: gevent would wait.
    plain = getattr(client, "_sock", client)
    return plain.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)  # type: ignore[no-any-return]


def unsent(client: Any) -> int | None:
    """Bytes that the kernel holds for the client, sent but not acknowledged or not sent at all; None: unknown."""
    try:
        return struct.unpack("i", fcntl.ioctl(client.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def reset(client: Any) -> None:
    """Make the connection end with a reset as soon as it is closed, and wake whoever is blocked in writing to it."""
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
