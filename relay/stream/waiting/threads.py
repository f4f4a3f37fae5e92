"""Waiting in a plain thread: poll on the two sockets, and a look around now and then."""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from relay.stream.waiting import GONE, OTHER, READY, Task, Wake
from relay.stream.waiting.client_socket import gone, watchable

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds between two looks at the client while a task is waited for, which poll cannot see.
_TICK = 0.05
#: Seconds between two looks at `wake` while sockets are waited for, and the most between two looks at writes.
_LONG_TICK = 1.0


class ThreadWaiter:
    """A Waiter for servers with a thread for each request."""

    def __init__(self, client: Any, tick: Callable[[], float]) -> None:
        self._client = self._watched = client if watchable(client) else None
        self._tick = tick
        self._event = threading.Event()
        self._poll: select.poll | None = None
        self._upstream_fd = -1
        self._gone = False
        if client is not None:
            _watchdog.add(self)

    def run(self, work: Callable[[], None]) -> Task:
        task = Task(work, self.wake)
        threading.Thread(target=task, name="relay-open", daemon=True).start()
        return task

    def abort(self, task: Task) -> None:
        """A thread cannot be ended from outside: closing its socket wakes it, its own time limits do the rest."""

    def attend(self) -> None:
        self._client = self._watched

    def watch(self, upstream: Any) -> None:
        self._poll = select.poll()
        self._upstream_fd = upstream.fileno()
        self._poll.register(self._upstream_fd, select.POLLIN)
        if self._client is not None:
            self._poll.register(self._client.fileno(), select.POLLIN)

    def unwatch(self) -> None:
        self._poll = None

    def wait(self, deadline: float) -> Wake:
        while True:
            if self._gone:
                return GONE
            if self._event.is_set():
                self._event.clear()
                return OTHER
            if self._client is not None:
                is_gone = gone(self._client)
                if is_gone:
                    return GONE
                if is_gone is None:
                    self._stop_watching_client()
            left = deadline - time.monotonic()
            if left <= 0:
                return OTHER
            if self._poll is None:
                self._event.wait(min(left, _LONG_TICK if self._client is None else _TICK))  # it takes no infinity
            elif any(fd == self._upstream_fd for fd, _ in self._poll.poll(min(left, _LONG_TICK) * 1000)):
                return READY

    def rest(self, deadline: float) -> Wake:
        if self._poll is None:
            return self.wait(deadline)
        self._poll.unregister(self._upstream_fd)
        try:
            return self.wait(deadline)
        finally:
            self._poll.register(self._upstream_fd, select.POLLIN)

    def _stop_watching_client(self) -> None:
        if self._poll is not None and self._client is not None:
            self._poll.unregister(self._client.fileno())
        self._client = None

    def wake(self) -> None:
        self._event.set()

    def lose_client(self) -> None:
        self._gone = True
        self._event.set()

    def close(self) -> None:
        _watchdog.discard(self)
        self._poll = self._client = self._watched = None
        self._tick = _done

    def look(self) -> float:
        """Called by the watchdog; gives the seconds until it wants to be called again."""
        return self._tick()


def _done() -> float:
    """In place of the stream's tick, which would tie the two together."""
    return _LONG_TICK


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
            pause = min(waiter.look() for waiter in waiters)
            del waiters
            time.sleep(min(max(pause, _TICK), _LONG_TICK))


_watchdog = _Watchdog()
if hasattr(os, "register_at_fork"):  # its thread is not in the new process, nor is who holds its lock
    os.register_at_fork(after_in_child=_watchdog.__init__)  # type: ignore[misc]
