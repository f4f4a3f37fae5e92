"""The end of a process: when its streams must have ended, and who they are. A process drains as a whole."""

from __future__ import annotations

import weakref
from typing import Protocol

_NEVER = float("inf")


class Draining(Protocol):
    """What the drain needs of a stream."""

    def wake(self) -> None: ...

    def break_write(self) -> None: ...


class Drain:
    """When the streams of this process must end. A server that stops sets it off; nothing else does."""

    def __init__(self) -> None:
        self.at = _NEVER  # when they end, monotonic seconds; infinite while nobody has told the server to stop
        self.open: weakref.WeakSet[Draining] = weakref.WeakSet()  # one that nobody closes must not stay
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        """How long open streams may go on once it has begun: the longest RELAY_DRAIN of the relays in this process."""
        return 25.0 if self._seconds is None else self._seconds

    def allow(self, seconds: float) -> None:
        """One of the relays in this process gives its streams so long."""
        self._seconds = max(seconds, self._seconds or 0.0)

    @property
    def draining(self) -> bool:
        return self.at != _NEVER

    def begin(self, at: float) -> None:
        """Let open streams, and those still to come, go on until `at` (monotonic seconds)."""
        self.at = at
        for stream in list(self.open):
            stream.wake()

    def break_writes(self) -> None:
        """Reset the clients that have not taken their streams' end. For use after `at`."""
        for stream in list(self.open):
            stream.break_write()


drain = Drain()
