"""`python -m bench`: starts everybody, has them take turns at the same work, and writes down what came out."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import chart, measures, report
from bench.peers import PEERS, Peer
from bench.rig import Rig
from bench.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.measures import Mode

_RESULTS = Path(__file__).parent / "results"
#: Open files that a relay needs beside its streams'.
_FILES = 500


def main(args: Sequence[str] | None = None) -> int:
    options = arguments(args)
    mode = fit_to_files(options.mode)
    peers, skipped = choose(options.only)
    for name, reason in skipped.items():
        say(f"note: {name} is left out: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    about = machine()
    with contextlib.ExitStack() as ends:
        folder = Path(
            ends.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-", ignore_cleanup_errors=True))
        )
        folder.chmod(0o755)  # the workers of an nginx that root starts are somebody else
        rig = ends.enter_context(Rig(folder))
        if rig.ca is None:
            say("note: HTTPS is left out: openssl is not installed")
        turns = Turns(rig, folder, mode, options.measures, ends)
        say(f"starting {', '.join(peer.name for peer in peers)}")
        peers = turns.start(peers)
        if peers:
            turns.take(peers)
    for what, reason in turns.failures.items():
        say(f"note: {what} failed: {reason}")
    about["load_at_end"] = os.getloadavg()
    about["cores_used_by_others"] = round(report.others_cores(turns.runs), 2)
    table = report.cells(turns.runs, [peer.name for peer in peers], mode.rounds)
    write(options.out, about, mode, peers, skipped, turns, table)
    wrong = report.wrong_bytes(turns.runs, report.RELAY)
    if wrong:
        say(f"the relay's bytes were wrong: {wrong}")
    return 1 if turns.failures or wrong or not peers else 0


def arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="mode", action="store_const", const=measures.QUICK, help="in less than a minute")
    size.add_argument("--smoke", dest="mode", action="store_const", const=measures.SMOKE, help="only whether it works")
    parser.add_argument("--only", default="", metavar="NAME,…", help="of " + ", ".join(peer.name for peer in PEERS))
    parser.add_argument("--measures", default="", metavar="NAME,…", help="of " + ", ".join(measures.MEASURES))
    parser.add_argument("--rounds", type=int, help=f"how often each has its turn [{measures.FULL.rounds}]")
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="FOLDER", help=f"[{_RESULTS}]")
    parser.set_defaults(mode=measures.FULL)
    found = parser.parse_args(args)
    known = {"only": [peer.name for peer in PEERS], "measures": list(measures.MEASURES)}
    for option, names in known.items():
        asked = [name.strip() for name in getattr(found, option).split(",") if name.strip()]
        unknown = [name for name in asked if name not in names]
        if unknown:
            parser.error(f"--{option} knows no {', '.join(unknown)}")
        setattr(found, option, [name for name in names if not asked or name in asked])
    if found.rounds is not None:
        if found.rounds < 1:
            parser.error("--rounds must be at least 1")
        found.mode = replace(found.mode, rounds=found.rounds)
    return found


def choose(names: Sequence[str]) -> tuple[list[Peer], dict[str, str]]:
    """Who takes part, and why others do not."""
    wanted = [peer for peer in PEERS if peer.name in names]
    skipped = {peer.name: reason for peer in wanted if (reason := peer.missing())}
    return [peer for peer in wanted if peer.name not in skipped], skipped


def fit_to_files(mode: Mode) -> Mode:
    """Raise this process' limit of open files, which the servers inherit; open fewer streams where that is too low."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = (hard - _FILES) // 2
    if most < mode.many:
        say(f"note: the limit of open files ({hard}) allows {most} open streams and not {mode.many} (ulimit -Hn)")
        mode = replace(mode, many=most)
    return mode


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def write(
    out: Path,
    about: dict[str, Any],
    mode: Mode,
    peers: Sequence[Peer],
    skipped: dict[str, str],
    turns: Turns,
    table: report.Cells,
) -> None:
    """Print the table, and leave it, the chart and the numbers in a folder."""
    labels = {peer.name: peer.label for peer in peers}
    text = report.text(table, labels, mode)
    caption = (
        f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, {about['at'][:10]}, {mode.name} run, "
        f"median of {mode.rounds} ± half the range; others used {about['cores_used_by_others']} cores meanwhile"
    )
    print(f"{text}\n\n{caption}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(f"{text}\n\n{caption}\n")
    (out / "bench.svg").write_text(chart.svg(table, labels, caption))
    written = {
        "machine": about,
        "mode": asdict(mode),
        "peers": {peer.name: {"label": peer.label, "version": peer.version()} for peer in peers},
        "skipped": skipped,
        "failures": turns.failures,
        **report.as_json(table, turns.runs, mode),
    }
    (out / "bench.json").write_text(json.dumps(written, indent=1) + "\n")
    say(f"written to {out}: table.md, bench.svg, bench.json")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
