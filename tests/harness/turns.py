"""Windows of rate limits begin with the clock's minutes and hours: a test in which one begins counts in two."""

from __future__ import annotations

import time

HOUR, MINUTE = 3600, 60


def within_one(window: int, seconds: float = 20.0) -> None:
    """Wait for the next window of this length if the present one does not last for so many seconds more."""
    left = window - time.time() % window
    if left < seconds:
        time.sleep(left + 0.1)
