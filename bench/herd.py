"""`python -m bench.herd`: 2,000 clients that connect and ask within one second, as after a restart; two workers.

With room for all of them, and with room for 500 and a queue or none; straight and through nginx. Streams last 4 s.
Shows who was served, who was refused and how soon, whose connection broke, and what memory it took.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import report
from bench.__main__ import fit_to_files, machine, say
from bench.measures import FULL
from bench.peers import PEERS
from bench.process import Broken
from bench.rig import Rig
from bench.work import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peers import Peer

_WORKERS = 2
#: Events of a stream, and microseconds from one to the next.
_EVENTS, _GAP_US = 20, 200_000
_WARM = 50
#: Seconds until the last of them must have been answered.
_LIMIT = 30.0
_KIB_OF_MIB = 1024


def cases(clients: int) -> dict[str, dict[str, str]]:
    """What the relay is set to. A worker takes what it has room for, and not half of all: all of them for the first."""
    few = str(clients // 4 // _WORKERS)
    return {
        "room for all": {"RELAY_MAX_STREAMS": str(clients)},
        "room for a quarter": {"RELAY_MAX_STREAMS": few},
        "room for a quarter, RELAY_QUEUE=5s": {"RELAY_MAX_STREAMS": few, "RELAY_QUEUE": "5s"},
    }


def measure(rig: Rig, folder: Path, relay: Peer, nginx: Peer | None, clients: int) -> dict[str, Any]:
    """One herd, at a relay that has just been started. Raises Broken."""
    with contextlib.ExitStack() as ends:
        server = relay.start(rig.port, folder / "relay")
        ends.callback(server.end)
        server.wait()
        front = server
        if nginx is not None:
            front = nginx.start(server.port, folder / "nginx")
            ends.callback(front.end)
            front.wait()
        plans = [Plan("main", events=_EVENTS, gap_us=_GAP_US), Plan("warm", events=3, gap_us=1000)]
        steps: list[dict[str, Any]] = [
            {"do": "open", "group": "warm", "count": _WARM, "rate": 100, "limit": 10},
            {"do": "run", "seconds": 0.5},
            {"do": "memory", "name": "before"},
            {"do": "open", "group": "main", "count": clients, "rate": clients, "limit": _LIMIT, "window": "herd"},
            {"do": "memory", "name": "open"},
            {"do": "finish", "limit": _LIMIT},
            {"do": "run", "seconds": 2.0},
            {"do": "memory", "name": "after"},
        ]
        return rig.run(front.port, server.pids(), plans, steps)


def row(name: str, raw: dict[str, Any], clients: int) -> list[str]:
    found = raw["windows"]["herd"]["groups"]["main"]
    memory = [f"{raw['memory_kib'][when] / _KIB_OF_MIB:.0f}" for when in ("before", "open", "after")]
    refused = "0"
    if found["refused"]:
        took = found["refused_us"]
        statuses = ", ".join(status for status in raw["statuses"] if status not in ("0", "200"))
        refused = f"{found['refused']} ({statuses}) in {took['p50'] / 1000:.0f} / {took['max'] / 1000:.0f} ms"
        if found["told_when"] < found["refused"]:
            refused += f", {found['refused'] - found['told_when']} without Retry-After"
    whole = raw["verdicts"].get("ok", 0) - _WARM
    lost = clients - whole - found["refused"]
    first = found["first_us"]
    times = f"{first['p50'] / 1000:.0f} / {first['p99'] / 1000:.0f}" if first else "–"
    return [name, str(whole), times, refused, str(lost), ", ".join(memory)]


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.herd", description=__doc__)
    parser.add_argument("--clients", type=int, default=2000, help="[2000]")
    options = parser.parse_args(args)
    fit_to_files(FULL)
    ours, nginx = (next(peer for peer in PEERS if peer.name == name) for name in (report.RELAY, report.NGINX))
    ways: list[tuple[str, Peer | None]] = [("", None)]
    if missing := nginx.missing():
        say(f"note: nginx is left out: {missing}")
    else:
        ways.append(("nginx, ", nginx))
    head = ["", "served whole", "first event, p50 / p99, ms", "refused, p50 / last", "lost", "MiB before, then, after"]
    rows = [head, ["---"] * len(head)]
    failed = False
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="relay-herd-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        rig = ends.enter_context(Rig(folder))
        for said, front in ways:
            for name, settings in cases(options.clients).items():
                # nginx asks for another host than this one's names.
                own = {"WEB_CONCURRENCY": str(_WORKERS), "RELAY_ALLOW_ANONYMOUS": "on"}
                relay = replace(ours, settings={**own, **settings})
                say(said + name)
                try:
                    raw = measure(rig, folder / str(len(rows)), relay, front, options.clients)
                except Broken as error:
                    say(f"note: {said}{name} failed: {error}")
                    failed = True
                else:
                    rows.append(row(said + name, raw, options.clients))
                    failed = failed or rows[-1][4] != "0"
    about = machine()
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
    print(f"\n{options.clients} clients in 1 s; {about['cpu']}, {about['cores']} cores, Python {about['python']}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
