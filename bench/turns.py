"""Who is up, and whose turn it is: starts the peers and has all of them take every measure, round by round."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from bench import measures, report
from bench.measures import MEASURES, Mode, Outcome, Target
from bench.process import Broken
from bench.work import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from bench.peers import Peer
    from bench.process import Server
    from bench.rig import Rig


class Turns:
    """The peers' servers, and what was measured so far."""

    def __init__(
        self, rig: Rig, folder: Path, mode: Mode, chosen: Sequence[str], ends: ExitStack, *, direct: bool = True
    ) -> None:
        """`folder`: for the servers' files. `chosen`: the measures to take. `ends`: what ends the servers. `direct`:
        measure the way without a relay, too."""
        self._rig = rig
        self._folder = folder
        self._mode = mode
        self._direct = direct
        self._chosen = [name for name in chosen if rig.ca is not None or name not in measures.TLS]
        self._ends = ends
        self._servers: dict[tuple[str, bool], Server] = {}
        self._started = 0
        self._began = time.monotonic()
        self.runs: report.Runs = {}
        self.failures: dict[str, str] = {}

    def start(self, peers: Sequence[Peer]) -> list[Peer]:
        """Start the peers, all at once; gives those that came up and relay."""
        ways = [tls for tls in (False, True) if any((name in measures.TLS) == tls for name in self._chosen)]
        for peer in peers:
            for tls in ways:
                self._servers[peer.name, tls] = self._launch(peer, tls=tls)
        return [peer for peer in peers if self._came_up(peer, ways)]

    def take(self, peers: Sequence[Peer]) -> None:
        """All rounds. In each the peers begin with another one, so that nobody always comes after the same."""
        for number in range(self._mode.rounds):
            first = number % len(peers)
            for measure in self._chosen:
                if self._direct and measure in measures.DIRECT:
                    self._run(number, measure, report.DIRECT, Target(None, self._rig.port))
                for peer in [*peers[first:], *peers[:first]]:
                    self._turn(number, measure, peer)

    def _came_up(self, peer: Peer, ways: Sequence[bool]) -> bool:
        plan = Plan("main", events=3, gap_us=1000)
        steps: list[dict[str, Any]] = [
            {"do": "run", "seconds": 0.2, "rate": {"main": 100}},
            {"do": "finish", "limit": 5},
        ]
        try:
            for tls in ways:
                server = self._servers[peer.name, tls]
                server.wait()
                verdicts = self._rig.run(server.port, server.pids(), [plan], steps)["verdicts"]
                if not verdicts.get("ok") and not verdicts.get("changed"):
                    raise Broken(f"{peer.name} does not relay: {verdicts}; it said: {server.said()}")
        except Broken as error:
            self.failures[peer.name] = str(error)
            return False
        return True

    def _turn(self, number: int, measure: str, peer: Peer) -> None:
        if measure not in measures.FRESH:
            server = self._servers[peer.name, measure in measures.TLS]
            self._run(number, measure, peer.name, Target(server, server.port))
            return
        server = self._launch(peer, streams=self._mode.many + 1000)
        try:
            server.wait()
            self._run(number, measure, peer.name, Target(server, server.port))
        except Broken as error:
            self._failed(number, measure, peer.name, error)
        finally:
            server.end()

    def _run(self, number: int, measure: str, name: str, target: Target) -> None:
        now = time.monotonic() - self._began
        print(
            f"{now:4.0f} s, round {number + 1} of {self._mode.rounds}: {measure}, {name}", file=sys.stderr, flush=True
        )
        try:
            self.runs[number, measure, name] = MEASURES[measure](self._rig, self._mode, target)
        except Broken as error:
            self._failed(number, measure, name, error)

    def _failed(self, number: int, measure: str, name: str, error: Broken) -> None:
        self.failures[f"{name}, {measure}, round {number + 1}"] = str(error)
        self.runs[number, measure, name] = Outcome({}, set(), {})

    def _launch(self, peer: Peer, *, tls: bool = False, streams: int = 0) -> Server:
        self._started += 1
        folder = self._folder / f"{self._started}-{peer.name}"
        port = self._rig.tls_port if tls else self._rig.port
        server = peer.start(port, folder, ca=self._rig.ca if tls else None, streams=streams)
        self._ends.callback(server.end)
        return server
