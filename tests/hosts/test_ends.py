"""A relay is killed, or all are deployed one after the other, while requests go on coming."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from harness import eventually

from hosts.lab import DRAIN, LAME_DUCK
from hosts.streams import SCALE, ends, hold, scaled, slowest

if TYPE_CHECKING:
    from hosts.lab import Lab

pytestmark = pytest.mark.slow

#: Seconds after which nobody may be sent to a relay that is not there.
NOTICED = 2.0


@pytest.mark.parametrize("what", ["master", "all"])
def test_a_relay_that_is_killed(lab: Lab, what: str) -> None:
    """Its master alone: the worker drains, and its streams are whole. All of it: its port is closed at once."""
    killed = lab.relays[0]
    before = lab.load(f"killed-{what}-before")
    with before.trickle(5, seconds=0):  # the edge leaves out for a while what was not there
        eventually(lambda: bool(before.streams.keys() & lab.through(killed)), "it gets requests", 15)
    before.wait_ended()
    held = lab.load(f"killed-{what}-held").open(scaled(30), seconds=6).wait_begun()
    theirs = [each for each in held.all() if each.id in lab.through(killed)]
    others = [each for each in held.all() if each.id not in lab.through(killed)]
    new = lab.load(f"killed-{what}-new")
    with new.trickle(10 * SCALE, seconds=0.5):
        eventually(lambda: len(new.all()) >= 5, "requests come")
        at = time.monotonic()
        if what == "all":
            os.killpg(killed.server.pid, signal.SIGKILL)
        else:
            killed.server.send_signal(signal.SIGKILL)
        eventually(lambda: len(new.since(at + NOTICED)) >= scaled(40), "and go on")
    for load in (held, new):
        load.wait_ended()
    name = "a relay's master killed" if what == "master" else "a relay killed, master and worker"
    late = new.since(at + NOTICED)
    lab.record(f"{name}: its streams", theirs, at)
    lab.record(f"{name}: the others' streams", others)
    lab.record(f"{name}: requests within {NOTICED:g} s", [each for each in new.all() if each not in late])
    lab.record(f"{name}: later requests", late)
    billed = lab.billed()
    end = "whole" if what == "master" else "cut"
    hold(
        {
            f"it has a share of the streams: {len(theirs)}": len(theirs) >= len(held.all()) // 4,
            f"its {len(theirs)} streams are {end}: {ends(theirs)}": ends(theirs) == {end: len(theirs)},
            f"the others' are whole: {ends(others)}": ends(others) == {"whole": len(others)},
            f"nobody is refused after {NOTICED:g} s: {ends(late)}": ends(late) == {"whole": len(late)},
            "none is sent twice": not any(billed[each.id] > 1 for each in [*held.all(), *new.all()]),
        }
    )


def test_a_rolling_deploy(lab: Lab) -> None:
    """SIGTERM, wait for the end, start anew, and so with the next: nobody notices."""
    load = lab.load("deploy")
    took = []
    with load.trickle(8 * SCALE, seconds=3):
        load.wait_begun()
        for relay in lab.relays:
            began = time.monotonic()
            eventually(lambda relay=relay: not relay.is_idle(), "it has streams")  # type: ignore[misc]
            relay.server.stop(signal.SIGTERM, LAME_DUCK + DRAIN + 10)
            lab.restart(relay)
            took.append(time.monotonic() - began)
    load.wait_ended()
    lab.record("a rolling deploy", load.all())
    billed = lab.billed()
    hold(
        {
            f"all are whole: {load.ends()}": load.ends() == {"whole": len(load.all())},
            "each is sent once": all(billed[each.id] == 1 for each in load.all()),
            f"none takes longer: {slowest(load.all()):.1f} s": slowest(load.all()) < 3 + NOTICED,
            f"streams are not waited for until the drain ends: {max(took):.1f} s": max(took) < LAME_DUCK + DRAIN,
        }
    )
