"""Random lives of streams, and what must hold whatever happens.

Drives `relay.stream.relayed.Stream` itself, several at a time, between real sockets: an upstream that sends, pauses,
cuts, resets and falls silent, and a client that reads, dawdles, stops and leaves, as a generated plan says. Short
clocks and a drain end what nobody else ends. Under plain threads here, and again under gevent in a process that is
patched for it.

The reference is independent of the relay's code: it is worked out from the bytes that the client got and those that the
upstream had to send.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import REPO, SEED, eventually
from harness.authority import Authority
from harness.calm import Pulse
from harness.upstream import Upstream
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import relay.stream.relayed
import relay.upstream.endpoint
from relay.gate.slots import Admission
from relay.record import Record
from relay.settings import Settings
from relay.stream.drain import drain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.upstream import Exchange

#: The relay's clocks, in seconds: long enough that a busy machine does not set them off by itself too often.
HEARTBEAT, HOLD, FIRST_BYTE, IDLE, WRITE, QUEUE = 0.05, 0.1, 0.7, 0.6, 0.5, 0.15
SLOTS = 4
#: Scenarios for each kind of waiting and of upstream, about a second of real time for two of them.
EXAMPLES = 25

REASONS = (
    "done", "client_gone", "upstream_cut", "upstream_error", "connect_timeout", "first_byte_timeout", "idle_timeout",
    "write_timeout", "drained", "full",
)  # fmt: skip
COMMENT = b": keep-alive"
_MARK = b"\xef\xbb\xbf"


# --- Plans ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What happens to one stream."""

    asks: bool  # for events: it is held
    http10: bool
    late: float | None  # seconds until the upstream's head; None: it never comes
    status: int
    content_type: str
    framing: str
    steps: tuple[bytes | int | float, ...]  # what the upstream sends (a number: so long an event), its pauses (seconds)
    end: str  # of the upstream's answer
    reads: str  # how the client does
    leaves: tuple[str, float] | None  # how, and after how many seconds

    @property
    def pieces(self) -> list[bytes | float]:
        """The steps with their bytes, which would make a long report."""
        return [b"data: " + b"x" * step + b"\n\n" if isinstance(step, int) else step for step in self.steps]

    @property
    def body(self) -> bytes:
        return b"".join(piece for piece in self.pieces if isinstance(piece, bytes))

    @property
    def whole(self) -> bool:
        """Whether the upstream ends its answer so that it can be told to be whole."""
        return self.end == "end" or (self.framing == "close" and self.end == "abort")

    @property
    def plain_events(self) -> bool:
        return self.content_type == "text/event-stream"


_TOKENS = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r\n"),
        *(b"data: x", b"data: [DONE]\n\n", b"id: 7\n", b"id", b"event: error\n", b": c", b"\xef\xbb\xbf", b"\xe2\x82"),
        *(b"data: 1\n\n",) * 4,
        *(b"data: 2\r\n\r\n",) * 2,
    ]
)
_SENT = st.one_of(
    st.lists(_TOKENS, min_size=1, max_size=6).map(b"".join),
    st.binary(min_size=1, max_size=50).filter(lambda data: b"keep" not in data),  # or a comment could be either's
    st.just(60_000),
)
_PAUSES = st.sampled_from([0.01, 0.03, 0.08, 0.15])
_PLANS = st.builds(
    Plan,
    asks=st.booleans(),
    http10=st.sampled_from([False, False, False, True]),
    late=st.sampled_from([0, 0, 0, 0.05, 0.15, None]),
    status=st.sampled_from([200, 200, 200, 200, 401]),
    content_type=st.sampled_from(["text/event-stream"] * 4 + ["application/json"]),
    framing=st.sampled_from(["chunked", "chunked", "length", "close"]),
    steps=st.lists(st.one_of(_SENT, _SENT, _PAUSES), max_size=7).map(tuple),
    end=st.sampled_from(["end", "end", "end", "abort", "reset", "garbage", "silence", "much"]),
    reads=st.sampled_from(["at once", "at once", "at once", "slowly", "never"]),
    leaves=st.one_of(
        st.none(),
        st.none(),
        st.tuples(st.sampled_from(["close", "reset", "half_close"]), st.sampled_from([0, 0.02, 0.06, 0.12, 0.3])),
    ),
).filter(lambda plan: (plan.framing, plan.end) != ("length", "much"))


@dataclass(frozen=True)
class Scenario:
    """Several streams at once, and when the server begins to stop: they have until `drain[1]` then."""

    plans: tuple[Plan, ...]
    drain: tuple[float, float] | None


_SCENARIOS = st.builds(
    Scenario,
    plans=st.lists(_PLANS, min_size=1, max_size=6).map(tuple),
    drain=st.one_of(
        st.none(), st.none(), st.tuples(st.sampled_from([0.02, 0.1, 0.25]), st.sampled_from([0, 0.05, 0.2]))
    ),
)
#: Refusals after the hold, whole and cut: they are drawn once in a hundred lives.
_REFUSED_LATE = Scenario(
    tuple(
        Plan(True, False, 0.15, 401, "text/event-stream", "length", (b"x",), end, "at once", None)
        for end in ("end", "abort")
    ),
    None,
)


# --- One stream -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Life:
    """One stream between its sockets, with the threads that play upstream, server and client."""

    plan: Plan
    name: str
    received: bytearray = field(default_factory=bytearray)
    how: str = ""  # how it ended for the client: FIN, RST, or that it left
    heads: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)
    given: int = 0  # bytes that the stream gave to the server
    clean: bool | None = None  # whether the server was told to end the body properly
    records: list[Any] = field(default_factory=list)  # what `ended` was called with
    closed: int = 0
    fault: str = ""  # what the relay may never raise
    sent: list[bytes] = field(default_factory=list)  # by the upstream, handed to its kernel
    gaps: list[float] = field(default_factory=list)  # the upstream's silences, by the upstream's clock
    stood_still: float = 0.0  # seconds at the longest, this process
    began: float = 0.0  # monotonic seconds
    exchanges: list[Exchange] = field(default_factory=list)
    handled: int = 0  # of them
    over: threading.Event = field(default_factory=threading.Event)

    def answered(self, status: int, record: Record) -> None:
        """What the stream tells when the upstream has answered."""

    def ended(self, record: Any) -> None:
        self.records.append(record)

    @property
    def stayed(self) -> bool:
        """Whether the client was there to the end."""
        return self.how in ("FIN", "RST")

    @property
    def held(self) -> bool:
        """Whether the relay answered before the upstream had: with a type of its own, as no upstream here writes it."""
        return any(("Content-Type", "text/event-stream; charset=utf-8") in headers for _, headers in self.heads)

    # The upstream's part.

    def handle(self, ex: Exchange) -> None:
        self.exchanges.append(ex)
        plan = self.plan
        since = self.began  # so does the relay's first clock, with all that a connection and a handshake may take

        def spoken(began: float) -> None:
            """From before the last bytes went out until these have: this thread may stand still beside either."""
            nonlocal since
            self.gaps.append(time.monotonic() - since)
            since = began

        try:
            if plan.late is None:
                self._silence(ex)
                return
            time.sleep(plan.late)
            missing = 0 if plan.whole else 7
            began = time.monotonic()
            ex.head(plan.status, "", [("Content-Type", plan.content_type)], plan.framing, len(plan.body) + missing)
            spoken(began)
            for piece in plan.pieces:
                if isinstance(piece, bytes):
                    self.sent.append(piece)
                    began = time.monotonic()
                    ex.send(piece)
                    spoken(began)
                else:
                    time.sleep(piece)
            self._end(ex)
        finally:
            spoken(time.monotonic())
            self.handled += 1

    def _end(self, ex: Exchange) -> None:
        end = self.plan.end
        if end == "end":
            ex.end()
        elif end in ("abort", "reset"):
            getattr(ex, end)()
        elif end == "garbage" and self.plan.framing == "chunked":
            ex.raw(b"no chunk\r\n")
            self._silence(ex)
        elif end == "much":
            event = b"data: " + b"e" * 20_000 + b"\n\n"
            for _ in range(15):  # nobody may be there to end it
                self.sent.append(event)
                ex.send(event)
                time.sleep(0.01)
            self._silence(ex)
        else:
            self._silence(ex)

    def _silence(self, ex: Exchange) -> None:
        # Not wait_gone: gevent's poll does not know POLLRDHUP.
        ex._sock.settimeout(20)
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            assert not ex._sock.recv(1), "nobody sends more"
        ex.abort()

    # The server's part: what gunicorn does with a WSGI iterable.

    def serve(self, stream: relay.stream.relayed.Stream, connection: socket.socket) -> None:
        try:
            for piece in stream:
                assert len(self.heads) == 1, "a body without a head"
                self.given += len(piece)
                connection.sendall(piece)
            self.clean = True
        except OSError:  # a cut, or the client's connection broke
            self.clean = False
        except BaseException as error:  # noqa: BLE001 - the test shows it
            self.fault = repr(error)
        finally:
            with contextlib.suppress(AttributeError):
                stream.close()
                stream.close()
            connection.close()
            self.over.set()

    def start_response(self, status: str, headers: list[tuple[str, str]]) -> None:
        self.heads.append((status, headers))

    def finished(self, record: Record) -> None:
        assert record.reason

    # The client's part.

    def read(self, sock: socket.socket) -> None:
        plan = self.plan
        until = time.monotonic() + (plan.leaves[1] if plan.leaves else 30)
        try:
            while (left := until - time.monotonic()) > 0:
                if plan.reads == "never" and not self.over.is_set():
                    self.over.wait(min(left, 0.01))
                    continue
                sock.settimeout(left)
                data = sock.recv(2000 if plan.reads == "slowly" else 262_144)
                if not data:
                    self.how = "FIN"
                    return
                self.received += data
                if plan.reads == "slowly" and not self.over.is_set():
                    time.sleep(0.01)
        except ConnectionResetError:
            self.how = "RST"
        except TimeoutError:
            pass
        finally:
            if not self.how:
                assert plan.leaves, "the stream never ended"
                self.how = plan.leaves[0]
                if self.how == "half_close":
                    sock.shutdown(socket.SHUT_WR)
                    self.over.wait(10)
                elif self.how == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


class Machine:
    """An upstream, the relay's side of it, and the admission: what streams share."""

    def __init__(self, upstream: Upstream, **settings: object) -> None:
        self.upstream = upstream
        self.settings = Settings.from_mapping(
            settings
            | {
                "RELAY_UPSTREAM_URL": upstream.base_url,
                "RELAY_HEARTBEAT": HEARTBEAT,
                "RELAY_HOLD": HOLD,
                "RELAY_FIRST_BYTE_TIMEOUT": FIRST_BYTE,
                "RELAY_IDLE_TIMEOUT": IDLE,
                "RELAY_WRITE_TIMEOUT": WRITE,
                "RELAY_QUEUE": QUEUE,
                "RELAY_MAX_STREAMS": SLOTS,
            }
        )
        self.relay = relay.upstream.endpoint.Upstream(self.settings, upstream.base_url)
        self.admission = Admission(SLOTS, per_client=100)
        self.alive: weakref.WeakSet[relay.stream.relayed.Stream] = weakref.WeakSet()
        self.counted: dict[str, int] = {}
        self._sockets: list[socket.socket] = []  # for the end of a test that has failed
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Small buffers, which the accepted sockets inherit: a client that does not read is felt at once.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)

    def close(self) -> None:
        for sock in [self._listener, *self._sockets]:
            sock.close()
        self.relay.close()

    def play(self, scenario: Scenario) -> list[Life]:
        """Play it to the end of every stream."""
        lives = [Life(plan, f"life-{n}") for n, plan in enumerate(scenario.plans)]
        with Pulse() as pulse:
            self._play(scenario, lives)
        for life in lives:
            life.stood_still = pulse.longest()
        return lives

    def _play(self, scenario: Scenario, lives: list[Life]) -> None:
        threads = [thread for life in lives for thread in self._begin(life)]
        try:
            if scenario.drain is not None:
                after, given = scenario.drain
                time.sleep(after)
                drain.begin(time.monotonic() + given)
                until = drain.at + 1.0  # what gunicorn's worker does: a last word, then writes are broken off
                while any(not life.over.is_set() for life in lives):
                    if time.monotonic() > until:
                        drain.break_writes()
                    time.sleep(0.02)
            for thread in threads:
                thread.join(20)
            assert not any(thread.is_alive() for thread in threads), "a stream never ended"
            self._sockets.clear()
        finally:
            drain.at = float("inf")

    def _begin(self, life: Life) -> list[threading.Thread]:
        plan = life.plan
        path = self.upstream.serve(life.handle)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(self._listener.getsockname())
        connection, _ = self._listener.accept()
        self._sockets += [client, connection]
        life.began = time.monotonic()
        record = Record(
            request_id=life.name,
            method="POST",
            route="test",
            client="someone",
            owner="someone",
            mount="machine",
            asks_for_events=plan.asks,
        )
        stream = relay.stream.relayed.Stream(
            self.relay.exchange("POST", path, None, [], b"{}"),
            record,
            self.settings,
            life.start_response,
            client=connection,
            http10=plan.http10,
            present=lambda _status, headers: headers,
            admission=self.admission,
            watch=life,
            closed=lambda: setattr(life, "closed", life.closed + 1),
        )
        self.alive.add(stream)
        threads = [
            threading.Thread(target=life.serve, args=(stream, connection), daemon=True),
            threading.Thread(target=life.read, args=(client,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        return threads


# --- What must hold -------------------------------------------------------------------------------------------------


def stands_at_boundary(body: bytes) -> bool:
    """Whether a comment or a frame may follow: at the start or after a blank line. A byte order mark is no line."""
    lines = re.split(rb"\r\n|\n|\r", body.removeprefix(_MARK))
    return not body or lines[-2:] == [b"", b""]


def has_id(body: bytes) -> bool:
    lines = re.split(rb"\r\n|\n|\r", body.removeprefix(_MARK))
    return any(line == b"id" or line.startswith(b"id:") for line in lines)


def take_out_comments(received: bytes, body: bytes) -> tuple[int, int]:
    """How much of `body` is in `received`, and how many comments; each stands where one may, and nothing else does."""
    at = taken = comments = 0
    while at < len(received):
        found = received.find(COMMENT, at)
        piece = received[at : found if found >= 0 else len(received)]
        assert body[taken : taken + len(piece)] == piece, f"not the upstream's bytes at {taken}: {piece[:100]!r}"
        taken += len(piece)
        at += len(piece)
        if found >= 0:
            assert stands_at_boundary(body[:taken]), f"a comment inside an event: {body[max(taken - 50, 0) : taken]!r}"
            # No blank line once there was an `id` field; one line end then, of either kind.
            ends = (b"\n", b"\r") if has_id(body[:taken]) else (b"\n\n",)
            rest = received[at + len(COMMENT) :]
            # The last one may have been cut short by the client's leaving.
            end = next((end for end in ends if rest.startswith(end) or end.startswith(rest)), None)
            assert end is not None, rest[:50]
            at += len(COMMENT) + len(end)
            comments += 1
    return taken, comments


def error_told(life: Life) -> dict[str, str]:
    """The error that the relay told this client of, in a body or in a frame at its end; empty: none."""
    found = re.search(
        rb'(?:\A|event: error\ndata: )(\{(?:"type": "error", )?"error": [^\n]*\})(?:\n\n)?\Z', life.received
    )
    if found is None:
        return {}
    error: dict[str, str] = json.loads(found[1])["error"]
    return error if error.get("request_id") == life.name else {}


def check(life: Life, scenario: Scenario) -> str:
    """Hold one life against the contract. Gives its end reason."""
    assert not life.fault
    assert len(life.records) == 1, "one end, one reason"
    assert life.closed >= 1
    record = life.records[0]
    assert record.reason in REASONS
    # After a hold the client has the relay's 200, and the record the status that the upstream has answered with.
    status = 200 if life.held else record.status
    assert [line.partition(" ")[0] for line, _ in life.heads] == ([str(status)] if status else [])
    if life.held and record.reason == "upstream_error":
        assert record.status == life.plan.status
    error = error_told(life)
    if error and not life.received.startswith((b'{"error"', b'{"type": "error"')):
        _check_frame(life, error)
    elif error or record.status in (502, 503, 504):
        _check_refusal(life, error)
    else:
        received = bytes(life.received)
        if life.plan.reads != "at once" and life.how == "RST":
            received = received.partition(b'event: error\ndata: {"type": "error"')[0]  # broken off in a long frame
        _check_body(life, received, framed=False)
    # The upstream's connection is closed, unless the answer was read to its end: then it may be used again.
    eventually(lambda: life.handled == len(life.exchanges), f"the upstream has noticed the end ({record.reason})")
    may_be_kept = record.bytes == len(life.plan.body) or (life.held and record.reason == "upstream_error")
    if not (life.plan.whole and may_be_kept):
        for ex in life.exchanges:
            eventually(lambda ex=ex: ex._sock.fileno() < 0, f"{ex!r} gone after {record.reason}")
    _check_cause(life, scenario)
    return str(record.reason)


def _check_refusal(life: Life, error: dict[str, str]) -> None:
    """A failure before the answer: the relay's own status and body, whole."""
    (record,) = life.records
    assert record.bytes == 0
    assert [int(value) for name, value in life.heads[0][1] if name == "Content-Length"] == [life.given]
    if life.stayed:
        assert life.clean
        assert error["code"] == record.reason


def _check_frame(life: Life, error: dict[str, str]) -> None:
    """A failure in a stream, told at an event boundary and followed by a cut."""
    assert not life.clean, "a clean end after an error frame"
    (record,) = life.records
    assert life.plan.plain_events or life.held
    assert error["code"] == record.reason
    _check_body(life, bytes(life.received[: life.received.rindex(b"event: error\ndata: ")]), framed=True)


def _check_body(life: Life, received: bytes, *, framed: bool) -> None:
    """The upstream's bytes in order, nothing but comments between them, and an end that tells what it was."""
    (record,) = life.records
    plan = life.plan
    body = b"".join(life.sent)
    taken, comments = take_out_comments(received, body)
    fits = (plan.plain_events or life.held) and stands_at_boundary(body[:taken])
    if comments:
        assert plan.plain_events or life.held, "a comment in a body that is no event stream"
    if framed:
        assert fits, "a frame inside an event"
    if life.clean:
        assert record.reason == "done"
        assert plan.whole
        assert taken == len(plan.body) or not life.stayed, "a clean end of a body that is not whole"
    elif life.stayed and record.reason not in ("client_gone", "write_timeout") and life.how == "FIN":
        # It got all that there was for it, and was told why there is no more, where that fits.
        assert (record.bytes, record.heartbeats, life.given) == (taken, comments, len(life.received))
        assert framed == fits, body[max(taken - 50, 0) : taken]
    # One that is slow may be broken off in the middle of a write, where a FIN can come first.
    if plan.http10 and not life.clean and life.stayed and plan.reads == "at once":
        assert life.how == "RST", "only a reset tells an HTTP/1.0 client of a cut"


def _check_cause(life: Life, scenario: Scenario) -> None:
    """Nothing ends for a reason that was not there."""
    (record,) = life.records
    plan = life.plan
    # By the upstream's clock. Where the process stood still nobody can tell whose silence it was.
    longest = max([*life.gaps, life.stood_still])
    causes = {
        "done": plan.whole,
        "client_gone": plan.leaves is not None,
        "upstream_cut": plan.end in ("abort", "reset", "garbage"),
        "upstream_error": life.held and (not plan.plain_events or plan.status != 200),
        "connect_timeout": False,  # it always accepts
        "first_byte_timeout": record.first_byte is None and (plan.late is None or longest > FIRST_BYTE * 0.9),
        "idle_timeout": longest > IDLE * 0.9,
        # Nor does one read that has left, or that stands still itself.
        "write_timeout": plan.reads != "at once" or plan.leaves is not None or life.stood_still > WRITE / 2,
        "drained": scenario.drain is not None,
        "full": not record.admitted and not life.exchanges and len(scenario.plans) > SLOTS,
    }
    assert causes[record.reason], f"no cause; the upstream's longest silence was {longest:.3f} s"


@contextlib.contextmanager
def _machine(certificates: Path | None = None) -> Iterator[Machine]:
    """`certificates`: a folder with an authority's and the upstream's, which speaks TLS then."""
    context, known = None, {}
    if certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        known["RELAY_UPSTREAM_CA"] = str(certificates / "ca.pem")
    files = len(list(Path("/proc/self/fd").iterdir()))
    with Upstream(tls=context) as upstream:
        machine = Machine(upstream, **known)
        # Streams are freed when they end and not when the collector comes round.
        gc.collect()
        gc.disable()
        try:
            yield machine
        finally:
            gc.enable()
            machine.close()
    eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= files, "file descriptors back where they were")


def _run(machine: Machine, scenario: Scenario) -> None:
    lives = machine.play(scenario)
    for life in lives:
        try:
            reason = check(life, scenario)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{life.plan}\n{life.records}\n{life.how}, {life.clean=}") from error
        machine.counted[reason] = machine.counted.get(reason, 0) + 1
    eventually(lambda: machine.admission.open == 0, "no slot taken")
    assert machine.admission.open == 0
    assert not machine.admission._queue
    assert not machine.admission._of_client
    assert not drain.open
    for life in lives:
        for ex in life.exchanges:
            machine.upstream.forget(ex.path)
    # In the service the collector comes round rarely, so streams must be freed when they end.
    lives.clear()
    eventually(lambda: not machine.alive, "freed without the garbage collector")


def examine(examples: int, certificates: Path | None = None) -> dict[str, int]:
    """Search for a scenario that breaks something. Gives how often streams ended for which reason."""
    with _machine(certificates) as machine:

        @settings(
            max_examples=examples,
            deadline=None,  # the watchdog's business
            database=None,
            derandomize=bool(SEED),
            phases=[Phase.explicit, Phase.generate],  # real time: a second run of the same plan is another life
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(_SCENARIOS)
        @example(_REFUSED_LATE)
        def lives(scenario: Scenario) -> None:
            _run(machine, scenario)

        lives()
        return machine.counted


_IN_GEVENT = """
from gevent import monkey
monkey.patch_all()
import sys
from pathlib import Path
certificates, examples, *sys.path[:0] = sys.argv[1:]
from relay.stream import waiting
assert waiting.cooperative()
import test_stream_machine
print(test_stream_machine.examine(int(examples)))
print("with TLS:", test_stream_machine.examine(int(examples), Path(certificates)))
"""


@pytest.mark.watchdog(240)
def test_whatever_happens_to_streams_the_contract_holds(tmp_path: Path) -> None:
    """Under threads in this process, under gevent in another at the same time."""
    Authority(tmp_path).issue("server", "IP:127.0.0.1")
    command = [sys.executable, "-c", _IN_GEVENT, str(tmp_path), str(EXAMPLES), str(REPO), str(Path(__file__).parent)]
    env = os.environ | {"PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True) as other:
        try:
            print("threads:", examine(EXAMPLES))
            print("with TLS:", examine(EXAMPLES, tmp_path))
            said, _ = other.communicate(timeout=180)
        finally:
            other.kill()
    print("gevent:", said[-5000:])
    assert other.returncode == 0, said
