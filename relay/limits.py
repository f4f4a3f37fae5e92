"""Admission: a lease for each open stream, released exactly once. Knows nothing of HTTP."""

from __future__ import annotations

import resource
import threading
import time

#: Open files that are not a stream's: listeners, logs, the pool's idle connections, health probes.
_OTHER_FILES = 100
#: A stream's: the client's socket and the upstream's.
_FILES_PER_STREAM = 2


class Lease:
    """The right to one open stream."""

    __slots__ = ("_slots",)

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots

    def release(self) -> None:
        """Give it back. Idempotent."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.give_back()


class Slots:
    """So many streams at a time, and a queue of bounded patience in front of them."""

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.open = 0
        self._condition = threading.Condition()

    def take(self, wait: float) -> Lease | None:
        """A lease, at once or within `wait` seconds; None: there is none."""
        give_up = time.monotonic() + wait if wait else 0.0
        with self._condition:
            while self.open >= self.maximum:
                left = give_up - time.monotonic() if wait else 0.0
                if left <= 0:
                    return None
                self._condition.wait(left)
            self.open += 1
        return Lease(self)

    def give_back(self) -> None:
        with self._condition:
            self.open -= 1
            self._condition.notify()


def streams_that_files_allow() -> int:
    """How many streams this process can hold open with its limit of file descriptors (RLIMIT_NOFILE)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1_000_000
    return max((soft - _OTHER_FILES) // _FILES_PER_STREAM, 1)
