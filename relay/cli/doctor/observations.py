"""What the doctor saw and what is wrong with it, as data: `examine` fills in the one, `findings` makes the other of it.

No I/O, and no judgement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.cli.doctor import hops
    from relay.cli.doctor.probe import Answer
    from relay.cli.doctor.timeline import Timeline


@dataclass(slots=True)
class Refusal:
    """An answer to the request for ticks that is no stream: its status, and what the relay says if it was the relay."""

    status: int
    code: str
    message: str
    headers: hops.Headers
    with_key: bool


@dataclass(slots=True)
class Observations:
    """All that was seen; None or empty: not looked at, or not there."""

    refusal: Refusal | None = None
    pace: Timeline | None = None
    sized: Timeline | None = None  # the same pace in a body of announced length
    twice: tuple[Timeline, Timeline] | None = None  # the answers to one request made two times
    broken: Timeline | None = None  # one that the relay broke off on purpose
    silences: list[tuple[float, Timeline]] = field(default_factory=list)  # seconds of silence asked for
    http2: bool | None = None
    kept: float | None = None  # seconds after which an idle connection was closed without a word; None: none was
    health: dict[str, Any] | None = None
    health_answer: Answer | None = None
    settings_faults: tuple[str, ...] = ()

    @property
    def heartbeat(self) -> float:
        """Seconds; 0: off, or not known."""
        return float(self.pace.told.get("heartbeat", 0)) if self.pace else 0.0

    @property
    def hold(self) -> float:
        return float(self.pace.told.get("hold", 0)) if self.pace else 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is for scripts, the rest for people."""

    name: str
    explanation: str
    cure: str
