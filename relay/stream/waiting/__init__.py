"""The one seam between a stream and the kind of server that it runs in: waiting.

A stream waits for several things at once: its upstream, its client's going, a clock, a word from elsewhere in the
process. Under gevent the hub's watchers do that, and thousands wait in one thread (`relay.stream.waiting.hub`); under
plain threads poll does (`relay.stream.waiting.threads`). Nothing here knows what is waited for, or why.
"""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Wake(enum.Enum):
    """Why a wait ended."""

    READY = enum.auto()  # the upstream's socket is readable
    GONE = enum.auto()  # the client has closed its connection
    OTHER = enum.auto()  # the deadline has passed, a task has ended, or somebody called `wake`: look again


READY, GONE, OTHER = Wake.READY, Wake.GONE, Wake.OTHER


class Task:
    """Work that blocks, done beside the stream: once it is `finished`, `failure` says how it went.

    It keeps no error that nobody asks for, and none that was asked for: an error holds the frames that it came through,
    and the first of them holds the task.
    """

    def __init__(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        self._work = work
        self._done = done
        self.finished = False
        self._error: BaseException | None = None
        self._wanted = True

    def __call__(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - whoever waits for the task raises it
            if self._wanted:
                self._error = error
        self.finished = True
        self._done()

    def failure(self) -> BaseException | None:
        """What the work has raised, for the first who asks."""
        error, self._error = self._error, None
        return error

    def forget(self) -> None:
        """Nobody will ask."""
        self._wanted = False
        self._error = None


class Waiter(Protocol):
    """What a stream waits with. All but `wake` are for the stream's own thread or greenlet."""

    def run(self, work: Callable[[], None]) -> Task:
        """Do blocking work beside the stream; `wait` ends when it is finished."""

    def abort(self, task: Task) -> None:
        """End that work where it blocks, as far as that is possible."""

    def attend(self) -> None:
        """From now on `tick` is called although nobody waits; the client's going is noticed although it has sent."""

    def watch(self, upstream: Any) -> None:
        """From now on `wait` ends when this socket is readable."""

    def unwatch(self) -> None:
        """No longer: the socket is about to be given away or closed."""

    def wait(self, deadline: float) -> Wake:
        """Wait until something happens, at the latest until `deadline` (monotonic seconds)."""

    def rest(self, deadline: float) -> Wake:
        """As `wait`, but whether the upstream's socket is readable is no matter."""

    def wake(self) -> None:
        """End the present wait, or the next one. From any thread or greenlet."""

    def lose_client(self) -> None:
        """The client has vanished without closing its connection: `wait` says GONE. From a `tick`."""

    def close(self) -> None:
        """Let go of the sockets. Idempotent."""


def cooperative() -> bool:
    """Whether this process runs on gevent: its sockets are patched."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("socket")


def _at_once() -> float:
    return 0.0


def waiter(client: Any, tick: Callable[[], float], due: Callable[[], float] = _at_once) -> Waiter:
    """The kind that fits this process.

    `client`: the client's socket, or None where the server does not show it; then its going is not noticed. `tick` is
    called now and then, whether the stream waits or does something else (it writes); it returns the seconds until it
    wants to be called again. `due` is asked when a deadline has passed: monotonic seconds until when the wait can go
    on nevertheless, as deadlines move away while nobody looks.
    """
    if cooperative():
        from relay.stream.waiting.hub import HubWaiter

        return HubWaiter(client, tick, due)
    from relay.stream.waiting.threads import ThreadWaiter

    return ThreadWaiter(client, tick)
