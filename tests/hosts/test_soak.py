"""Under a steady load one relay after the other is killed, powered off or deployed; then everything is counted.

`make hosts-soak` does it for ten minutes, one relay a minute (HOSTS_MINUTES for more), the suite in three short rounds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import pytest

from hosts.fates import Blow, find_fates, most_at_once
from hosts.lab import DRAIN, LAME_DUCK, REDIS_URL, SPARE_FILES, without_redis
from hosts.streams import SCALE, ends, hold, scaled, within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hosts.host import Host
    from hosts.lab import Lab, Relay

MINUTES = int(os.environ.get("HOSTS_MINUTES") or 0)
#: How many rounds; and in seconds how long each is, when its relay is struck, and how long a host is off.
ROUNDS, ROUND, CALM, OFF = (MINUTES, 60.0, 5.0, 20.0) if MINUTES else (3, 6.0, 1.0, 4.0)
LONG = 30.0 if MINUTES else 8.0
LIMIT = scaled(20)
REDIS = True
SETTINGS = {"RELAY_LIMITS_URL": REDIS_URL, "RELAY_MAX_STREAMS_PER_CLIENT": str(LIMIT)}

#: What each client asks for: requests a second, their seconds, and whether they are feeds. `greedy` wants 30 at a time.
LOAD = {
    "short": (4.0, 1.0, False), "middle": (1.6, 5.0, False), "long": (0.4, LONG, False), "feeds": (1.6, 5.0, True),
    "greedy": (6.0, 5.0, False),
}  # fmt: skip
#: Seconds by which a stream may be late until it counts as hanging.
PATIENCE = 30.0
#: Seconds after which leases must be gone (10, and a bit), and everything else.
LEASE, LEFT = 13.0, 60.0
#: KiB by which a worker may have grown since its first round.
SPARE_MEMORY = 16 * 1024

pytestmark = [pytest.mark.slow, pytest.mark.watchdog(ROUNDS * ROUND + 300)]


def test_soak(lab: Lab) -> None:
    """Each request adds up, none is lost but to its relay's blow, and nothing is left of any."""
    connections = {name: count(host) for name, host in lab.hosts.items()}
    loads = [lab.load(name) for name in LOAD]
    memory: dict[int, list[int]] = defaultdict(list)  # of each worker, after each of its rounds
    blows: list[Blow] = []
    begun = [time.monotonic()]
    with contextlib.ExitStack() as stack:
        for key, (load, (rate, seconds, feed)) in enumerate(zip(loads, LOAD.values(), strict=True)):
            patience = seconds + PATIENCE
            stack.enter_context(load.trickle(rate * SCALE, seconds=seconds, key=key, within=patience, feed=feed))
        for number in range(ROUNDS):
            time.sleep(CALM)
            blows.append(strike(lab, lab.relays[number % 3], (number + number // 3) % 3))
            time.sleep(max(begun[-1] + ROUND - time.monotonic(), 0))
            sizes = {pid: size for relay in lab.relays for pid, size in relay.memory().items()}
            for pid, size in sizes.items():
                memory[pid].append(size)
            seen = ends(each for load in loads for each in load.since(begun[-1]))
            begun.append(time.monotonic())
            held = ", ".join(f"{size / 1024:.1f}" for size in sizes.values())
            print(f"\n{number + 1}: {blows[-1].title}: {counts(seen)}; workers of {held} MiB", end="", flush=True)
    streams = [each for load in loads for each in load.all()]
    over = within(lambda: all(each.how for each in streams), LONG + PATIENCE + 5)
    left = what_is_left(lab, connections)
    for number, (blow, since, until) in enumerate(zip(blows, begun, begun[1:], strict=False), 1):
        lab.record(f"{number}: {blow.title}", [each for each in streams if since <= each.begun < until])
    for load in loads:
        lab.record(load.name, load.all())
    lab.record("all", streams)
    fates = find_fates(lab, streams)
    odd = [each for each in fates.values() if not each.adds_up(blows)]
    print("", *(f"{count:6} {fate}" for fate, count in Counter(map(str, fates.values())).most_common()), sep="\n")
    if odd:
        edge = {line["request_id"]: line for line in lab.logged("edge")}
        print("odd:", *blows, *((each, edge.get(each.stream.id)) for each in odd[:30]), sep="\n")
    found, billed = ends(streams), {name for name in lab.billed() if not name.startswith("alone-")}
    most = most_at_once([each for each in fates.values() if each.stream.id.startswith("greedy-")], blows)
    growth = {pid: sizes[-1] - sizes[0] for pid, sizes in memory.items()}
    claims = {
        f"all have ended: {counts(found)}": over,
        "none hangs": not found["hanging"],
        "none is truncated silently": not found["silent"],
        "none is sent twice": all(len(each.billed) <= 1 for each in fates.values()),
        "nothing is billed that nobody asked for": billed <= fates.keys(),
        f"each adds up: {len(odd)} do not": not odd,
        "some are cut, and some refused": bool(found["cut"] and found["refused"]),
        f"a client gets {LIMIT} at a time and no more: {most}": most == LIMIT,
        f"no worker grows by more than {SPARE_MEMORY} KiB: {growth}": max(growth.values()) <= SPARE_MEMORY,
    } | left
    print(*(f"{'holds' if holds else 'FAILS'}: {claim}" for claim, holds in claims.items()), sep="\n")
    hold(claims)


def counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {how or 'open'}" for how, count in found.most_common())


def strike(lab: Lab, relay: Relay, kind: int) -> Blow:
    """Kill, power off or deploy it; it is back when this returns."""
    blow = Blow(("killed", "powered off", "deployed")[kind], relay.host.name, time.monotonic())
    if blow.what == "killed":
        os.killpg(relay.server.pid, signal.SIGKILL)
        blow.until = time.monotonic()
        lab.restart(relay)
    elif blow.what == "powered off":
        relay.host.power_off()
        time.sleep(OFF)
        relay.host.power_on()
        blow.until = time.monotonic()
    else:
        assert relay.server.stop(signal.SIGTERM, LAME_DUCK + DRAIN + 10) == 0
        blow.until = time.monotonic()
        lab.restart(relay)
    return blow


def what_is_left(lab: Lab, connections: Mapping[str, int]) -> dict[str, bool]:
    """The claims that nothing is. `connections`: how many each host had at the start."""
    claims = {f"{relay.host.name}: no stream is open": within(relay.is_idle, LEFT, 0.1) for relay in lab.relays}
    gone = within(lambda: not lab.leases(), LEASE, 0.1)
    claims[f"no lease is left: {lab.leases()}"] = gone
    for relay in lab.relays:
        back = within(relay.is_as_at_start, LEFT, 0.5)
        claims[f"{relay.host.name}: {relay.files} descriptors: {relay.descriptors()}"] = back
    gone = within(lambda: not lab.half_open(), LEFT, 0.5)
    claims[f"no connection is half open: {lab.half_open()}"] = gone
    for name, host in lab.hosts.items():
        most = connections[name] + SPARE_FILES
        back = within(lambda host=host, most=most: count(host) <= most, LEFT, 0.5)  # type: ignore[misc]
        claims[f"{name}: {connections[name]} connections: {count(host)}"] = back
    return claims


def count(host: Host) -> int:
    return len(without_redis(host.connections()))
