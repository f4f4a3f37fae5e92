"""`python -m bench.fairness`: what 100 ordinary streams of one worker notice of others that want much of it.

Their events come once in 50 ms each. In turn they are alone and have one kind of other work beside them (bench.beside),
pair after pair, while the same streams stay open; what counts is the 99th percentile of an event's time through the
relay. Below 5 ms it counts as 5 ms, since who may have a core then decides, and not the relay.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import report
from bench.__main__ import fit_to_files, machine, say
from bench.beside import GAP_US, KINDS
from bench.measures import FULL, STREAMS, times
from bench.peers import PEERS
from bench.process import Broken
from bench.rig import Rig
from bench.work import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.process import Server

#: The others' p99 with the other work, in times of that without it.
_BOUND = 3.0
_FLOOR_MS = 5.0
#: Seconds to settle in, and of a window.
_SETTLE, _WINDOW = 1.5, 2.0
_PAIRS = 5


@dataclass(frozen=True)
class Found:
    """What one kind of other work did, in milliseconds by pair."""

    kind: str
    alone: list[float]
    beside: list[float]
    did: dict[str, float]  # the other work, in all
    cpu: float  # the relay's cores meanwhile
    fault: str  # what was wrong with the ordinary streams; empty: nothing

    @property
    def ratio(self) -> float:
        alone, beside = (max(statistics.median(figures), _FLOOR_MS) for figures in (self.alone, self.beside))
        return beside / alone

    @property
    def kept(self) -> bool:
        return self.ratio <= _BOUND and not self.fault


def measure(rig: Rig, server: Server, kind: str, pairs: int) -> Found:
    """Take the pairs. Raises Broken."""
    command = [sys.executable, "-m", "bench.beside", kind, str(server.port)]
    steps: list[dict[str, Any]] = [{"do": "open", "group": "main", "count": STREAMS, "rate": 500, "limit": 10}]
    for pair in range(pairs):
        steps += [
            {"do": "run", "seconds": _SETTLE},
            {"do": "run", "seconds": _WINDOW, "window": f"alone {pair}"},
            {"do": "beside", "command": command},
            {"do": "run", "seconds": _SETTLE},
            {"do": "run", "seconds": _WINDOW, "window": f"beside {pair}"},
            {"do": "alone", "window": f"beside {pair}"},
        ]
    steps.append({"do": "finish", "limit": 10})
    plan = Plan("main", gap_us=GAP_US, spread=True)
    raw = rig.run(server.port, server.pids(), [plan], steps, times(STREAMS, GAP_US, step=1000))
    windows = [[raw["windows"][f"{name} {pair}"] for pair in range(pairs)] for name in ("alone", "beside")]
    alone, beside = ([each["groups"]["main"]["latency_us"]["p99"] / 1000 for each in both] for both in windows)
    did: dict[str, float] = {}
    for window in windows[1]:
        for what, count in window["beside"].items():
            did[what] = did.get(what, 0) + count
    wrong = {verdict: count for verdict, count in {**raw["verdicts"], **raw["dropped"]}.items() if verdict != "ok"}
    cpu = statistics.median(window["cpu"]["peer"] / window["seconds"] for window in windows[1])
    return Found(kind, alone, beside, did, cpu, ", ".join(f"{count} {verdict}" for verdict, count in wrong.items()))


def table(found: Sequence[Found]) -> str:
    head = ["beside 100 streams", "p99 alone, ms", "p99 beside, ms", "ratio", "the relay's cores", "what was done"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for each in found:
        alone, beside = statistics.median(each.alone), statistics.median(each.beside)
        kept = "" if each.kept else " over the bound"
        cells = [
            KINDS[each.kind][0],
            f"{alone:.1f}",
            f"{beside:.1f} ({min(each.beside):.1f} to {max(each.beside):.1f})",
            f"{each.ratio:.1f}{kept} {each.fault}".strip(),
            f"{each.cpu:.2f}",
            _told(each.did),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(did: dict[str, float]) -> str:
    seconds = did.get("seconds") or 1.0
    said = [f"{count:.0f} times {status}" for status, count in sorted(did.items()) if status.isdigit()]
    said += [f"{did[what]:.0f} {what}" for what in ("streams", "ended", "broken") if what in did]
    if did.get("bytes", 0) > 1e6:
        said.append(f"{did['bytes'] / 1e6 / seconds:.0f} MB/s")
    return ", ".join(said) or "nothing"


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fairness", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME,…", help="of " + ", ".join(KINDS))
    parser.add_argument("--pairs", type=int, default=_PAIRS, help=f"[{_PAIRS}]")
    options = parser.parse_args(args)
    kinds = [name for name in options.only.split(",") if name] or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only knows no {', '.join(sorted(unknown))}")
    fit_to_files(FULL)
    relay = next(peer for peer in PEERS if peer.name == report.RELAY)
    relay = replace(relay, settings={"RELAY_MODELS": "bench", "RELAY_CHAT_MODEL": "bench"})
    found: list[Found] = []
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="relay-fairness-")))
        rig = ends.enter_context(Rig(folder))
        server = relay.start(rig.port, folder / "relay")
        ends.callback(server.end)
        server.wait()
        for kind in kinds:
            say(f"{kind}: {KINDS[kind][0]}")
            try:
                found.append(measure(rig, server, kind, options.pairs))
            except Broken as error:
                say(f"note: {kind} failed: {error}")
    about = machine()
    print(table(found))
    print(f"\n{about['cpu']}, {about['cores']} cores, Python {about['python']}, medians of {options.pairs} pairs")
    return 0 if len(found) == len(kinds) and all(each.kept for each in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
