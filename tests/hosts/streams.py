"""What clients saw: the streams of an experiment, their ends, and the table that `make hosts` prints."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from harness import DEADLINE, DeadlineExceeded, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self

#: How many times as many streams as in CI: `make hosts` has more.
SCALE = float(os.environ.get("HOSTS_SCALE") or 1)

#: Client keys; each is a client of its own.
KEYS = tuple(f"lab-client-{number}-0123456789abcdef0123" for number in range(8))


@dataclass
class Stream:
    """A request as its client saw it. Times are monotonic, one clock for all hosts."""

    id: str
    begun: float
    first: float | None = None
    status: int = 0
    code: str = ""
    how: str = ""  # load.py names the ends; empty: still open
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def scaled(streams: int) -> int:
    return max(round(streams * SCALE), 1)


class Load:
    """Streams of one experiment."""

    def __init__(self, name: str, send: Callable[[Mapping[str, Any]], None]) -> None:
        """`send`: hands a request to the clients' host."""
        self.name = name
        self.streams: dict[str, Stream] = {}
        self._send = send
        self._numbers = itertools.count()

    def open(
        self,
        count: int = 1,
        *,
        seconds: float,
        every: float = 0.2,
        key: int = 0,
        within: float = 60.0,
        feed: bool = False,
    ) -> Self:
        """Send so many requests at once. `within`: seconds after which the client gives up. `feed`: as an EventSource,
        with GET."""
        for _ in range(count):
            stream = Stream(f"{self.name}-{next(self._numbers)}", time.monotonic())
            self.streams[stream.id] = stream
            how = {"seconds": seconds, "every": every, "key": KEYS[key], "within": within, "feed": feed}
            self._send({"id": stream.id} | how)
        return self

    @contextlib.contextmanager
    def trickle(
        self, per_second: float, *, seconds: float, key: int = 0, within: float = 60.0, feed: bool = False
    ) -> Iterator[None]:
        """Meanwhile send requests one after the other, in the background."""
        over = threading.Event()

        def go_on() -> None:
            while not over.wait(1 / per_second):
                self.open(seconds=seconds, key=key, within=within, feed=feed)

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def heard(self, report: Mapping[str, Any]) -> None:
        stream = self.streams[report["id"]]
        if report["event"] == "first":
            stream.first = report["at"]
        elif report["event"] == "end":
            stream.status, stream.code, stream.ended = report["status"], report["code"], report["at"]
            stream.how = report["how"]  # last: it says that the others are there

    def all(self) -> list[Stream]:
        return list(self.streams.values())

    def since(self, moment: float) -> list[Stream]:
        """Those that began after it."""
        return [each for each in self.all() if each.begun >= moment]

    def wait_begun(self, deadline: float = DEADLINE) -> Self:
        """Until each stream has its first byte."""
        eventually(lambda: all(each.first for each in self.all()), f"{self.name}: all begun", deadline)
        return self

    def wait_ended(self, deadline: float = DEADLINE) -> Self:
        eventually(lambda: all(each.how for each in self.all()), f"{self.name}: all ended", deadline)
        return self

    def ends(self) -> Counter[str]:
        return ends(self.all())


def ends(streams: Iterable[Stream]) -> Counter[str]:
    """How many ended how; an empty name for those that are open."""
    return Counter(each.how for each in streams)


def slowest(streams: Iterable[Stream], since: float = 0.0) -> float:
    """Seconds until the last of them ended, counted from its begin or from `since`, whichever was later."""
    return max((each.ended - max(each.begun, since) for each in streams if each.how), default=0.0)


def slowest_first(streams: Iterable[Stream]) -> float:
    """Seconds until the last of them had its first byte."""
    return max((each.first - each.begun for each in streams if each.first), default=0.0)


def within(condition: Callable[[], bool], seconds: float, every: float = 0.005) -> bool:
    """Whether it holds within this time."""
    with contextlib.suppress(DeadlineExceeded):
        eventually(condition, "", seconds, every)
        return True
    return False


def hold(claims: Mapping[str, bool]) -> None:
    """Fail with all claims that do not hold, not with the first."""
    broken = [claim for claim, holds in claims.items() if not holds]
    assert not broken, "does not hold: " + "; ".join(broken)


@dataclass
class Row:
    """What came out of one experiment, for the table."""

    what: str
    ends: Counter[str]
    billed_twice: int
    slowest: float

    HEAD: ClassVar = (
        "what was done", "streams", "whole", "cut with a frame", "cut without", "refused", "hanging", "billed twice",
        "silently truncated", "slowest end",
    )  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        counts = [self.ends[how] for how in ("whole", "framed", "cut", "refused", "hanging")]
        numbers = [self.ends.total(), *counts, self.billed_twice, self.ends["silent"]]
        return self.what, *map(str, numbers), f"{self.slowest:.1f} s"


#: Of all experiments of this process.
table: list[Row] = []
