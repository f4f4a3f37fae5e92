"""What is measured: for each measure the work, and what is calculated from it. How it is told is bench.report's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import check
from bench.work import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.process import Server
    from bench.rig import Rig

#: What may be wrong with a figure.
CHANGED = "wrong bytes: framed anew"
LOST = "wrong bytes: lost or cut"
REFUSED = "streams refused"
OVERLOADED = "overloaded"
GENERATOR = "generator's limit"
MACHINE = "machine's limit"
#: Shares of a core from which a process counts as having no more to give.
_FULL = 0.9

STREAMS = 100
_GAP_US = 20_000  # 50 events/s
_FLOOD_STREAMS = 50
_CLIENTS = 20
_SHORT_RATE = 200  # streams/s
_FIRST_RATE = 250  # streams/s
_TLS_RATE = 100  # streams/s
_OTHERS = 20
_FINISH = 8.0  # seconds that streams may take to end


@dataclass(frozen=True)
class Mode:
    """How much of it. Times in seconds."""

    name: str
    rounds: int
    window: float
    settle: float
    flood_events: int  # in each stream
    flood_limit: float
    many: int  # open streams
    many_rate: int  # opened per second
    many_limit: float = 60.0


# Short turns and many: what a machine does beside comes and goes in minutes, and meets everybody in a round alike.
FULL = Mode("full", 5, 1.5, 0.3, 10_000, 5.0, 4000, 500)
QUICK = Mode("quick", 1, 0.3, 0.1, 3_000, 1.0, 300, 1000, many_limit=5.0)
SMOKE = Mode("smoke", 1, 0.15, 0.05, 100, 1.0, 50, 1000, many_limit=5.0)


@dataclass
class Target:
    """Who has its turn. For the direct way to the upstream there is no server."""

    server: Server | None
    port: int

    @property
    def pids(self) -> list[int]:
        return self.server.pids() if self.server else []


@dataclass
class Outcome:
    """What one run gave: figures by the row of the report that they belong to."""

    values: dict[str, float]
    flags: set[str]
    raw: dict[str, Any]


def events(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """CPU and latency of an event, in streams that are open already. Some five come together, as those of a model
    that decodes for many at once do."""
    return _events(rig, mode, target, "", times(STREAMS, _GAP_US, step=1000))


def alone(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """The same with events that come one by one: whoever waits is woken for each."""
    return _events(rig, mode, target, "alone_", times(STREAMS, _GAP_US))


def _events(rig: Rig, mode: Mode, target: Target, prefix: str, times: list[int]) -> Outcome:
    plan = Plan("main", gap_us=_GAP_US, spread=True)
    steps = [
        {"do": "open", "group": "main", "count": STREAMS, "rate": 1000, "limit": 10},
        {"do": "run", "seconds": mode.settle},
        {"do": "run", "seconds": mode.window, "window": "w"},
        {"do": "finish", "limit": _FINISH},
    ]
    raw = rig.run(target.port, target.pids, [plan], steps, times)
    window = raw["windows"]["w"]
    found = window["groups"]["main"]
    values = _latency(found["latency_us"], f"{prefix}latency")
    if target.server and found["events"]:
        values[f"{prefix}event_cpu_us"] = window["cpu"]["peer"] / found["events"] * 1e6
    short = found["events"] < 0.95 * STREAMS * window["seconds"] * 1e6 / _GAP_US
    return _outcome(values, raw, overloaded=short)


def flood(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """Events per second when no upstream waits, and writes each event by itself."""
    return _flood(rig, mode, target, "flood", Plan("main", events=mode.flood_events))


def blocks(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """The same when upstreams write 256 KiB at a time: the generator has next to nothing to do then."""
    return _flood(rig, mode, target, "blocks", Plan("main", events=mode.flood_events * 2, blocks=True))


def _flood(rig: Rig, mode: Mode, target: Target, key: str, plan: Plan) -> Outcome:
    steps = [{"do": "flood", "group": "main", "count": _FLOOD_STREAMS, "limit": mode.flood_limit, "window": "w"}]
    raw = rig.run(target.port, target.pids, [plan], steps)
    window = raw["windows"]["w"]
    count = window["groups"]["main"]["events"]
    values = {f"{key}_rate": count / max(window["flood_seconds"], 1e-6)}
    outcome = _outcome(values, raw, overloaded=False)
    if target.server:
        values[f"{key}_per_cpu"] = count / window["cpu"]["peer"]
        if GENERATOR not in outcome.flags and window["cpu"]["peer"] < _FULL * window["seconds"]:
            outcome.flags.add(MACHINE)
    return outcome


def short(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """CPU of a whole stream, a connection of its own included, at a steady rate."""
    plan = Plan("main", events=3, gap_us=1000)
    steps = [
        {"do": "run", "seconds": mode.settle, "rate": {"main": _SHORT_RATE}},
        {"do": "run", "seconds": mode.window, "window": "w", "rate": {"main": _SHORT_RATE}},
        {"do": "finish", "limit": _FINISH},
    ]
    raw = rig.run(target.port, target.pids, [plan], steps)
    finished, overloaded = _finished(raw["windows"]["w"], "main")
    return _outcome({"short_cpu_us": raw["windows"]["w"]["cpu"]["peer"] / finished * 1e6}, raw, overloaded=overloaded)


def short_fast(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """The same, as fast as some clients go that open the next one when one has ended."""
    plan = Plan("main", events=3, gap_us=1000)
    steps = [
        {"do": "loop", "group": "main", "clients": _CLIENTS},
        {"do": "run", "seconds": mode.settle},
        {"do": "run", "seconds": mode.window, "window": "w"},
        {"do": "finish", "limit": _FINISH},
    ]
    raw = rig.run(target.port, target.pids, [plan], steps)
    window = raw["windows"]["w"]
    finished = window["groups"]["main"]["finished"] or 1
    values = {
        "short_fast_cpu_us": window["cpu"]["peer"] / finished * 1e6,
        "short_fast_rate": finished / window["seconds"],
    }
    return _outcome(values, raw, overloaded=False)


def first(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """From a client's connecting to its first event, while many connect."""
    plan = Plan("main", events=10, gap_us=50_000)
    steps = [
        {"do": "run", "seconds": max(mode.settle, 0.3), "rate": {"main": _FIRST_RATE}},
        {"do": "run", "seconds": mode.window, "window": "w", "rate": {"main": _FIRST_RATE}},
        {"do": "finish", "limit": _FINISH},
    ]
    raw = rig.run(target.port, target.pids, [plan], steps)
    window = raw["windows"]["w"]
    _, overloaded = _finished(window, "main")
    found = window["groups"]["main"]["first_us"]
    values = {f"first_{key}_ms": found[key] / 1000 for key in ("p50", "p99") if key in found}
    return _outcome(values, raw, overloaded=overloaded)


def many(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """Thousands of open streams, with as many events as the hundred of `events` have together. The server is fresh."""
    gap_us = _GAP_US * mode.many // STREAMS
    plan = Plan("main", gap_us=gap_us, spread=True)
    warm = Plan("warm", events=3, gap_us=1000)
    steps: list[dict[str, Any]] = [
        {"do": "run", "seconds": 0.5, "rate": {"warm": 50}},
        {"do": "memory", "name": "before"},
        {"do": "open", "group": "main", "count": mode.many, "rate": mode.many_rate, "limit": mode.many_limit},
        {"do": "run", "seconds": mode.settle * 2},
        {"do": "run", "seconds": mode.window, "window": "w"},
        {"do": "memory", "name": "open"},
        {"do": "finish", "limit": _FINISH + gap_us / 1e6},
    ]
    raw = rig.run(target.port, target.pids, [plan, warm], steps, times(mode.many, gap_us, step=1000))
    window = raw["windows"]["w"]
    found = window["groups"]["main"]
    served = raw["verdicts"].get(check.OK, 0) + raw["verdicts"].get(check.CHANGED, 0)
    values = {"many_refused": float(mode.many + 25 - served)}
    overloaded = found["events"] < 0.95 * mode.many * window["seconds"] * 1e6 / gap_us
    if found["events"]:
        memory = raw["memory_kib"]
        values["many_kib"] = (memory["open"] - memory["before"]) / max(served - 25, 1)
        values["many_event_cpu_us"] = window["cpu"]["peer"] / found["events"] * 1e6
        values |= _latency(found["latency_us"], "many_latency")
    return _outcome(values, raw, overloaded=overloaded)


def tls_reused(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """CPU of a stream over HTTPS, with an upstream that keeps its connections open."""
    return _tls(rig, mode, target, "tls_reused", close=False)


def tls_new(rig: Rig, mode: Mode, target: Target) -> Outcome:
    """CPU of a stream over HTTPS, with an upstream that closes each connection after its stream."""
    return _tls(rig, mode, target, "tls_new", close=True)


def _tls(rig: Rig, mode: Mode, target: Target, key: str, *, close: bool) -> Outcome:
    gap_us = 100_000
    others = Plan("others", gap_us=gap_us, spread=True)
    main = Plan("main", events=3, gap_us=1000, close=close)
    rate = {"main": _TLS_RATE}
    steps: list[dict[str, Any]] = [
        {"do": "open", "group": "others", "count": _OTHERS, "rate": 200, "limit": 10},
        {"do": "run", "seconds": max(mode.settle, 0.2), "rate": rate},
        {"do": "run", "seconds": 0.1},
        {"do": "run", "seconds": mode.window, "window": "before"},
        {"do": "run", "seconds": mode.window, "window": "w", "rate": rate},
        {"do": "finish", "limit": _FINISH},
    ]
    raw = rig.run(target.port, target.pids, [others, main], steps, times(_OTHERS, gap_us))
    before, window = raw["windows"]["before"], raw["windows"]["w"]
    finished, overloaded = _finished(window, "main")
    cpu = window["cpu"]["peer"] - before["cpu"]["peer"] * window["seconds"] / before["seconds"]
    values = {f"{key}_cpu_ms": cpu / finished * 1e3}
    for name, found in (("alone", before), ("others", window)):
        latency = found["groups"]["others"]["latency_us"]
        values |= {f"{key}_{name}_{share}_ms": latency[share] / 1000 for share in ("p50", "p99") if share in latency}
    return _outcome(values, raw, overloaded=overloaded)


#: By name, in the order in which they are taken. Those of `FRESH` get a server of their own, those of `TLS` one in
#: front of the HTTPS port; only those of `DIRECT` are taken on the direct way too.
MEASURES: dict[str, Callable[[Rig, Mode, Target], Outcome]] = {
    measure.__name__: measure
    for measure in (events, alone, flood, blocks, short, short_fast, first, many, tls_reused, tls_new)
}
FRESH = {"many"}
TLS = {"tls_reused", "tls_new"}
DIRECT = {"events", "alone", "flood", "blocks", "first"}


def times(streams: int, gap_us: int, *, step: int = 1) -> list[int]:
    """A time for each stream within a gap, a multiple of `step`: the same ones for everybody, without a pattern."""
    chance = random.Random(4)
    return [chance.randrange(0, gap_us, step) for _ in range(streams)]


def _latency(found: dict[str, float], name: str) -> dict[str, float]:
    return {f"{name}_{share}_us": found[share] for share in ("p50", "p99") if share in found}


def _finished(window: dict[str, Any], group: str) -> tuple[int, bool]:
    """How many streams ended in a window, and whether fewer began in it than were asked for."""
    found = window["groups"][group]
    return max(found["finished"], 1), found["answered"] < 0.9 * found["started"]


def _outcome(values: dict[str, float], raw: dict[str, Any], *, overloaded: bool) -> Outcome:
    flags = set()
    verdicts = {*raw["verdicts"], *raw["dropped"]}
    if check.CHANGED in verdicts:
        flags.add(CHANGED)
    if verdicts & {check.LOST, check.CUT}:
        flags.add(LOST)
    if verdicts & {check.REFUSED, check.FAILED}:
        flags.add(REFUSED)
    for window in raw["windows"].values():
        if max(window["cpu"]["client"], window["cpu"]["upstream"]) >= _FULL * window["seconds"]:
            flags.add(GENERATOR)
    if overloaded:
        flags.add(OVERLOADED)
    return Outcome(values, flags, raw)
