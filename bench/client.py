"""The clients: open streams, read and check them, and take the time. One thread, plain epoll, one process.

    python -m bench.client

Each line of standard input is a job (JSON, see `Load`), each line of standard output its result. The CPU that others
use is read here too, so that it belongs to exactly the events that were counted.
"""

from __future__ import annotations

import errno
import gc
import http.client
import json
import resource
import select
import socket
import subprocess
import sys
import time
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from bench import process, work
from bench.check import FAILED, REFUSED, Answer

if TYPE_CHECKING:
    from collections.abc import Callable

_SECOND = 1_000_000_000  # nanoseconds
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_READ, _READ_FLOOD = 16 * 1024, 256 * 1024


class Tally:
    """What one group of streams did in one window."""

    def __init__(self) -> None:
        self.events = self.started = self.finished = 0
        self.latencies: list[int] = []  # of events
        self.firsts: list[int] = []  # from before the connection was made to the first event
        self.refusals: list[int] = []  # from before the connection was made to an answer that is no stream
        self.told_when = 0  # how many of them say when to come again
        self.broken = 0  # connections that ended without an answer
        self.late = 0  # the longest that a stream was opened after its time

    def result(self) -> dict[str, Any]:
        return {
            "events": self.events, "started": self.started, "finished": self.finished,
            "answered": len(self.firsts), "late_us": self.late / 1000,
            "latency_us": _percentiles(self.latencies), "first_us": _percentiles(self.firsts),
            "refused": len(self.refusals), "refused_us": _percentiles(self.refusals), "told_when": self.told_when,
            "broken": self.broken,
        }  # fmt: skip


class Group:
    """Streams of one plan."""

    def __init__(self, plan: work.Plan, times: list[int]) -> None:
        self.plan = plan
        self.times = times  # the streams' own times within a gap, in microseconds
        self.flood = work.flood_body(plan.events) if plan.gap_us == 0 else None
        self.tally = Tally()
        self.opened = 0
        self.waiting = 0  # open, without an event so far
        self.ended = 0  # when the last bytes of a body without gaps came
        self.gap = self.due = 0  # new streams: nanoseconds from one to the next, and when the next is due
        self.left = 0  # how many of them are still to be opened
        self.again = False  # each stream that ends is followed by another


class Stream:
    __slots__ = ("answer", "asking", "first", "group", "opened", "recv", "sock")

    def __init__(self, sock: socket.socket, group: Group) -> None:
        self.sock = sock
        self.recv = sock.recv
        self.group = group
        self.answer = Answer(group.plan.events, group.flood)
        self.opened = monotonic_ns()
        self.first = 0
        self.asking = b""  # the request, while the connection is being made


class Load:
    """One job: `port` to connect to, `control` the upstream's, `pids` {who: processes}, `plans` to make groups of with
    their streams' `times`, and `steps` to take one after the other."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._address = "127.0.0.1", int(job["port"])
        self._control = http.client.HTTPConnection("127.0.0.1", job["control"], timeout=10)
        self._pids: dict[str, list[int]] = job["pids"]
        self._groups = {plan["name"]: Group(work.Plan(**plan), job["times"]) for plan in job["plans"]}
        self._epoll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._source = 1
        self.verdicts: dict[str, int] = {}
        self.statuses: dict[int, int] = {}
        self.dropped: dict[str, int] = {}  # streams that had not ended at the end, by what was wrong with them
        self.windows: dict[str, Any] = {}
        self.memory: dict[str, float] = {}
        self._other: subprocess.Popen[bytes] | None = None

    def take(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            before = self._upstream("stats")
            for step in steps:
                getattr(self, f"_do_{step.pop('do')}")(**step)
            upstream = self._upstream("stats")
            for stream in list(self._streams.values()):
                faulty = stream.answer.faulty or "so far ok"
                self.dropped[faulty] = self.dropped.get(faulty, 0) + 1
                self._close(stream)
            give_up = time.monotonic() + 10
            while self._upstream("stats")["open"] and time.monotonic() < give_up:
                time.sleep(0.02)
        finally:
            if self._other is not None:
                self._other.kill()
                self._other.communicate()
            self._control.close()
            self._epoll.close()
        return {
            "windows": self.windows, "memory_kib": self.memory, "verdicts": self.verdicts, "statuses": self.statuses,
            "dropped": self.dropped, "upstream": {key: upstream[key] - before[key] for key in before},
        }  # fmt: skip

    # Steps.

    def _do_open(self, group: str, count: int, rate: float, limit: float, window: str = "") -> None:
        """Open streams at so many per second, and wait until all have had an event or ended, or for `limit` seconds."""
        it = self._groups[group]
        it.gap, it.due, it.left = int(_SECOND / rate), monotonic_ns(), count
        self._window(window, lambda: self._turn_until(limit, lambda: not it.left and not it.waiting))
        it.left = 0

    def _do_run(self, seconds: float, window: str = "", rate: dict[str, float] | None = None) -> None:
        """Let it go on for so long. `rate`: groups of which so many streams per second are opened meanwhile."""
        now = monotonic_ns()
        for name, per_second in (rate or {}).items():
            it = self._groups[name]
            it.gap, it.due, it.left = int(_SECOND / per_second), now, int(seconds * per_second)
        self._window(window, lambda: self._turn_until(seconds, lambda: False))
        for it in self._groups.values():
            it.left = 0

    def _do_loop(self, group: str, clients: int) -> None:
        """From now on have so many streams open all the time: each that ends is followed by another."""
        it = self._groups[group]
        it.again = True
        for _ in range(clients):
            self._open(it)

    def _do_flood(self, group: str, count: int, limit: float, window: str) -> None:
        """Open streams without gaps at once, and read until all have ended, or for `limit` seconds."""
        it = self._groups[group]
        began = monotonic_ns()
        it.gap, it.due, it.left = 1, began, count
        streams: list[Stream] = []

        def over() -> bool:
            if not it.left and not streams:
                streams.extend(self._streams.values())
            return not it.left and not self._streams

        self._window(window, lambda: self._turn_until(limit, over))
        result = self.windows[window]
        result["groups"][group]["events"] = sum(stream.answer.events for stream in streams)
        result["flood_seconds"] = (it.ended - began) / _SECOND

    def _do_finish(self, limit: float) -> None:
        """Open no more, have the upstream end all streams, and read them to their ends."""
        for it in self._groups.values():
            it.again = False
        self._upstream("finish")
        self._turn_until(limit, lambda: not self._streams)

    def _do_beside(self, command: list[str]) -> None:
        """Start a program that gives the relay other work to do."""
        self._other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _do_alone(self, window: str) -> None:
        """End it, and keep what it says of itself with this window."""
        assert self._other is not None
        said, _ = self._other.communicate(timeout=20)
        self._other = None
        self.windows[window]["beside"] = json.loads(said or b"{}")

    def _do_memory(self, name: str) -> None:
        self.memory[name] = process.pss_kib(self._pids["peer"])

    # The loop.

    def _window(self, name: str, run: Callable[[], None]) -> None:
        if not name:
            run()
            return
        for it in self._groups.values():
            it.tally = Tally()
        busy, began = process.machine_busy(), monotonic_ns()
        before = {who: process.cpu(pids) for who, pids in self._pids.items()} | {"client": time.process_time()}
        run()
        after = {who: process.cpu(pids) for who, pids in self._pids.items()} | {"client": time.process_time()}
        self.windows[name] = {
            "seconds": (monotonic_ns() - began) / _SECOND,
            "cpu": {who: after[who] - before[who] for who in after},
            "machine_cpu": process.machine_busy() - busy,
            "groups": {key: it.tally.result() for key, it in self._groups.items()},
        }

    def _turn_until(self, limit: float, done: Callable[[], bool]) -> None:
        deadline = monotonic_ns() + int(limit * _SECOND)
        waited_for = [self._epoll.fileno()]
        poll, streams = self._epoll.poll, self._streams
        while not done():
            due = deadline
            for it in self._groups.values():
                if it.left and it.due < due:
                    due = it.due
            # select takes microseconds where epoll's own time limit takes milliseconds.
            select.select(waited_for, (), (), max(due - monotonic_ns(), 0) / 1e9)
            now = monotonic_ns()
            for fd, _ in poll(0):
                self._read(streams[fd], now)
            now = monotonic_ns()
            if now >= deadline:
                return
            for it in self._groups.values():
                while it.left and it.due <= now:
                    it.tally.late = max(it.tally.late, now - it.due)
                    it.left -= 1
                    it.due += it.gap
                    self._open(it)
                    now = monotonic_ns()

    def _open(self, it: Group) -> None:
        sock = socket.socket()
        sock.settimeout(0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = Stream(sock, it)
        error = sock.connect_ex(self._address)
        if error == errno.EADDRNOTAVAIL:  # this address has no port left: take the next one
            self._source = self._source % 250 + 1
            sock.bind((f"127.0.0.{self._source}", 0))
            error = sock.connect_ex(self._address)
        request = it.plan.request(self._address[1], it.times[it.opened % len(it.times)])
        it.opened += 1
        it.waiting += 1
        it.tally.started += 1
        if error == 0:
            sock.send(request)
            self._epoll.register(sock, select.EPOLLIN)
        else:
            stream.asking = request
            self._epoll.register(sock, select.EPOLLOUT)
        self._streams[sock.fileno()] = stream

    def _read(self, stream: Stream, polled: int) -> None:
        """Something has arrived on a stream, at `polled` or later."""
        it, answer = stream.group, stream.answer
        try:
            if stream.asking:
                stream.sock.send(stream.asking)
                stream.asking = b""
                self._epoll.modify(stream.sock, select.EPOLLIN)
                return
            data = stream.recv(_READ if it.flood is None else _READ_FLOOD)
        except BlockingIOError:
            return
        except OSError:
            self._over(stream)
            return
        if not data:
            answer.end()
            self._over(stream)
            return
        times = answer.feed(data)
        if times:
            tally = it.tally
            if not stream.first:
                stream.first = polled
                it.waiting -= 1
                tally.firsts.append(polled - stream.opened)
            tally.events += len(times)
            for sent in times:
                # What came while others were read was not there when they were polled.
                tally.latencies.append((polled if polled > sent else monotonic_ns()) - sent)
        if it.flood is not None:
            it.ended = polled
        if answer.over:
            self._over(stream)

    def _over(self, stream: Stream) -> None:
        """A stream has ended, one way or another."""
        verdict = stream.answer.verdict
        self._count(verdict)
        status = stream.answer.status
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self._close(stream)
        it = stream.group
        it.waiting -= not stream.first
        if verdict == REFUSED:
            it.tally.refusals.append(monotonic_ns() - stream.opened)
            it.tally.told_when += stream.answer.retry_after
        it.tally.broken += verdict == FAILED
        if verdict != FAILED:
            it.tally.finished += 1
        if it.again:
            self._open(it)

    def _close(self, stream: Stream) -> None:
        del self._streams[stream.sock.fileno()]
        stream.sock.close()

    def _count(self, verdict: str) -> None:
        self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1

    def _upstream(self, what: str) -> dict[str, int]:
        self._control.request("GET", f"/bench/{what}")
        found: dict[str, int] = json.loads(self._control.getresponse().read())
        return found


def _percentiles(values: list[int]) -> dict[str, float]:
    """In microseconds."""
    values = sorted(values)
    last = len(values) - 1
    return {name: values[round(share * last)] / 1000 for name, share in _PERCENTILES.items()} if values else {}


def main() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()  # nothing here needs it while a job runs, and its pauses would be everybody's latency
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = Load(job).take(job["steps"])
        except (OSError, http.client.HTTPException) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
