"""`python -m bench.compare BASE`: this checkout beside another version of it, by CPU time, in alternating pairs.

Does not measure by itself (bench.measures does) and compares with nobody else (bench.report does). A row fails when the
lower end of the 95 % interval of its ratio says that this checkout is more than 5 % worse: what noise alone explains
does not fail, however large it is, and more pairs make the interval narrower.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench import measures, report
from bench.__main__ import fit_to_files, say
from bench.peers import PEERS, REPO, Peer
from bench.rig import Rig
from bench.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What counts: CPU time, and the memory of an open stream. Latencies and rates depend on what else the machine does.
_ROWS = tuple(row for row in report.ROWS if row.key.endswith(("_cpu_us", "_cpu_ms", "_per_cpu", "_kib")))
#: More than so much worse fails.
_WORSE = 1.05
#: Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom, then for more.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
_T_BEYOND = 2.09
_PAIRS = 10


@dataclass(frozen=True)
class Verdict:
    """How much this checkout needs of what the base needs, with the 95 % interval. 1: the same; above: worse."""

    ratio: float
    low: float
    high: float

    @property
    def worse(self) -> bool:
        return self.low > _WORSE


def verdict(base: Sequence[float], here: Sequence[float]) -> Verdict:
    """Compare figures of which less is better, pair by pair.

    The mean of the logarithms of the pairs' ratios: a pair was measured within seconds, so that what the machine did
    meanwhile met both. Raises ValueError for fewer than two pairs.
    """
    logs = [math.log(after / before) for before, after in zip(base, here, strict=True)]
    if len(logs) < 2:
        raise ValueError("an interval needs at least two pairs")
    mean, error = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    freedom = len(logs) - 1
    wide = error * (_T[freedom - 1] if freedom <= len(_T) else _T_BEYOND)
    return Verdict(math.exp(mean), math.exp(mean - wide), math.exp(mean + wide))


def verdicts(runs: report.Runs, pairs: int) -> dict[str, Verdict]:
    """A verdict for each row that both have figures for in at least two pairs."""
    found = {}
    for row in _ROWS:
        base: list[float] = []
        here: list[float] = []
        for number in range(pairs):
            two = [runs.get((number, row.measure, name)) for name in ("base", "here")]
            values = [run.values.get(row.key) for run in two if run is not None]
            if len(values) == 2 and values[0] and values[1]:
                power = -1 if row.more_is_better else 1
                base.append(values[0] ** power)
                here.append(values[1] ** power)
        if len(base) >= 2:
            found[row.key] = verdict(base, here)
    return found


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="a revision of git, or the folder of another checkout")
    parser.add_argument("--pairs", type=int, default=_PAIRS, help=f"how often each has its turn [{_PAIRS}]")
    parser.add_argument("--measures", default="", metavar="NAME,…", help="of " + ", ".join(measures.MEASURES))
    parser.add_argument("--smoke", action="store_true", help="only whether it works")
    options = parser.parse_args(args)
    if options.pairs < 2:
        parser.error("--pairs must be at least 2: one pair has no interval")
    rows = {row.measure for row in _ROWS}
    asked = [name for name in options.measures.split(",") if name] or [
        name for name in measures.MEASURES if name in rows
    ]
    if unknown := set(asked) - rows:
        parser.error(f"--measures knows no {', '.join(sorted(unknown))} that is measured in CPU time or memory")
    mode = fit_to_files(replace(measures.SMOKE if options.smoke else measures.FULL, rounds=options.pairs))
    ours = next(peer for peer in PEERS if peer.name == report.RELAY)
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="relay-compare-")))
        folder.chmod(0o755)
        root = _checkout(options.base, folder / "base")
        peers: list[Peer] = [replace(ours, name="base", root=root), replace(ours, name="here")]
        turns = Turns(ends.enter_context(Rig(folder)), folder, mode, asked, ends, direct=False)
        if len(turns.start(peers)) == 2:
            turns.take(peers)
    for what, reason in turns.failures.items():
        say(f"note: {what} failed: {reason}")
    found = verdicts(turns.runs, mode.rounds)
    labels = {row.key: row.label.format(streams=measures.STREAMS, many=mode.many) for row in report.ROWS}
    print(f"here, in times of {options.base}, {mode.rounds} pairs; in brackets the 95 % interval")
    for key, each in found.items():
        mark, label = "WORSE" if each.worse else "", labels[key].removeprefix("- ")
        print(f"{mark:6}{each.ratio:6.3f}  [{each.low:.3f}, {each.high:.3f}]  {label}")
    wrong = [name for name in ("base", "here") if report.wrong_bytes(turns.runs, name)]
    if wrong:
        say(f"bytes were wrong: {', '.join(wrong)}")
    return 1 if turns.failures or wrong or not found or any(each.worse for each in found.values()) else 0


def _checkout(base: str, folder: Path) -> Path:
    """The files of a revision in `folder`, or the folder that `base` names."""
    if Path(base).is_dir():
        return Path(base).resolve()
    archive = subprocess.run(["git", "archive", base], cwd=REPO, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(
            f"bench.compare: {base!r} is neither a folder nor a revision: {archive.stderr.decode().strip()}"
        )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
