"""A relay's host or the edge's is powered off: its packets are dropped in both directions, and nobody gets a reset."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from hosts.lab import WRITE_TIMEOUT
from hosts.streams import SCALE, Row, ends, hold, scaled, slowest, table, within

if TYPE_CHECKING:
    from hosts.lab import Lab

pytestmark = pytest.mark.slow

#: Seconds in which a stream of a vanished host must end.
NOTICED = 30.0
#: Seconds that the edge keeps idle connections (nginx/snippets/relay-upstream.conf), and a bit.
EDGE_IDLE = 3.5


def test_a_relays_host(lab: Lab) -> None:
    """Its clients see the cut, the others' see nothing, and new requests go through the others."""
    gone = lab.relays[0]
    held = lab.load("relay-off-held")
    held.open(scaled(60), seconds=300, every=0.5, within=200)
    held.wait_begun()
    lab.load("relay-off-before").open(scaled(12), seconds=0).wait_ended()  # the edge has an idle connection to each
    theirs = [each for each in held.all() if each.id in lab.through(gone)]
    others = [each for each in held.all() if each.id not in lab.through(gone)]
    off = time.monotonic()
    gone.host.power_off()
    early = lab.load("relay-off-early").open(scaled(12), seconds=1, within=NOTICED + 2)
    new = lab.load("relay-off-new")
    within(lambda: time.monotonic() > off + EDGE_IDLE, EDGE_IDLE + 1)
    with new.trickle(2 * SCALE, seconds=1, within=NOTICED):
        within(lambda: all(each.how for each in theirs), NOTICED + 2)
        cut = time.monotonic()
        within(lambda: len(new.since(cut)) >= 10, 10)  # the edge counts no connection of the dead relay's any more
    new.wait_ended(NOTICED + 5)
    early.wait_ended(NOTICED + 5)
    lab.record("a relay's host off: its streams", theirs, off)
    lab.record("a relay's host off: the others' streams", others)
    lab.record("a relay's host off: requests within 3 s", early.all())
    lab.record("a relay's host off: later requests", new.all())
    billed = lab.billed()
    everybody = [*held.all(), *early.all(), *new.all()]
    hold(
        {
            f"each of its {len(theirs)} streams is cut: {ends(theirs)}": ends(theirs) == {"cut": len(theirs)},
            f"within {NOTICED:g} s: {slowest(theirs, off):.1f} s": slowest(theirs, off) <= NOTICED,
            f"the others' streams go on: {ends(others)}": ends(others) == {"": len(others)},
            f"later requests go through the others: {new.ends()}": new.ends() == {"whole": len(new.all())},
            f"none of the requests within 3 s hangs: {early.ends()}": not early.ends()["hanging"],
            "none is sent twice": not any(billed[each.id] > 1 for each in everybody),
            "none is truncated silently": not ends(everybody)["silent"],
        }
    )


def test_the_edges_host(lab: Lab) -> None:
    """The relays end its streams and their upstream connections, whether the upstream is talking or silent."""
    most = WRITE_TIMEOUT * 1.3
    talking = lab.load("edge-off-talking").open(scaled(20), seconds=120, every=0.2, within=200).wait_begun()
    silent = lab.load("edge-off-silent").open(scaled(20), seconds=120, every=120, within=200).wait_begun()
    off = time.monotonic()
    lab.hosts["edge"].power_off()
    claims = {}
    idle = within(lambda: all(relay.is_idle() for relay in lab.relays), most + 3)
    claims[f"no relay has one open after {most:g} s: {idle}, {time.monotonic() - off:.1f} s"] = (
        idle and time.monotonic() - off <= most
    )
    for load in (talking, silent):
        within(lambda load=load: len(lab.upstream_ends(load)) == len(load.streams), 2)  # type: ignore[misc]
        seen = lab.upstream_ends(load)
        last = max(seen.values(), default=off) - off
        left = len(load.streams) - len(seen)
        table.append(Row(f"the edge's host off: {load.name}", Counter(cut=len(seen), hanging=left), 0, last))
        claims[f"{load.name}: upstream all are closed within {most:g} s: {left} open, {last:.1f} s"] = (
            not left and last <= most
        )
    hold(claims)
