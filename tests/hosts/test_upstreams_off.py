"""The upstreams' hosts are powered off: one of two, which nobody notices, and both."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from hosts.lab import CONNECT_TIMEOUT
from hosts.streams import ends, hold, scaled, slowest, slowest_first, within

if TYPE_CHECKING:
    from hosts.lab import Lab

pytestmark = pytest.mark.slow

#: Seconds in which a stream of a vanished host must end.
NOTICED = 30.0
#: Seconds in which a relay must have answered that waits for no host that is gone.
AT_ONCE = 1.0
#: Seconds after which a host that is back must be asked again.
BACK = 5.0


def test_one_of_two_upstreams(lab: Lab) -> None:
    """New requests go to the other at once."""
    held = lab.load("one-upstream-off-held").open(scaled(12), seconds=60, within=100).wait_begun()
    lab.hosts["upstream1"].power_off()
    new = lab.load("one-upstream-off-new")
    for _ in range(2):
        new.open(scaled(12), seconds=0)
        new.wait_ended()
    lab.record("one of two upstreams off: new requests", new.all())
    billed = lab.billed()
    hold(
        {
            "it has had the streams until then": all(each.id in lab.through_upstream(0) for each in held.all()),
            f"new requests go to the other: {new.ends()}": new.ends() == {"whole": len(new.all())},
            f"at once: {slowest_first(new.all()):.2f} s": slowest_first(new.all()) <= AT_ONCE,
            "none is sent twice": not any(billed[each.id] > 1 for each in new.all()),
        }
    )


def test_all_upstreams(lab: Lab) -> None:
    """Streams end with an error frame, new requests are refused at once when five have failed, and pass again soon
    after the hosts are back."""
    held = lab.load("upstreams-off-held").open(scaled(30), seconds=300, every=0.5, within=200).wait_begun()
    off = time.monotonic()
    for name in ("upstream1", "upstream2"):
        lab.hosts[name].power_off()
    first = lab.load("upstreams-off-first").open(scaled(24), seconds=0, within=NOTICED)
    first.wait_ended(NOTICED + 5)
    then = lab.load("upstreams-off-then").open(scaled(12), seconds=0, within=NOTICED)
    then.wait_ended(NOTICED + 5)
    within(lambda: all(each.how for each in held.all()), off + NOTICED + 10 - time.monotonic())
    cut = [each for each in held.all() if each.how]
    for name in ("upstream1", "upstream2"):
        lab.hosts[name].power_on()
    on = time.monotonic()
    back = lab.load("upstreams-back")
    with back.trickle(5, seconds=0, within=CONNECT_TIMEOUT + 5):
        within(lambda: len(back.since(on + BACK)) >= 10, 10)
    back.wait_ended()
    later = back.since(on + BACK)
    lab.record("all upstreams off: open streams", held.all(), off)
    lab.record("all upstreams off: the first requests", first.all())
    lab.record("all upstreams off: when five have failed", then.all())
    lab.record("all upstreams back: from the first second", back.all())
    lab.record(f"all upstreams back: after {BACK:g} s", later)
    answers = Counter(f"{each.status} {each.code}" for each in then.all())
    billed = lab.billed()
    hold(
        {
            f"each stream is cut with a frame: {held.ends()}": held.ends() == {"framed": len(held.all())},
            f"within {NOTICED:g} s: {slowest(cut, off):.1f} s": slowest(cut, off) <= NOTICED,
            f"the first are refused: {first.ends()}": first.ends() == {"refused": len(first.all())},
            f"then all get 502: {answers}": {each.status for each in then.all()} == {502},
            f"at once: {slowest(then.all()):.1f} s": slowest(then.all()) <= AT_ONCE,
            f"requests pass {BACK:g} s after they are back: {ends(later)}": ends(later) == {"whole": len(later)},
            "none is sent twice": not any(count > 1 for count in billed.values()),
        }
    )
