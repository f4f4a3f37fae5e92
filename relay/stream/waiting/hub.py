"""Waiting in a greenlet, on the watchers of gevent's hub.

Whatever the hub calls here runs in the hub's own greenlet; a switch from there runs the stream until it waits again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import gevent
from gevent import get_hub, getcurrent

from relay.stream.waiting import GONE, OTHER, READY, Task, Wake
from relay.stream.waiting.client_socket import gone, watchable

if TYPE_CHECKING:
    from collections.abc import Callable

_READ = 1  # libev's EV_READ
_NEVER = float("inf")


class HubWaiter:
    """A Waiter for servers on gevent."""

    __slots__ = (
        "_client",
        "_due",
        "_every",
        "_gone",
        "_hub",
        "_read",
        "_reading",
        "_socket",
        "_tick",
        "_timer",
        "_timer_at",
        "_waiting",
        "_woken",
    )

    def __init__(self, client: Any, tick: Callable[[], float], due: Callable[[], float]) -> None:
        self._hub = get_hub()
        self._tick = tick
        self._due = due
        self._every = tick()  # seconds
        self._waiting: Any = None  # the greenlet that waits in `wait`
        self._read: Any = None
        self._reading = False
        self._timer: Any = None
        self._timer_at = _NEVER
        self._woken = False
        self._gone = False
        self._client: Any = None
        self._socket = client
        if watchable(client):
            self._client = self._hub.loop.io(client.fileno(), _READ)
            self._client.start(self._client_readable, client)

    def run(self, work: Callable[[], None]) -> Task:
        task = _GreenletTask(work, self.wake)
        task.greenlet = gevent.spawn(task)
        return task

    def abort(self, task: Task) -> None:
        """End it in a name look-up, a connect, a TLS handshake or a send."""
        if isinstance(task, _GreenletTask):
            task.greenlet.kill(block=False)

    def attend(self) -> None:
        if self._client is not None and not self._gone and not self._client.active:
            self._client.start(self._client_readable, self._socket)
        at = time.monotonic() + self._tick()
        if at < self._timer_at:  # a timer costs more than a look too many
            self._arm(at)

    def watch(self, upstream: Any) -> None:
        self._read = self._hub.loop.io(upstream.fileno(), _READ)

    def unwatch(self) -> None:
        if self._read is not None:
            self._read.stop()
            self._read.close()
            self._read = None
            self._reading = False

    def wait(self, deadline: float) -> Wake:
        if self._gone:
            return GONE
        if self._woken:
            self._woken = False
            return OTHER
        # The timer stays armed across events, since deadlines mostly move away; when it goes off too early, `due` says
        # so, or the stream looks at its clocks and waits on.
        if deadline < self._timer_at:
            self._arm(min(deadline, time.monotonic() + self._every))
        # The read watcher stays on across events, too; it is turned off only if it speaks while nobody listens.
        if not self._reading and self._read is not None:
            self._reading = True
            self._read.start(self._readable)
        self._waiting = getcurrent()
        try:
            return self._hub.switch()  # type: ignore[no-any-return]
        finally:
            self._waiting = None

    def rest(self, deadline: float) -> Wake:
        read, self._read = self._read, None
        if read is not None and self._reading:
            read.stop()
            self._reading = False
        try:
            return self.wait(deadline)
        finally:
            self._read = read

    def wake(self) -> None:
        self._woken = True
        if self._waiting is not None:
            self._hub.loop.run_callback(self._deliver)

    def lose_client(self) -> None:
        self._gone = True

    def close(self) -> None:
        for watcher in (self._client, self._read, self._timer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._client = self._read = self._timer = self._socket = None
        self._tick = self._due = _done
        self._timer_at = -_NEVER

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        self._timer_at = at
        self._timer = self._hub.loop.timer(max(at - time.monotonic(), 0.0))
        self._timer.start(self._timed_out, update=True)

    # Called by the hub.

    def _readable(self) -> None:
        if self._waiting is not None:
            self._waiting.switch(READY)
        elif self._read is not None:
            self._read.stop()
            self._reading = False

    def _timed_out(self) -> None:
        self._timer.close()
        self._timer = None
        self._timer_at = _NEVER
        if self._waiting is not None:
            self._tick()
            due, now = self._due(), time.monotonic()
            if self._gone:
                self._waiting.switch(GONE)
            elif due > now:
                self._arm(min(due, now + self._every))
            else:
                self._waiting.switch(OTHER)
        else:
            self._woken = True
            self._arm(time.monotonic() + self._tick())

    def _deliver(self) -> None:
        if self._waiting is not None and self._woken:
            self._woken = False
            self._waiting.switch(OTHER)

    def _client_readable(self, client: Any) -> None:
        is_gone = gone(client)
        if is_gone is False:
            return
        self._client.stop()
        if is_gone:
            self._gone = True
            if self._waiting is not None:
                self._waiting.switch(GONE)


def _done() -> float:
    """In place of the stream's tick, which would tie the two together."""
    return _NEVER


class _GreenletTask(Task):
    greenlet: Any = None
