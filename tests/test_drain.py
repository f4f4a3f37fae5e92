"""Stopping and reloading: what becomes of open streams, of new requests and of idle connections, by real signals.

One drain with streams of every kind in it is a scene; it is played for SIGTERM and for SIGHUP, directly and through
nginx, and each test below it states what became of one kind. No assertion on how fast, only on the order of things.

A drain is mostly waiting. Those that differ in a parameter alone are played side by side by a fixture of the module,
each with servers of its own; each test asks what came of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest
from harness import Deadline, DeadlineExceeded, eventually, servers
from harness.calm import undisturbed
from harness.client import Client, Connection, NoResponse, ProtocolError, request
from harness.upstream import PeerGone, Upstream
from test_life import EVENTS, Rig, endless, frame, gone, mute, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from concurrent.futures import Future

    from harness.client import Body, Response
    from harness.upstream import Exchange

ASKS = ("Accept", "text/event-stream")

_K = TypeVar("_K", bound="Hashable")
_T = TypeVar("_T")


def side_by_side(work: Callable[[_K], _T], keys: Iterable[_K], most: int = 4) -> dict[_K, Future[_T]]:
    """Do it for all keys, `most` at the same time. A `result()` is what came of one, or raises what went wrong."""
    with ThreadPoolExecutor(most) as pool:
        return {key: pool.submit(work, key) for key in keys}


@contextlib.contextmanager
def relay(hop: str = "direct", **settings: str) -> Iterator[Rig]:
    """An upstream and a relay with settings of the test's own; `port` is nginx's if the hop is."""
    workers = settings.pop("workers", "1")
    env = {f"RELAY_{name.upper()}": value for name, value in settings.items()} | {"WEB_CONCURRENCY": workers}
    with (
        # A stream whose client does not read stands still until its drain, which others may hold up.
        Upstream(patience=30) as upstream,
        servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **env}) as server,
    ):
        rig = Rig(upstream, server)
        try:
            if hop == "direct":
                yield rig
            else:
                with servers.nginx(server.port, server.admin_port) as proxy:
                    rig.port = proxy.port
                    yield rig
        except Exception as error:
            # A report has the logs of what ran during its own test, which is not where a fixture of the module fails.
            raise AssertionError(f"{error}\n\nlog of the relay:\n{server.log()[-8000:]}") from error


def pieces(ex: Exchange) -> None:
    """A short stream."""
    ex.head(headers=EVENTS)
    for event in PIECES:
        ex.send(event)
    ex.end()


PIECES = (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")


def turn(worker: int) -> None:
    """Wait until the worker's main loop turns, which it does once a second.

    A worker that is told to stop closes its listener at its next turn. A signal right after one leaves most of a second
    to look at a worker that drains and still accepts.
    """
    clock = Deadline(10, "a turn of the worker's loop")
    files = Path(f"/proc/{worker}/fd")
    # The file by whose time the master sees that the worker lives; it has no name any more, but a descriptor.
    sign = next(fd for fd in files.iterdir() if "wgunicorn-" in str(fd.readlink()))
    before = sign.stat().st_mtime_ns
    while sign.stat().st_mtime_ns == before:
        clock.left()
        time.sleep(0.002)


def kept(port: int) -> Connection:
    """A connection that a worker has: on it can be asked still when the worker accepts no more."""
    connection = Connection(port)
    assert connection.request("GET", "/health/ready").finish().ended == "clean"
    return connection


def until_not_ready(connection: Connection) -> None:
    def not_ready() -> bool:
        response = connection.request("GET", "/health/ready")
        response.finish()
        return response.status == 503

    eventually(not_ready, "not ready")


def ended_by_themselves(log: str, *workers: int) -> bool:
    """Whether gunicorn did not have to kill them. It does not always say so when it does; a worker that ends does."""
    return not any(text in log for text in ("graceful timeout", "was sent SIGKILL")) and all(
        f"Worker exiting (pid: {worker})" in log for worker in workers
    )


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").is_dir()


class Steady(threading.Thread):
    """Makes one request after another until it is stopped, and keeps what came of each."""

    def __init__(self, ask: Callable[[int], object], pause: float = 0.01) -> None:
        super().__init__(daemon=True)
        self.answers: list[object] = []  # what `ask` gave, or "refused", or the exception's text
        self.times: list[float] = []  # when each came
        self._ask = ask
        self._pause = pause
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                answer = self._ask(len(self.answers))
            except ConnectionRefusedError:
                answer = "refused"
            except (OSError, ProtocolError, AssertionError) as error:
                answer = f"{type(error).__name__}: {error}"
            self.times.append(time.monotonic())
            self.answers.append(answer)
            self._over.wait(self._pause)

    def longest_pause(self, since: float) -> float:
        """Seconds between two answers, or since the last, from then on."""
        times = [since, *(at for at in self.times if at > since), time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def stop(self) -> list[object]:
        self._over.set()
        self.join(30)
        assert not self.is_alive()
        return self.answers


def whole(response: Response) -> str:
    """What came of a request to `pieces`."""
    body = response.finish()
    if response.status == 200 and (body.data, body.ended) == (b"".join(PIECES), "clean"):
        return "whole"
    return f"{response.status} {body!r}"


# --- One drain ------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """What became of everything that was under way when a worker was told to stop."""

    hop: str
    signal: str
    worker: int
    ends: dict[str, Body] = field(default_factory=dict)  # of the streams whose end the client saw
    statuses: dict[str, int] = field(default_factory=dict)
    headers: dict[str, Response] = field(default_factory=dict)
    reasons: dict[str, object] = field(default_factory=dict)  # from the log
    tail: bytes = b""  # of the endless stream, framing included
    ready: dict[str, list[object]] = field(default_factory=dict)  # what probes saw, by address
    requests: list[object] = field(default_factory=list)  # what new requests saw
    log: str = ""
    drained: float = 0.0  # of relay_streams_ended_total
    left: list[str] = field(default_factory=list)  # upstream requests that were still open afterwards


DRAIN = "2"
HELD_BACK = "stuck"  # the client of this one never reads


@pytest.fixture(scope="module", params=["SIGTERM", "SIGHUP"])
def stopped(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def scenes() -> dict[tuple[str, str], Future[Scene]]:
    """Two at a time: the endless streams in them take all the processor that they get."""
    return side_by_side(_scene, itertools.product(("direct", "nginx"), ("SIGTERM", "SIGHUP")), 2)


@pytest.fixture(scope="module", params=["direct", "nginx"])
def scene(request: pytest.FixtureRequest, stopped: str, scenes: dict[tuple[str, str], Future[Scene]]) -> Scene:
    return scenes[request.param, stopped].result()


def _scene(key: tuple[str, str]) -> Scene:
    hop, stopped = key
    for _ in range(4):
        with (
            relay(hop, drain=DRAIN, heartbeat="0.2", hold="0.3", keepalive="30") as rig,
            contextlib.ExitStack() as stack,
        ):
            found = _play(rig, hop, stopped, stack)
        if found is not None:
            return found
    raise AssertionError("the machine stood still for too long in each of four drains")


def _play(rig: Rig, hop: str, stopped: str, stack: contextlib.ExitStack) -> Scene | None:
    """None: the machine stood still, for longer than a worker that drains accepts, or than it drains."""
    (worker,) = rig.relay.workers()
    found = Scene(hop, stopped, worker)
    open_: dict[str, tuple[Connection, Exchange]] = {}

    def begin(name: str, sent: bytes | None, *headers: tuple[str, str], version: str = "HTTP/1.1") -> None:
        path = rig.upstream.by_hand()
        connection = Connection(rig.port)
        connection.send("POST", "/v1" + path, [("X-Request-ID", _id(name)), *headers], version=version)
        ex = rig.upstream.next(path)
        if sent is not None:
            json_body = sent.startswith(b"{")
            content_type = "application/json" if json_body else "text/event-stream"
            ex.head(headers=[("Content-Type", content_type)], framing="length" if json_body else "chunked", length=99)
            ex.send(sent)
            found.headers[name] = connection.read_head()
            found.headers[name].read_exactly(len(sent))
        open_[name] = (connection, ex)

    begin("in time", b"data: 1\n\n")
    begin("at a boundary", b"data: 1\n\n")
    begin("after an id", b"id: 1\ndata: 1\r\n\r\n")
    begin("inside an event", b"data: 1\n\ndata: ha")
    begin("JSON", b'{"half": ')
    begin("no answer yet", None)
    begin("held", None, ASKS)
    found.headers["held"] = open_["held"][0].read_head()
    if hop == "direct":  # nginx cannot tell an HTTP/1.0 client of a cut
        begin("HTTP/1.0", b"data: 1\n\n", version="HTTP/1.0")

    stuck_path, endless_path = rig.upstream.serve(endless), rig.upstream.serve(endless)
    stuck = rig.ask(stuck_path, [("X-Request-ID", HELD_BACK)])
    fast = rig.ask(endless_path, [("X-Request-ID", "endless")])
    reader = _Tail(fast)

    whole_path = rig.upstream.serve(pieces)
    probes = {
        "service": Steady(lambda _: request(rig.relay.port, "GET", "/health/ready").status),
        "admin": Steady(lambda _: request(rig.relay.admin_port, "GET", "/health/ready").status),
        "report": Steady(lambda _: _report(request(rig.relay.admin_port, "GET", "/health"))),
        "proxy": Steady(lambda _: request(rig.port, "GET", "/health/ready").status),
    }
    steady = Steady(lambda _: whole(request(rig.port, "POST", "/v1" + whole_path)))
    for each in (steady, *probes.values()):
        stack.callback(each.stop)
        eventually(lambda each=each: len(each.answers) > 0, "a first answer")

    turn(worker)
    signalled = time.monotonic()
    rig.relay.change()
    rig.relay.send_signal(signal.Signals[stopped])

    if not _could_look(probes, signalled):
        return None

    # The drain has begun: this one ends within it.
    connection, ex = open_.pop("in time")
    with contextlib.suppress(PeerGone):
        ex.send(b"data: 2\n\n")
        ex.end()
    found.ends["in time"] = found.headers["in time"].finish()
    if time.monotonic() - signalled > 0.75 * float(DRAIN):
        return None

    for name, (connection, _) in open_.items():
        if name not in found.headers:
            found.headers[name] = connection.read_head()
        found.ends[name] = found.headers[name].finish()
    found.tail = reader.finish()

    _wait_for_the_end(rig, stopped, worker, probes, steady)
    found.ready = {name: probe.stop() for name, probe in probes.items()}
    found.requests = steady.stop()

    stuck.close()
    names = [*found.headers, HELD_BACK, "endless"]
    found.reasons = {name: rig.ended(_id(name))["reason"] for name in names}
    found.log = rig.relay.log()
    for path in {ex.path for ex in rig.upstream.seen()}:
        for ex in rig.upstream.seen(path):
            with contextlib.suppress(AssertionError):
                eventually(lambda ex=ex: ex.gone or ex.finished.is_set(), "gone", 5)
                continue
            found.left.append(repr(ex))
    if stopped == "SIGHUP":
        rig.no_stream_open()
        found.drained = rig.metric('relay_streams_ended_total{mount="relay",reason="drained"}')
    # Whatever the test plays by hand is over.
    for ex in rig.upstream.seen():
        ex.finished.set()
    return found


def _could_look(probes: dict[str, Steady], signalled: float) -> bool:
    """Wait until all of them have seen that the worker drains. False: they have not, since they stood still."""

    def noticed() -> bool:
        return all({503, "503 draining"} & set(probe.answers) for probe in probes.values())

    with contextlib.suppress(DeadlineExceeded):
        eventually(noticed, "not ready", 1.5)
    return noticed() or max(probe.longest_pause(signalled) for probe in probes.values()) <= 0.25


def _wait_for_the_end(rig: Rig, stopped: str, worker: int, probes: dict[str, Steady], steady: Steady) -> None:
    """Until the worker has ended, and everybody who asks has seen what came then."""
    if stopped == "SIGTERM":
        assert rig.relay.wait(15) == 0
        for probe in probes.values():
            eventually(lambda probe=probe: probe.answers[-1:] in (["refused"], [502]), "the listener closed")
        eventually(lambda: steady.answers[-1] != "whole", "a request that is not served")
    else:
        eventually(lambda: not exists(worker), "the old worker ended", 15)
        for probe in probes.values():
            eventually(lambda probe=probe: probe.answers[-1] in (200, "200 ok"), "the new worker is ready")


def _id(name: str) -> str:
    return name.replace(" ", "-")


def _report(response: Response) -> str:
    return f"{response.status} {json.loads(response.finish().data)['status']}"


class _Tail(threading.Thread):
    """Reads a connection as fast as it can and keeps only the end of it."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self._tail = b""
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._connection._sock.recv(262_144):
                self._tail = (self._tail + data)[-20_000:]

    def finish(self) -> bytes:
        self.join(15)
        assert not self.is_alive(), "the endless stream was not ended"
        return self._tail


def test_from_the_signal_until_the_listener_closes_the_worker_is_not_ready(scene: Scene) -> None:
    for name in ("service", "admin", "proxy"):
        answers = scene.ready[name]
        assert 503 in answers, (name, answers)
        if scene.signal == "SIGTERM":
            first = answers.index(503)
            assert 200 not in answers[first:], f"{name} was ready again: {answers[first:]}"
        else:
            assert answers[-1] == 200, "the new worker is ready"
    assert "503 draining" in scene.ready["report"]


def test_what_is_still_accepted_is_served(scene: Scene) -> None:
    answers = scene.requests
    if scene.signal == "SIGHUP":
        assert set(answers) == {"whole"}, Counter(answers)
        return
    refused = [i for i, answer in enumerate(answers) if answer != "whole"]
    assert len(answers) > len(refused) > 0
    # None was refused before the listener closed. What was in its queue just then is lost: one request at most.
    last = refused[0]
    gone = "refused" if scene.hop == "direct" else "502 "
    assert all(str(answer).startswith(gone) for answer in answers[last + 1 :]), Counter(answers)


def test_a_stream_that_ends_within_the_drain_is_whole(scene: Scene) -> None:
    body = scene.ends["in time"]
    assert (body.data.replace(b": keep-alive\n\n", b""), body.ended) == (b"data: 1\n\ndata: 2\n\n", "clean")
    assert scene.reasons["in time"] == "done"


@pytest.mark.parametrize("name", ["at a boundary", "after an id", "held"])
def test_at_an_event_boundary_the_error_frame_comes_before_the_cut(scene: Scene, name: str) -> None:
    body = scene.ends[name]
    assert frame(body.data)["code"] == "drained"
    assert body.ended == "cut"
    assert scene.reasons[name] == "drained"


def test_inside_an_event_there_is_only_a_cut(scene: Scene) -> None:
    body = scene.ends["inside an event"]
    assert (body.data, body.ended) == (b"data: 1\n\ndata: ha", "cut")
    assert scene.reasons["inside an event"] == "drained"


def test_a_body_that_is_no_event_stream_is_only_cut(scene: Scene) -> None:
    body = scene.ends["JSON"]
    assert (body.data, body.ended) == (b'{"half": ', "cut")
    assert scene.reasons["JSON"] == "drained"


def test_a_request_that_was_not_answered_yet_gets_a_status(scene: Scene) -> None:
    response = scene.headers["no answer yet"]
    assert response.status == 503
    assert response.header("x-should-retry") == b"false", "it was sent upstream"
    assert json.loads(scene.ends["no answer yet"].data)["error"]["code"] == "drained"
    assert scene.reasons["no answer yet"] == "drained"


@pytest.mark.parametrize("scene", ["direct"], indirect=True)  # nginx ends its body by closing, which says nothing
def test_an_http_1_0_client_sees_the_cut_too(scene: Scene) -> None:
    body = scene.ends["HTTP/1.0"]
    assert frame(body.data)["code"] == "drained"
    assert (body.ended, body.why) == ("cut", "RST")


def test_an_endless_upstream_with_a_fast_reader_is_drained(scene: Scene) -> None:
    assert not scene.tail.endswith(b"0\r\n\r\n"), "ended as if it were whole"
    assert scene.reasons["endless"] == "drained"


def test_a_client_that_does_not_read_is_drained_and_holds_nothing_up(scene: Scene) -> None:
    assert scene.reasons[HELD_BACK] == "drained"
    assert ended_by_themselves(scene.log, scene.worker), scene.log


def test_nothing_is_left_open_upstream(scene: Scene) -> None:
    assert not scene.left


def test_each_drained_stream_is_counted_once(scene: Scene) -> None:
    expected = {_id(name) for name, reason in scene.reasons.items() if reason == "drained"}
    lines = [json.loads(line) for line in scene.log.splitlines() if '"reason": "drained"' in line]
    drained = [line["request_id"] for line in lines]  # one of the short streams may have been open, too
    assert expected <= set(drained)
    assert len(set(drained)) == len(drained)
    if scene.signal == "SIGHUP":  # after SIGTERM nobody is there to ask
        assert scene.drained == len(drained)


def test_a_draining_relay_says_so_without_asking_an_upstream_that_hangs() -> None:
    """An answer that waits for a probe would tell a balancer a second late."""
    with relay(drain="30", health_ttl="0") as rig:
        probes = rig.upstream.serve(mute, "/models")
        waits = [Connection(rig.relay.admin_port) for _ in range(2)]
        for connection in waits:
            assert connection.request("GET", "/health/live").finish().ended == "clean"
        (worker,) = rig.relay.workers()
        turn(worker)
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: request(rig.relay.admin_port, "GET", "/health/ready").status == 503, "not ready")
        for connection in waits:
            response = connection.request("GET", "/health")
            report = json.loads(response.finish().data)
            assert (response.status, report["status"]) == (503, "draining")
        assert rig.upstream.seen(probes) == []


# --- Idle connections -----------------------------------------------------------------------------------------------


def test_idle_connections_do_not_hold_a_worker_back_and_a_request_on_its_way_is_served() -> None:
    """The keep-alive time and the drain are longer than this test may take."""
    with relay(keepalive="30", drain="30") as rig:
        path = rig.upstream.serve(pieces)
        asked = kept(rig.relay.admin_port)
        late, *idle = [Connection(port) for port in (rig.port, rig.port, rig.port, rig.relay.admin_port)]
        for connection in idle[1:]:  # the first never asks for anything
            assert connection.request("GET", "/health/live").finish().ended == "clean"
        late.raw(f"POST /v1{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n".encode())
        (worker,) = rig.relay.workers()
        turn(worker)
        rig.relay.send_signal(signal.SIGTERM)
        until_not_ready(asked)
        late.raw(b"\r\n{}")
        response = late.read_head()
        assert whole(response) == "whole"
        assert response.header("Connection") == b"close"
        assert rig.relay.wait(15) == 0
        assert all(connection.closed_by_peer for connection in idle)
        assert ended_by_themselves(rig.relay.log(), worker)


def test_a_worker_that_stops_keeps_idle_connections_for_as_long_as_a_proxy_may_use_them() -> None:
    """The shipped nginx gives them up after 3 s; until then a request on one of them is served."""
    with relay(keepalive="30", drain="30") as rig:
        path = rig.upstream.serve(pieces)
        (worker,) = rig.relay.workers()
        connections = [Connection(rig.port) for _ in range(10)]
        for connection in connections:
            assert whole(connection.request("POST", "/v1" + path)) == "whole"
        since = time.monotonic()
        rig.relay.reload()
        eventually(lambda: len(rig.relay.workers()) == 2, "the old worker was told to stop")
        for connection in connections:
            time.sleep(0.1)  # the worker looks at what is idle so often
            try:
                answer = whole(connection.request("POST", "/v1" + path))
            except (NoResponse, ConnectionError):
                assert time.monotonic() - since > 3
                break
            assert answer == "whole"
        eventually(lambda: not exists(worker), "the old worker ended", 15)
        assert all(connection.closed_by_peer for connection in connections)


NOT_WHOLE = {
    "not a byte": b"",
    "half a head": b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1",
    "half a body": b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{",
    "half a chunk": b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
}


@pytest.fixture(scope="module")
def stopped_with_a_part() -> dict[str, Future[None]]:
    return side_by_side(_stop_with_a_part, NOT_WHOLE)


@pytest.mark.parametrize("part", NOT_WHOLE)
def test_a_request_that_never_comes_whole_does_not_hold_a_worker_back(
    part: str, stopped_with_a_part: dict[str, Future[None]]
) -> None:
    stopped_with_a_part[part].result()


@undisturbed(1)  # a worker has 2 s more than it takes for this
def _stop_with_a_part(part: str) -> None:
    with relay(keepalive="30", drain="1") as rig:
        (worker,) = rig.relay.workers()
        connection = Connection(rig.port)
        connection.raw(NOT_WHOLE[part])
        assert request(rig.port, "GET", "/health/live").status == 200  # so that the other has been accepted
        rig.relay.send_signal(signal.SIGTERM)
        assert rig.relay.wait(15) == 0
        assert connection.closed_by_peer
        assert ended_by_themselves(rig.relay.log(), worker), rig.relay.log()


# --- Reload ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reloads() -> dict[tuple[int, str], Future[None]]:
    """Two at a time: each makes requests as fast as it can."""
    return side_by_side(_reload_twice, itertools.product((1, 2), ("direct", "nginx")), 2)


@pytest.mark.parametrize("hop", ["direct", "nginx"])
@pytest.mark.parametrize("workers", [1, 2])
def test_reloads_lose_no_stream_and_refuse_no_request(
    hop: str, workers: int, reloads: dict[tuple[int, str], Future[None]]
) -> None:
    reloads[workers, hop].result()


def _reload_twice(key: tuple[int, str]) -> None:
    workers, hop = key
    with relay(hop, workers=str(workers), drain="30") as rig:
        local = threading.local()
        path = rig.upstream.serve(pieces)

        def anew(_: int) -> str:
            return whole(request(rig.port, "POST", "/v1" + path, body=b"{}"))

        def kept(n: int) -> str:
            if not hasattr(local, "client"):
                local.client = Client(rig.port)
            time.sleep(0.02 * (n % 5))
            return whole(local.client.request("POST", "/v1" + path, body=b"{}"))

        steady = [Steady(anew), Steady(anew), Steady(kept), Steady(kept), Steady(kept)]
        for _ in range(2):
            old = rig.relay.workers()
            by_hand = rig.upstream.by_hand()
            connections = [rig.ask(by_hand) for _ in range(8)]
            responses = []
            for _ in connections:
                ex = rig.upstream.next(by_hand)
                ex.head(headers=EVENTS)
                ex.send(b"data: before\n\n")
            for connection in connections:
                response = connection.read_head()
                response.read_until(b"data: before\n\n")
                responses.append(response)
            rig.relay.reload()
            eventually(lambda old=old: len(rig.relay.workers()) >= len(old) + workers, "new workers")
            # The new ones have taken over.
            eventually(lambda: request(rig.port, "GET", "/health/ready").status == 200, "ready")
            for ex in rig.upstream.seen(by_hand):
                ex.send(b"data: after\n\n")
                ex.end()
            for response in responses:
                body = response.finish()
                assert (body.data, body.ended) == (b"data: before\n\ndata: after\n\n", "clean")
            eventually(lambda old=old: not any(map(exists, old)), "the old workers ended", 20)
            assert ended_by_themselves(rig.relay.log(), *old)
        answers = Counter(answer for thread in steady for answer in thread.stop())
        assert set(answers) == {"whole"}, answers
        assert answers["whole"] > 20
        rig.no_stream_open()


def test_each_of_two_workers_drains_its_streams() -> None:
    with relay(workers="2", drain="1", heartbeat="0", hold="0") as rig:
        path = rig.upstream.serve(silent)
        workers = rig.relay.workers()
        streams: list[Response] = []

        def both_have_some() -> bool:
            connection = rig.ask(path, [("X-Request-ID", f"one-{len(streams)}")])
            streams.append(connection.read_head())
            streams[-1].read_until(b"data: 1\n\n")
            return {each["worker"] for each in rig.streams()} == set(workers)

        eventually(both_have_some, "streams in both workers")
        rig.relay.send_signal(signal.SIGTERM)
        for response in streams:
            body = response.finish()
            assert (frame(body.data)["code"], body.ended) == ("drained", "cut")
        assert rig.relay.wait(15) == 0
        lines = [rig.ended(f"one-{n}") for n in range(len(streams))]
        assert {line["reason"] for line in lines} == {"drained"}
        assert {line["worker"] for line in lines} == set(workers)
        assert ended_by_themselves(rig.relay.log(), *workers)


# --- Without a drain ------------------------------------------------------------------------------------------------


def test_streams_of_a_killed_worker_are_cut_and_no_longer_counted_as_open() -> None:
    with relay(heartbeat="0", hold="0") as rig:
        done, path = rig.upstream.serve(pieces), rig.upstream.serve(silent)
        for _ in range(3):
            assert whole(request(rig.port, "POST", "/v1" + done)) == "whole"
        responses = [rig.ask(path).read_head() for _ in range(5)]
        for response in responses:
            response.read_until(b"data: 1\n\n")
        unanswered = rig.ask(rig.upstream.serve(mute))
        eventually(lambda: rig.metric("relay_open_streams") == 6, "six open streams")
        counted = ("relay_requests_total", "relay_streams_ended_total", "relay_relayed_bytes_total")
        before = {name: rig.metric(name) for name in counted}
        assert before["relay_requests_total"] == 3

        killed = rig.relay.kill_worker()
        for response in responses:
            body = response.finish()
            assert (body.data, body.ended) == (b"data: 1\n\n", "cut")
        with pytest.raises(NoResponse):
            unanswered.read_head()
        for ex in rig.upstream.seen(path):
            gone(ex)

        # The listener outlives the worker: what comes meanwhile waits for the next one.
        assert whole(request(rig.port, "POST", "/v1" + done)) == "whole"
        assert killed not in rig.relay.workers()
        rig.no_stream_open()
        after = {name: rig.metric(name) for name in counted}
        assert all(after[name] >= before[name] for name in counted), (before, after)
        assert after["relay_requests_total"] == after["relay_streams_ended_total"] == 4


def test_a_drain_of_no_time_ends_streams_at_once() -> None:
    with relay(drain="0", heartbeat="0", hold="0") as rig:
        response = rig.ask(rig.upstream.serve(silent)).read_head()
        response.read_until(b"data: 1\n\n")
        rig.relay.send_signal(signal.SIGTERM)
        body = response.finish()
        assert (frame(body.data)["code"], body.ended) == ("drained", "cut")
        assert rig.relay.wait(15) == 0


def test_an_http_1_0_client_that_reads_its_end_late_sees_the_cut_too() -> None:
    """A second after the drain's end the worker breaks off writes that are stuck. A stream that has been written, and
    whose client has a while to read it before the reset, is none."""
    body = b"data: " + b"x" * 40_000
    with relay(drain="0", heartbeat="0", hold="0") as rig:
        path = rig.upstream.by_hand()
        with Connection(rig.port, rcvbuf=4096) as connection:
            connection.send("GET", f"/v1{path}", [("X-Request-ID", "late")], version="HTTP/1.0")
            ex = rig.upstream.next(path)
            ex.head(headers=EVENTS)
            ex.send(body)
            eventually(lambda: [each["bytes"] for each in rig.streams()] == [len(body)], "all of it written")
            rig.relay.send_signal(signal.SIGTERM)
            assert rig.ended("late")["reason"] == "drained"
            time.sleep(1.3)  # whatever was read before would have got there without a test
            assert connection.read_head().finish().ended == "cut"
        gone(ex)
        assert rig.relay.wait(15) == 0


@pytest.fixture(scope="module")
def ended_by_signal() -> dict[tuple[signal.Signals, bool], Future[None]]:
    return side_by_side(_end_by_signal, itertools.product((signal.SIGINT, signal.SIGQUIT), (False, True)))


@pytest.mark.parametrize("draining", [False, True], ids=["alone", "during a drain"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_sigint_and_sigquit_end_it_without_a_drain_and_without_a_traceback(
    number: signal.Signals, draining: bool, ended_by_signal: dict[tuple[signal.Signals, bool], Future[None]]
) -> None:
    ended_by_signal[number, draining].result()


def _end_by_signal(key: tuple[signal.Signals, bool]) -> None:
    number, draining = key
    with relay(drain="50") as rig:
        path = rig.upstream.serve(silent)
        response = rig.ask(path).read_head()
        response.read_until(b"data: 1\n\n")
        unanswered = rig.ask(rig.upstream.serve(mute), [("X-Request-ID", "unanswered")])
        if draining:
            asked = kept(rig.relay.admin_port)
            rig.relay.send_signal(signal.SIGTERM)
            until_not_ready(asked)
        rig.relay.send_signal(number)
        assert rig.relay.wait(15) == 0
        assert response.finish().ended == "cut"
        unanswered.close()
        for ex in rig.upstream.seen(path):
            gone(ex)
