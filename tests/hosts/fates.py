"""What became of each request, for its client, in the logs and at the upstreams, and what can have broken it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hosts.lab import DRAIN, LAME_DUCK

if TYPE_CHECKING:
    from hosts.lab import Lab
    from hosts.streams import Stream

#: Seconds for which requests may go to a relay that is gone: the edge keeps idle connections for 3.
NOTICED = 3.5
#: Seconds after which the workers of a host that is back count together with the others again.
TOGETHER = 10.0


@dataclass
class Blow:
    """What was done to a relay, and when it could break its streams."""

    what: str
    relay: str
    began: float
    until: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.relay} {self.what}"

    def explains(self, fate: Fate) -> bool:
        """Whether a stream may have ended as it has because of this."""
        stream = fate.stream
        if self.what == "deployed" and stream.how == "refused":
            # On a connection whose last answer had begun before: it comes too late, is not sent, and may be repeated.
            late = self.began + LAME_DUCK + DRAIN / 2 - 0.5
            return fate.reasons == ["drained"] and not fate.billed and late <= stream.begun <= self.until
        until = {self.relay: self.until, "": self.began + NOTICED}.get(fate.relay, 0.0)
        if stream.begun > until or stream.ended < self.began:
            return False
        if self.what == "killed":
            return stream.how in ("cut", "refused") and not fate.reasons
        if self.what == "deployed":
            cut = self.began + LAME_DUCK + DRAIN * 2 / 3  # in the last third of the drain
            return stream.how == "framed" and fate.reasons == ["drained"] and stream.ended >= cut
        return stream.how in ("cut", "framed", "refused")


@dataclass
class Fate:
    """What became of a request: for its client, in the relays' logs, and at the upstreams."""

    stream: Stream
    relay: str = ""  # which has sent it to an upstream
    reasons: list[str] = field(default_factory=list)
    billed: list[float] = field(default_factory=list)
    done: list[tuple[str, float]] = field(default_factory=list)  # how it ended at the upstream, and when

    def adds_up(self, blows: list[Blow]) -> bool:
        """Whether all sides agree, and something explains why it is not whole."""
        stream, done = self.stream, [how for how, _ in self.done]
        if len(self.billed) > 1 or len(done) != len(self.billed):
            return False
        if stream.how == "whole":
            # A relay that was killed just then could not log it any more.
            killed = any(each.relay == self.relay and each.began - 1 < stream.ended < each.began + 1 for each in blows)
            return done == ["done"] and (self.reasons == ["done"] or (killed and not self.reasons))
        if stream.code == "too_many_streams":
            return self.reasons == [stream.code] and not self.billed and stream.id.startswith("greedy-")
        return any(each.explains(self) for each in blows)

    def __str__(self) -> str:
        how, status, code = self.stream.how, self.stream.status, self.stream.code
        done = [how for how, _ in self.done]
        return f"{how} {status} {code}: logged {self.reasons}, billed {len(self.billed)} times, ended upstream {done}"


def find_fates(lab: Lab, streams: list[Stream]) -> dict[str, Fate]:
    """The fate of each request by its id."""
    fates = {each.id: Fate(each) for each in streams}
    names = {relay.host.address: relay.host.name for relay in lab.relays}
    for said in lab.said("billed"):
        if fate := fates.get(said["id"]):
            fate.relay = names[said["peer"]]
            fate.billed.append(said["at"])
    for said in lab.said("end"):
        if fate := fates.get(said["id"]):
            fate.done.append((said["how"], said["at"]))
    for relay in lab.relays:
        for line in lab.logged(relay.host.name):
            if fate := fates.get(line.get("request_id", "")):
                fate.reasons.append(line["reason"])
    return fates


def most_at_once(fates: list[Fate], blows: list[Blow]) -> int:
    """How many of them the upstreams had open at once; not just after a host is back, which asks Redis anew."""
    changes = [(at, 1) for each in fates for at in each.billed]
    changes += [(at - 0.1, -1) for each in fates for _, at in each.done]  # the lease may be given back a bit earlier
    now = most = 0
    for at, change in sorted(changes):
        now += change
        if not any(each.what == "powered off" and each.until <= at <= each.until + TOGETHER for each in blows):
            most = max(most, now)
    return most
