"""What the tests drive the relay with: a scriptable upstream, a raw client, real servers.

Everything here is real sockets on loopback, and every blocking call has a deadline. It knows
nothing of the relay's code and imports none of it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

REPO = Path(__file__).resolve().parents[2]

DEADLINE = 20.0  # seconds; what takes longer on loopback is stuck, not slow

#: What tests draw at random: with this in the environment the same in each run, else something new.
SEED = int(os.environ.get("TEST_SEED") or 0)


class DeadlineExceeded(AssertionError):
    """Something that was to happen did not happen in time."""


class Deadline:
    """A point in time, `seconds` from now; `left()` gives what remains of it, or raises."""

    def __init__(self, seconds: float, what: str) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._what = what

    def left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"not within {self._seconds:g} s: {self._what}")
        return left


def eventually(condition: Callable[[], bool], what: str, deadline: float = DEADLINE, every: float = 0.005) -> float:
    """Ask until `condition` holds; gives the monotonic time at which it did."""
    clock = Deadline(deadline, what)
    while not condition():
        time.sleep(min(every, clock.left()))
    return time.monotonic()
