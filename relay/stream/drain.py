"""The end of a process: when its streams must have ended, and who they are. A process drains as a whole."""

from __future__ import annotations

import time
import weakref
from typing import Protocol

_NEVER = float("inf")
#: The part of a drain, at its end, over which the cuts are spread: clients that were cut come back at once.
_SPREAD = 1 / 3


class Draining(Protocol):
    """What the drain needs of a stream."""

    def end_by(self, at: float) -> None: ...

    def break_write(self) -> None: ...


class Drain:
    """When the streams of this process must end. A server that stops sets it off; nothing else does."""

    def __init__(self) -> None:
        self.at = _NEVER  # when they end, monotonic seconds; infinite while nobody has told the server to stop
        self._takes_until = _NEVER  # new requests, monotonic seconds
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

    @property
    def late(self) -> bool:
        """Whether a new request is unlikely to be answered whole."""
        return self.draining and time.monotonic() >= self._takes_until

    def begin(self, at: float) -> None:
        """Let open streams go on until `at` (monotonic seconds) at the longest, and those still to come until `at`."""
        now = time.monotonic()
        self.at = at
        self._takes_until = (now + at) / 2
        streams = list(self.open)
        for number, stream in enumerate(streams):
            stream.end_by(at - (at - now) * _SPREAD * number / len(streams))

    def break_writes(self) -> None:
        """Reset the clients that have not taken their streams' end. For use after `at`."""
        for stream in list(self.open):
            stream.break_write()


drain = Drain()
