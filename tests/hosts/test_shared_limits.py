"""Redis's host is powered off for ten seconds while clients with a limit have streams open."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from harness import eventually

from hosts.lab import REDIS_URL
from hosts.streams import KEYS, ends, hold, within

if TYPE_CHECKING:
    from hosts.lab import Lab
    from hosts.streams import Load, Stream

pytestmark = pytest.mark.slow

LIMIT = 6
REDIS = True
SETTINGS = {"RELAY_LIMITS_URL": REDIS_URL, "RELAY_MAX_STREAMS_PER_CLIENT": str(LIMIT)}
#: Seconds: how long it is off, and how soon after it workers must count together again. They ask every 2 s.
OFF, BACK = 10.0, 5.0
#: Seconds in which each request must have its answer: a relay asks Redis for 0.25 s.
AT_ONCE = 1.5
#: So many must have asked before one worker has been asked by more than its share.
MANY = 10 * LIMIT


def test_redis_host(lab: Lab) -> None:
    """Limits hold within the workers' shares, nobody is refused wrongly, and nobody waits."""
    before = lab.load("redis-before")
    admitted = _ask(before, LIMIT + 4, key=0)
    off = time.monotonic()
    lab.hosts["redis"].power_off()
    alone = lab.load("redis-off-too-many")
    _ask(alone, MANY, key=1)
    again = lab.load("redis-off-more")
    _ask(again, MANY, key=0)
    modest = lab.load("redis-off-modest")
    for key in (2, 3, 4, 5):  # spread over the outage
        within(lambda key=key: time.monotonic() >= off + (key - 2) * OFF / 4, OFF)  # type: ignore[misc]
        _ask(modest, LIMIT // 2, key=key)
    within(lambda: time.monotonic() >= off + OFF, OFF)
    lab.hosts["redis"].power_on()
    on = time.monotonic()
    short = lab.load("redis-back-short")
    with short.trickle(5, seconds=0, key=2):  # which has some open, and fewer than it may
        back = within(lambda: all('"limits_back"' in relay.server.log() for relay in lab.relays), BACK)
        together = time.monotonic() - on
        within(lambda: time.monotonic() >= on + BACK, BACK)  # by then leases of streams that began meanwhile are there
    after = lab.load("redis-back")
    _ask(after, LIMIT + 4, key=6)
    over = lab.load("redis-back-over")
    _ask(over, 3, key=1)
    for script in lab.upstreams:
        script.tell("release")
    loads = [before, alone, again, modest, short, after, over]
    for load in loads:
        load.wait_ended()
    for relay in lab.relays:
        eventually(relay.is_idle, "no stream is open")
    free = lab.load("redis-free")
    _ask(free, LIMIT, key=1)
    lab.upstreams[0].tell("release")
    free.wait_ended()
    for what, load in (
        (f"Redis there: {LIMIT + 4} of a client", before),
        (f"Redis's host off: {MANY} of a client", alone),
        (f"Redis's host off: {MANY} more of a client with {LIMIT}", again),
        (f"Redis's host off: {LIMIT // 2} each of four clients", modest),
        ("Redis back: short ones", short),
        (f"Redis back: {LIMIT + 4} of a client", after),
        ("Redis back: of a client that has more than its limit", over),
        ("Redis back: of that client when its streams are over", free),
    ):
        lab.record(what, load.all())
    everybody = [stream for load in loads for stream in load.all()]
    shares = len(lab.relays) * LIMIT
    hold(
        {
            f"with Redis {LIMIT} are admitted: {admitted}": admitted == LIMIT,
            f"without, {LIMIT} to {shares}: {_admitted(alone)}": LIMIT <= _admitted(alone) <= shares,
            f"at most {LIMIT} by each relay: {_by_relay(lab, alone)}": max(_by_relay(lab, alone)) <= LIMIT,
            f"those from before count: {_by_relay(lab, before, again)}": max(_by_relay(lab, before, again)) <= LIMIT,
            f"who is below the limit is not refused: {modest.ends()}": set(modest.ends()) == {"whole"},
            f"all workers ask it within {BACK:g} s after it is back: {back}, {together:.1f} s": back,
            f"nobody is refused meanwhile: {short.ends()}": set(short.ends()) == {"whole"},
            f"then {LIMIT} are admitted: {_admitted(after)}": _admitted(after) == LIMIT,
            f"who has more than {LIMIT} is refused: {over.ends()}": over.ends() == {"refused": 3},
            f"but not when its streams are over: {free.ends()}": free.ends() == {"whole": LIMIT},
            f"each is whole or refused: {ends(everybody)}": set(ends(everybody)) == {"whole", "refused"},
            f"refused for the limit: {_codes(everybody)}": _codes(everybody) == {"429 too_many_streams"},
            f"each is answered within {AT_ONCE:g} s: {_slowest(everybody):.2f} s": _slowest(everybody) <= AT_ONCE,
            "none is sent twice": not any(lab.billed()[each.id] > 1 for each in everybody),
        }
    )


def _ask(load: Load, count: int, key: int) -> int:
    """Ask for so many long streams at once and wait until each has its answer; how many of all are admitted."""
    load.open(count, seconds=120, key=key, within=200)
    assert KEYS[key] != KEYS[-1]  # the lab's own
    eventually(lambda: all(each.first or each.how for each in load.all()), f"{load.name}: all are answered")
    return _admitted(load)


def _admitted(load: Load) -> int:
    return sum(each.first is not None for each in load.all())


def _by_relay(lab: Lab, *loads: Load) -> list[int]:
    """How many streams of these each relay has admitted."""
    return [sum(each.id in lab.through(relay) for load in loads for each in load.all()) for relay in lab.relays]


def _codes(streams: list[Stream]) -> set[str]:
    return {f"{each.status} {each.code}" for each in streams if each.how == "refused"}


def _slowest(streams: list[Stream]) -> float:
    """Seconds until the last of them had its answer."""
    return max((each.first or each.ended) - each.begun for each in streams)
