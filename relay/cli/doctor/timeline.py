"""What an answer says of the way that it came: which tick arrived when, and how it ended. No I/O."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.cli.doctor.probe import Answer, Ended

#: Of the time between two ticks: what comes closer together has come as one.
_TOGETHER = 0.5
#: Times between two ticks: what was held back for less may be the network's doing.
_LATE = 2.0
#: Of the time that the whole stream took: what arrives within so little of it has come at once.
_AT_ONCE = 0.2
#: Of the number of ticks: in at most so many lumps.
_LUMPS = 0.6


@dataclass(slots=True)
class Tick:
    """`sent`: seconds since the relay sent its first; `arrived`: seconds since the request."""

    sent: float
    arrived: float


@dataclass(slots=True)
class Timeline:
    """One answer of `_relay/ticks`, read."""

    answer: Answer
    ticks: list[Tick] = field(default_factory=list)
    of: int = 0  # how many the relay meant to send
    told: dict[str, Any] = field(default_factory=dict)  # what the first tick says of the relay

    @property
    def ended(self) -> Ended:
        return self.answer.ended

    @property
    def encoding(self) -> str:
        """The content coding, or empty."""
        coding = self.answer.header("content-encoding").lower()
        return "" if coding == "identity" else coding

    @property
    def run(self) -> str:
        """The same in two answers: they are the same answer."""
        return str(self.told.get("run", ""))

    @property
    def is_of_the_relay(self) -> bool:
        """Whether this is the relay's stream, or one that nobody here can read."""
        return self.answer.status == 200 and (
            bool(self.told) or (not self.ticks and bool(self.encoding) and "gzip" not in self.encoding)
        )

    @property
    def complete(self) -> bool:
        return bool(self.of) and len(self.ticks) == self.of

    @property
    def last_arrival(self) -> float:
        return self.answer.pieces[-1][0] if self.answer.pieces else 0.0

    @property
    def silent(self) -> float:
        """Seconds between the last byte and the end."""
        return self.answer.ended_at - self.last_arrival

    @property
    def held_back(self) -> float:
        """Seconds that the tick which waited longest waited more than the one which waited least."""
        delays = [tick.arrived - tick.sent for tick in self.ticks]
        return max(delays) - min(delays) if delays else 0.0

    @property
    def interval(self) -> float:
        """Seconds between two ticks as they were sent."""
        if len(self.ticks) < 2:
            return 0.0
        return (self.ticks[-1].sent - self.ticks[0].sent) / (len(self.ticks) - 1)

    @property
    def lumps(self) -> int:
        """In how many pieces, with time between them, the ticks arrived."""
        gap = self.interval * _TOGETHER
        return sum(
            not number or tick.arrived - self.ticks[number - 1].arrived > gap for number, tick in enumerate(self.ticks)
        )

    @property
    def arrival(self) -> str:
        """`steady`, `at the end` (all at once), `in lumps`, or `uneven`: late, but for no reason that shows."""
        if len(self.ticks) < 4 or self.held_back < _LATE * self.interval:
            return "steady"
        span = self.ticks[-1].arrived - self.ticks[0].arrived
        if span <= _AT_ONCE * (self.ticks[-1].sent - self.ticks[0].sent):
            return "at the end"
        return "in lumps" if self.lumps <= _LUMPS * len(self.ticks) else "uneven"


def read(answer: Answer) -> Timeline:
    """Find the ticks in an answer, through gzip if need be."""
    timeline = Timeline(answer)
    pieces = _unzipped(answer.pieces) if timeline.encoding in ("gzip", "x-gzip") else answer.pieces
    rest = b""
    for at, data in pieces:
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            _take(timeline, event, at)
    return timeline


def _unzipped(pieces: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """As far as it is gzip."""
    unzip = zlib.decompressobj(wbits=31)
    plain: list[tuple[float, bytes]] = []
    try:
        plain.extend((at, unzip.decompress(data)) for at, data in pieces)
    except zlib.error:
        pass
    return plain


def _take(timeline: Timeline, event: bytes, at: float) -> None:
    if not event.startswith(b"data: "):
        return
    try:
        tick = json.loads(event[6:])
        sent, of = float(tick["ms"]) / 1000, int(tick["of"])
    except (ValueError, KeyError, TypeError):
        return
    if not timeline.ticks and isinstance(tick.get("seen"), dict):
        timeline.told, timeline.of = tick, of
    timeline.ticks.append(Tick(sent, at))
