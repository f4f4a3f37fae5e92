"""Clients that come, read, stall and leave at random, over upstreams that misbehave at random; then a reckoning.

`make soak` runs it for a minute with 300 clients; `make soak ARGS="600 500 7"` for ten, with 500, and with the random
numbers of seed 7. One gunicorn worker with the shipped configuration and short clocks, and everything else in this
process, on one event loop. Each request's number decides what its upstream and its client do, so that every byte that a
client gets can be checked, and the reason in every line of the relay's log.

Ends with status 1 if anything is not as it must be: a byte wrong, an end that hides a cut, a reason without a cause, a
stream still counted, a descriptor or memory not given back, a line of the log that nobody knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from harness import DeadlineExceeded, eventually, servers
from harness.client import Chunked, request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn

SECONDS, CLIENTS = 60.0, 300
#: Seconds after which clients give up when the time is over, and after which one that still waits is stuck.
LAST, STUCK = 1.5, 45.0

#: Short, so that a minute sees thousands of ends of every kind; in seconds.
CLOCKS = {
    "RELAY_HEARTBEAT": "0.4",
    "RELAY_HOLD": "0.5",
    "RELAY_CONNECT_TIMEOUT": "5",
    "RELAY_FIRST_BYTE_TIMEOUT": "3",
    "RELAY_IDLE_TIMEOUT": "3",
    "RELAY_WRITE_TIMEOUT": "2",
    "RELAY_QUEUE": "0.3",
}
#: What may stay. Descriptors: a health probe's connection and the like. Memory: the allocator's, which does not shrink.
SPARE_FILES = 4
SPARE_MEMORY = 16 * 1024  # KiB

KNOWN_REASONS = {
    "done", "client_gone", "upstream_cut", "upstream_error", "first_byte_timeout", "idle_timeout", "write_timeout",
    "full",
}  # fmt: skip

GUNICORN = re.compile(
    r"\[[^]]+\] \[\d+\] \[INFO\] (Starting gunicorn|Listening at: |Using worker: relay|Booting worker with pid: |"
    r"Handling signal: term|Worker exiting \(pid: |Shutting down: Master)"
)

Ending = Literal["whole", "cut", "cut inside", "reset", "broken", "silent", "endless"]

_COMMENT = re.compile(rb": keep-alive\n\n?")
_FRAME = re.compile(rb"event: error\ndata: (\{[^\n]*\})\n\n\Z")


# --- What is to happen ----------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What happens to the request of a number: on the upstream's side, and on the client's."""

    number: int
    before: str = "answers"  # what the upstream does before its head: answers, mute, hangs up, garbage
    late: float = 0.0
    status: int = 200
    content_type: str = "text/event-stream"
    framing: str = "chunked"
    ending: Ending = "whole"
    events: int = 0
    pause: float = 0.0  # between two events
    closes: bool = False  # the upstream wants no second request on the connection
    asks: bool = True
    reads: str = "on"  # on, slowly, not at all
    leaves: str = ""  # close, reset, half_close
    after: float = 0.0  # seconds, if it leaves

    @classmethod
    def of(cls, number: int) -> Plan:
        rng = random.Random(number)
        plan = cls(number)
        plan.asks = rng.random() < 0.8
        plan.closes = rng.random() < 0.2
        plan.before = rng.choices(["answers", "mute", "hangs up", "garbage"], [92, 3, 3, 2])[0]
        plan.late = rng.choices([0.0, rng.uniform(0, 0.3), rng.uniform(0.6, 1.5)], [80, 12, 8])[0]
        kind = rng.random()
        if kind < 0.08:
            plan.status, plan.content_type, plan.framing = rng.choice([401, 429, 500]), "application/json", "length"
            plan.events = 1
        elif kind < 0.16:
            plan.content_type, plan.framing = "application/json", rng.choice(["length", "chunked"])
            plan.events = rng.randint(1, 20)
        else:
            plan.framing = rng.choice(["chunked", "chunked", "chunked", "length", "close"])
            plan.events = rng.randint(0, 40)
            plan.pause = rng.choice([0, 0, 0.01, 0.03])
        if plan.status == 200:
            endings: list[Ending] = ["whole", "cut", "cut inside", "reset", "broken", "silent", "endless"]
            plan.ending = rng.choices(endings, [70, 5, 5, 5, 3, 6, 6])[0]
        if plan.ending == "endless" or (plan.ending != "whole" and plan.framing == "close"):
            plan.framing = "chunked"
        if plan.ending == "broken" and plan.framing != "chunked":
            plan.ending = "cut"
        plan.reads = rng.choices(["on", "slowly", "not at all"], [85, 10, 5])[0]
        if rng.random() < 0.2 or plan.ending == "endless":
            plan.leaves = rng.choice(["close", "reset", "half_close"])
            plan.after = rng.choice([0.0, rng.uniform(0, 0.1), rng.uniform(0, 1)])
            if plan.reads == "not at all":
                plan.after += 8  # the relay's patience ends before
        elif plan.reads == "not at all":
            plan.reads = "slowly"  # or a short answer, which fits into the kernel's buffers, would never be read
        return plan

    @property
    def id(self) -> str:
        return f"soak-{self.number}"

    def pieces(self) -> Iterator[bytes]:
        """The body, event by event; without end if the ending is."""
        rng = random.Random(~self.number)
        count = 0
        while count < self.events or self.ending == "endless":
            size = rng.choice([5, 40, 200, 200, 2000])
            if self.ending == "endless":
                size = 60_000 if self.reads == "not at all" else 10_000  # the kernel's buffers take megabytes
            text = b"%d " % rng.getrandbits(32)
            yield b'data: {"n": %d, "text": "%s"}\n\n' % (count, (text * (size // len(text) + 1))[:size])
            count += 1
        if self.ending == "cut inside":
            yield b'data: {"n": '

    @property
    def reasons(self) -> set[str]:
        """Why this request may end, apart from `full`."""
        causes = set()
        if self.before == "mute":
            causes.add("first_byte_timeout")
        elif self.before != "answers":
            causes.add("upstream_error")
        else:
            of_ending = {
                "whole": "done", "cut": "upstream_cut", "cut inside": "upstream_cut", "reset": "upstream_cut",
                "broken": "upstream_cut", "silent": "idle_timeout",
            }  # fmt: skip
            if self.ending in of_ending:
                causes.add(of_ending[self.ending])
            if self.ending == "reset":
                causes.add("upstream_error")  # the reset has overtaken the head
            if self.asks and (self.status != 200 or self.content_type != "text/event-stream"):
                causes.add("upstream_error")  # after the hold
        if self.leaves:
            causes.add("client_gone")
        if self.reads == "not at all":
            causes.add("write_timeout")
        return causes


# --- The upstream ---------------------------------------------------------------------------------------------------


class Upstream:
    """Answers `POST /soak/<number>` as that number's plan says."""

    def __init__(self) -> None:
        self.port = 0
        self.open = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self._writers.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the relay has closed the connection
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False if the connection is of no more use."""
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE):
            await reader.readexactly(int(length[1]))
        target = re.match(rb"[A-Z]+ /soak/(\d+) ", head)
        if target is None:  # the health probe
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            return True
        plan = Plan.of(int(target[1]))
        # What comes meanwhile is the relay's going, or, with the answer's last bytes on their way, its next request.
        coming = asyncio.ensure_future(reader.read(1))
        playing = asyncio.ensure_future(self._play(plan, writer))
        try:
            await asyncio.wait([coming, playing], return_when=asyncio.FIRST_COMPLETED)
            if coming.done() and not coming.result():
                return False
            if not await playing:
                return False
            first = await coming
            reader._buffer[:0] = first  # type: ignore[attr-defined]
            return bool(first)
        finally:
            for task in (coming, playing):
                task.cancel()
            await asyncio.gather(coming, playing, return_exceptions=True)

    async def _play(self, plan: Plan, writer: asyncio.StreamWriter) -> bool:
        if plan.before == "mute":
            await asyncio.sleep(60)
        await asyncio.sleep(plan.late)
        if plan.before == "hangs up":
            return False
        if plan.before == "garbage":
            writer.write(b"220 mail.example ESMTP\r\n")
            return False
        writer.write(self._head(plan))
        for piece in plan.pieces():
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if plan.framing == "chunked" else piece)
            await writer.drain()
            if plan.pause or plan.ending == "endless":
                await asyncio.sleep(plan.pause or 0.01)
        if plan.ending == "silent":
            await asyncio.sleep(60)
        elif plan.ending == "broken":
            writer.write(b"no chunk\r\n")
            await asyncio.sleep(60)
        elif plan.ending == "reset":
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif plan.ending == "whole" and plan.framing == "chunked":
            writer.write(b"0\r\n\r\n")
        if plan.ending != "reset":
            await writer.drain()
        whole = plan.ending == "whole" and plan.framing != "close" and not plan.closes
        if not whole and plan.ending != "reset":
            writer.write_eof()
            await asyncio.sleep(0.05)  # a reset for bytes that nobody has read must not overtake them
        return whole

    def _head(self, plan: Plan) -> bytes:
        lines = [f"HTTP/1.1 {plan.status} Whatever", f"Content-Type: {plan.content_type}"]
        if plan.framing == "chunked":
            lines.append("Transfer-Encoding: chunked")
        elif plan.framing == "length":
            missing = 0 if plan.ending == "whole" else 9
            lines.append(f"Content-Length: {sum(map(len, plan.pieces())) + missing}")
        if plan.closes or plan.framing == "close":
            lines.append("Connection: close")
        return "\r\n".join([*lines, "\r\n"]).encode()


# --- The clients ----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was done and what was found."""

    asked: set[int] = field(default_factory=set)  # numbers of requests that went out
    sent_away: set[int] = field(default_factory=set)  # of those that were broken off when time was up
    ends: Counter[str] = field(default_factory=Counter)  # as the clients saw them
    faults: list[str] = field(default_factory=list)
    body_bytes: int = 0
    checked: int = 0  # streams whose every byte was compared

    def fault(self, text: str) -> None:
        if len(self.faults) < 30:
            self.faults.append(text)


class Clients:
    """So many clients, each with one request after another until it is time to stop."""

    def __init__(self, port: int, figures: Figures, seed: int) -> None:
        self._port = port
        self._figures = figures
        self._number = seed * 10_000_000
        self._until = 0.0

    async def run(self, clients: int, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(n) for n in range(clients)))

    async def _client(self, n: int) -> None:
        rng = random.Random(n)
        await asyncio.sleep(rng.uniform(0, 0.5))
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while time.monotonic() < self._until:
            self._number += 1
            plan = Plan.of(self._number)
            if connection is None:
                connection = await self._connect()
            life = _Life(plan, *connection, self._figures)
            if not await life.live(self._until + LAST):
                connection = None
            await asyncio.sleep(rng.choice([0, 0.02, 0.3]))
        if connection is not None:
            connection[1].close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)  # one that does not read is felt soon
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        return await asyncio.open_connection(sock=sock, limit=32_768)


class _Life:
    """One request on a connection."""

    def __init__(
        self, plan: Plan, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, figures: Figures
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._writer = writer
        self._figures = figures
        self._status = 0
        self._body = bytearray()
        self._keeps_open = False

    async def live(self, until: float) -> bool:
        """Go through with it, but leave at `until`; False if the connection is of no more use."""
        plan = self._plan
        self._figures.asked.add(plan.number)
        accept = "Accept: text/event-stream\r\n" if plan.asks else ""
        self._writer.write(
            f"POST /v1/soak/{plan.number} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-ID: {plan.id}\r\n{accept}"
            "Content-Length: 2\r\n\r\n{}".encode()
        )
        how = ""
        patience = plan.after if plan.leaves else STUCK
        left = max(until - time.monotonic(), 0)
        try:
            clean = await asyncio.wait_for(self._read(), min(patience, left))
        except TimeoutError:
            how = plan.leaves or "stuck"
            if left <= patience:
                how = "close"
                self._figures.sent_away.add(plan.number)
        except (ConnectionResetError, asyncio.IncompleteReadError):
            clean = False
        if not how:
            how = "clean" if clean else "cut"
        self._figures.ends[how] += 1
        try:
            self._judge(how)
        except (AssertionError, ValueError) as error:
            self._figures.fault(f"{plan.id} ({how}, {self._status}): {error} {plan}")
        if how == "clean" and self._keeps_open:
            return True
        if how == "half_close":
            with contextlib.suppress(OSError):
                self._writer.write_eof()
                await asyncio.sleep(0.2)
        if how in ("reset", "half_close"):
            self._writer.transport.abort()
        else:
            self._writer.close()
        return False

    async def _read(self) -> bool:
        """Read the answer to its end; whether that was a proper one."""
        plan = self._plan
        await self._writer.drain()
        if plan.reads == "not at all":
            await asyncio.sleep(60)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        self._status = int(head[9:12])
        self._keeps_open = b"\r\nconnection: close" not in head
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        chunked, buffer = Chunked(), bytearray()
        while True:
            if length is not None:
                if len(self._body) == int(length[1]):
                    return True
            elif chunked.done:
                return True
            data = await self._reader.read(2000 if plan.reads == "slowly" else 65_536)
            if not data:
                return length is None and b"\r\ntransfer-encoding: chunked" not in head
            if plan.reads == "slowly":
                await asyncio.sleep(0.005)
            if length is not None:
                self._body += data
            else:
                buffer += data
                del buffer[: chunked.decode(buffer, self._body)]

    def _judge(self, how: str) -> None:
        """Compare every byte with what its upstream had to send."""
        plan, body = self._plan, bytes(self._body)
        assert how != "stuck", "the answer neither came nor ended"
        if not self._status:
            assert how not in ("clean", "cut"), "no answer at all"
            return
        if self._status in (502, 503, 504):
            assert how != "cut"
            if how == "clean":
                error = json.loads(body)["error"]
                assert error["request_id"] == plan.id
                assert error["code"] in plan.reasons | {"full"}, error
            return
        self._figures.body_bytes += len(body)
        frame = _FRAME.search(body)
        if frame is not None and how != "clean":
            error = json.loads(frame[1])["error"]
            assert error["request_id"] == plan.id
            assert error["code"] in plan.reasons, error
            body = body[: frame.start()]
        else:
            assert frame is None, "a clean end after an error frame"
        held = plan.asks and plan.late + 1 > float(CLOCKS["RELAY_HOLD"])
        assert self._status == plan.status or (self._status == 200 and held)
        received = _COMMENT.sub(b"", body)
        expected, at = plan.pieces(), 0
        while at < len(received):
            piece = next(expected, None)
            assert piece is not None, f"more than there was: {received[at : at + 100]!r}"
            assert received.startswith(piece, at) or piece.startswith(received[at:]), f"not as sent, at {at}"
            at += len(piece)
        if how == "clean":
            assert plan.ending == "whole", "a clean end of a cut body"
            assert next(expected, None) is None, "a clean end of a body that is not whole"
        self._figures.checked += how in ("clean", "cut")


# --- The reckoning --------------------------------------------------------------------------------------------------


class Relay:
    """What can be seen of the relay from outside."""

    def __init__(self, server: Gunicorn, upstream_port: int) -> None:
        self.server = server
        (self.worker,) = server.workers()
        self._upstream_port = upstream_port

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels, without the mount."""
        text = request(self.server.admin_port, "GET", "/metrics").finish().data.decode()
        samples = (line.rpartition(" ") for line in text.splitlines() if line.startswith("relay_"))
        return {name.replace('mount="relay"', "").replace("{,", "{"): float(value) for name, _, value in samples}

    def open_streams(self) -> float:
        return sum(value for name, value in self.metrics().items() if name.startswith("relay_open_streams"))

    def files(self) -> tuple[int, int]:
        """Descriptors of the worker: those of idle upstream connections, and all others."""
        idle = _sockets_to(self._upstream_port)
        links = []
        for fd in Path(f"/proc/{self.worker}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(str(fd.readlink()))
        pooled = sum(link in idle for link in links)
        return pooled, len(links) - pooled

    def memory(self) -> int:
        """Proportional set size in KiB."""
        text = Path(f"/proc/{self.worker}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])  # type: ignore[index]

    def quiet(self, before: int | None = None) -> tuple[int, int]:
        """Wait until no stream is open and its clients' connections are closed; gives `files`.

        `before`: the other files that there were then, to which it has time to come back.
        """
        eventually(lambda: self.open_streams() == 0, "no open streams", 20)
        last = [0, 0]

        def still() -> bool:
            now = list(self.files())
            same, last[:] = now == last, now
            return same

        eventually(still, "descriptors stand still", 20, every=0.3)
        if before is not None:
            # What stands still may be a worker that the machine has stopped.
            with contextlib.suppress(DeadlineExceeded):
                eventually(lambda: self.files()[1] <= before + SPARE_FILES, "descriptors given back", 20, every=0.1)
        return self.files()


def _sockets_to(port: int) -> set[str]:
    """Links of the sockets whose other end is this port."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {f"socket:[{row[9]}]" for row in rows if int(row[2].partition(":")[2], 16) == port}


@dataclass
class Log:
    """What the relay's log says."""

    reasons: Counter[str] = field(default_factory=Counter)
    lines: Counter[int] = field(default_factory=Counter)  # by the request's number
    sums: Counter[str] = field(default_factory=Counter)


def read_log(text: str, figures: Figures) -> Log:
    """Every line is a known one, and every end has a reason that its plan is a cause of."""
    log = Log()
    for row in text.splitlines():
        line = json.loads(row) if row.startswith("{") else {}
        event = "refused" if line.get("reason") == "full" else "request"
        if line.get("event") != event or line.get("reason") not in KNOWN_REASONS:
            if line or not GUNICORN.match(row):
                figures.fault(f"an unknown line in the log: {row[:300]}")
            continue
        plan = Plan.of(int(line["request_id"].removeprefix("soak-")))
        log.lines[plan.number] += 1
        log.reasons[line["reason"]] += 1
        log.sums.update({name: line[name] for name in ("bytes", "heartbeats")})
        causes = plan.reasons | {"full"} | ({"client_gone"} if plan.number in figures.sent_away else set())
        if line["reason"] not in causes:
            figures.fault(f"{plan.id} ended as {line['reason']}, for which there was no cause: {plan}")
    return log


def reckon(log: Log, metrics: dict[str, float], figures: Figures) -> None:
    """Each request has one line in the log, and the metrics say what the lines add up to."""
    for number, count in log.lines.items():
        if count > 1 or number not in figures.asked:
            figures.fault(f"soak-{number} has {count} lines in the log")
    for number in figures.asked - figures.sent_away - set(log.lines):
        if not Plan.of(number).leaves:
            figures.fault(f"soak-{number} has no line in the log")

    def total(name: str) -> int:
        return int(sum(value for sample, value in metrics.items() if sample.startswith(name)))

    pairs = [
        ("bytes", log.sums["bytes"], total("relay_relayed_bytes_total")),
        ("heartbeats", log.sums["heartbeats"], total("relay_heartbeats_total")),
        ("streams and requests", total("relay_streams_ended_total"), total("relay_requests_total")),
    ]
    for reason, count in log.reasons.items():
        name = "relay_refused_total" if reason == "full" else "relay_streams_ended_total"
        counted = int(metrics.get(f'{name}{{reason="{reason}"}}', 0))
        if reason == "client_gone" and counted < count:
            continue  # whoever left the queue never was a stream
        pairs.append((reason, count, counted))
    for name, expected, counted in pairs:
        if expected != counted:
            figures.fault(f"{name}: {expected} by the log, {counted} by the metrics")


@dataclass
class Outcome:
    """A run and its reckoning."""

    figures: Figures
    reasons: Counter[str]
    seconds: float
    files: tuple[tuple[int, int], tuple[int, int]]  # before and after; idle upstream connections, and all others
    memory: tuple[int, int]  # KiB, before and after

    def __str__(self) -> str:
        figures = self.figures
        (idle, others), (idle_after, others_after) = self.files
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        ends = ", ".join(f"{count} {how}" for how, count in figures.ends.most_common())
        found = "\n  ".join(["", *figures.faults]) or " nothing wrong"
        return (
            f"{len(figures.asked)} requests in {self.seconds:.0f} s; by the log: {reasons}\n"
            f"for the clients: {ends}; {figures.checked} streams compared byte by byte,"
            f" {figures.body_bytes / 1e6:.0f} MB\n"
            f"afterwards: 0 streams open; descriptors {others} -> {others_after}, idle upstream connections"
            f" {idle} -> {idle_after}; PSS {self.memory[0] / 1024:.1f} -> {self.memory[1] / 1024:.1f} MiB\n"
            f"found:{found}"
        )


def soak(seconds: float, clients: int, seed: int = 1, patience: float = 1) -> Outcome:
    """Run it, a warm-up first: a worker that has never been busy is smaller than it will be ever again.

    `patience`: times which the relay gives up later than by CLOCKS, for a machine that may stop any of us for seconds.
    """
    return asyncio.run(_soak(seconds, clients, seed, patience))


async def _soak(seconds: float, clients: int, seed: int, patience: float) -> Outcome:
    upstream = Upstream()
    await upstream.start()
    settings = {
        **CLOCKS,
        **{name: str(float(CLOCKS[name]) * patience) for name in CLOCKS if name.endswith("_TIMEOUT")},
        "RELAY_UPSTREAM_URL": f"http://127.0.0.1:{upstream.port}",
        "RELAY_MAX_STREAMS": str(max(clients // 2, 4)),  # at times more come
        "WEB_CONCURRENCY": "1",
    }
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        # In a thread: it waits for the relay to come up, and the relay's probe for this loop.
        server = await loop.run_in_executor(None, stack.enter_context, servers.gunicorn(settings))
        relay = Relay(server, upstream.port)
        figures = Figures()
        load = Clients(server.port, figures, seed)
        await load.run(clients, max(seconds / 8, 0.5))
        files = await loop.run_in_executor(None, relay.quiet)
        memory = relay.memory()
        began = time.monotonic()
        await load.run(clients, seconds)
        lasted = time.monotonic() - began
        files_after = await loop.run_in_executor(None, relay.quiet, files[1])
        memory_after = relay.memory()
        metrics = await loop.run_in_executor(None, relay.metrics)
        await upstream.stop()
        ended = await loop.run_in_executor(None, server.stop, signal.SIGTERM)
        if ended != 0:
            figures.fault(f"gunicorn ended with status {ended}")
        log = read_log(server.log(), figures)
        reckon(log, metrics, figures)
        await loop.run_in_executor(None, stack.close)
    if files_after[1] > files[1] + SPARE_FILES:
        figures.fault(f"{files_after[1] - files[1]} file descriptors were not given back")
    if files_after[0] > int(settings["RELAY_MAX_STREAMS"]) + 8:
        figures.fault(f"{files_after[0]} idle upstream connections are more than the pool holds")
    if memory_after > memory + SPARE_MEMORY:
        figures.fault(f"the worker has grown by {(memory_after - memory) / 1024:.1f} MiB")
    return Outcome(figures, log.reasons, lasted, (files, files_after), (memory, memory_after))


def main(arguments: list[str]) -> int:
    seconds, clients, seed = [*arguments, *[str(SECONDS), str(CLIENTS), "1"][len(arguments) :]][:3]
    outcome = soak(float(seconds), int(clients), int(seed))
    print(outcome)
    return 1 if outcome.figures.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
