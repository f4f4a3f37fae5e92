"""GET /streams on the admin address: every open stream of every worker, and nothing of who it is for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import DeadlineExceeded, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream
from test_prompts import STREAM, chunk, flood

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn

JSON = {"Content-Type": "application/json"}
WORKERS = 3


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def relay(upstream: Upstream) -> Iterator[Gunicorn]:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "WEB_CONCURRENCY": str(WORKERS), "RELAY_CLIENT_KEYS": "key-a"}
    with servers.gunicorn(env) as running:
        eventually(lambda: len(running.workers()) == WORKERS, "all workers")
        yield running


def listed(relay: Gunicorn) -> list[dict[str, Any]]:
    """The streams of all workers: asked again where one did not answer within the second that it has."""
    found: list[dict[str, Any]] = []

    def complete() -> bool:
        nonlocal found
        response = request(relay.admin_port, "GET", "/streams")
        assert (response.status, response.header("Content-Type")) == (200, b"application/json")
        found = json.loads(response.finish().data)
        return response.header("X-Workers-Silent") is None

    eventually(complete, "an answer of all workers", 20)
    return found


def begin(relay: Gunicorn, target: str, name: str, body: bytes) -> Connection:
    connection = Connection(relay.port, rcvbuf=4096)
    connection.send("POST", target, {**JSON, "x-api-key": "key-a", "X-Request-ID": name}, body)
    return connection


def test_all_workers_streams_are_listed_by_whichever_is_asked(relay: Gunicorn, upstream: Upstream) -> None:
    path = upstream.by_hand("/chat/completions")
    wanted = {f"stream-{n}" for n in range(8)}
    open_streams = []
    exchanges = []
    for name in sorted(wanted):
        # The worker that takes one keeps still while the next comes: so another takes that.
        taken = {entry["worker"] for entry in listed(relay)[-1:]}
        for pid in taken:
            os.kill(pid, signal.SIGSTOP)
        open_streams.append(begin(relay, "/v1" + path, name, b"{}"))
        exchanges.append(upstream.next(path))
        for pid in taken:
            os.kill(pid, signal.SIGCONT)
    for _ in range(6):  # whichever worker takes the question
        streams = listed(relay)
        assert {entry["id"] for entry in streams} == wanted
        assert {entry["worker"] for entry in streams} <= set(relay.workers())
        assert [entry["age_s"] for entry in streams] == sorted((entry["age_s"] for entry in streams), reverse=True)
    assert len({entry["worker"] for entry in streams}) > 1
    for connection in open_streams:
        connection.close()
    for ex in exchanges:
        ex.wait_gone()
    eventually(lambda: listed(relay) == [], "no stream in the list")


def test_workers_have_equally_many_streams(relay: Gunicorn, upstream: Upstream) -> None:
    """Clients that come one after the other: without an agreement one worker is woken first for nearly all of them."""
    path = upstream.by_hand("/chat/completions")
    connections = []
    for n in range(30 * WORKERS):
        connections.append(begin(relay, "/v1" + path, f"even-{n}", b"{}"))
        upstream.next(path)  # the stream has begun
    shares = Counter(entry["worker"] for entry in listed(relay))
    assert len(shares) == WORKERS
    assert max(shares.values()) <= 1.15 * 30, shares
    for connection in connections:
        connection.close()
    eventually(lambda: listed(relay) == [], "no stream in the list")


def test_a_worker_that_stands_still_takes_no_connection_from_the_others(relay: Gunicorn, upstream: Upstream) -> None:
    """It has the fewest, and takes none."""
    path = upstream.by_hand("/chat/completions")
    stuck, *_ = relay.workers()
    os.kill(stuck, signal.SIGSTOP)
    try:
        connections = []
        for n in range(40):
            connections.append(begin(relay, "/v1" + path, f"on-{n}", b"{}"))
            upstream.next(path)
        for connection in connections:
            connection.close()
    finally:
        os.kill(stuck, signal.SIGCONT)
    eventually(lambda: listed(relay) == [], "no stream in the list")


def test_an_entry_says_how_a_stream_does_and_not_whose_it_is(relay: Gunicorn, upstream: Upstream) -> None:
    path = upstream.by_hand("/chat/completions")
    with begin(relay, "/chat/stream", "the-one", b'{"prompt": "a secret wish", "model": "small"}') as connection:
        ex = upstream.next(path)
        (entry,) = listed(relay)
        assert entry.pop("age_s") >= 0
        assert entry.pop("worker") in relay.workers()
        state = {"id": "the-one", "events": 0, "bytes": 0, "mount": "relay", "model": "small", "state": "waiting"}
        assert entry == state
        ex.head(headers=STREAM)
        ex.send(chunk("one"))
        ex.send(chunk("two"))
        connection.read_head().read_until(b"two\n\n")
        (entry,) = listed(relay)
        assert (entry["state"], entry["events"], entry["bytes"]) == ("reading", 2, len(chunk("one") + chunk("two")))
    ex.wait_gone()
    eventually(lambda: listed(relay) == [], "no stream in the list")


def test_a_stream_whose_client_does_not_read_is_paused(relay: Gunicorn, upstream: Upstream) -> None:
    path = upstream.serve(flood)
    with begin(relay, "/v1" + path, "slow", b"{}"):
        eventually(lambda: [entry["state"] for entry in listed(relay)] == ["paused"], "a paused stream")
    eventually(lambda: listed(relay) == [], "no stream in the list")


def test_the_list_is_on_the_admin_address_only(relay: Gunicorn) -> None:
    for headers in ({}, {"Host": f"127.0.0.1:{relay.admin_port}"}, {"X-Forwarded-For": "127.0.0.1"}):
        response = request(relay.port, "GET", "/streams", headers)
        assert response.status == 404
        response.finish()


def test_a_worker_that_is_killed_is_forgotten_and_one_that_hangs_is_named(relay: Gunicorn) -> None:
    first = relay.kill_worker()
    eventually(lambda: first not in relay.workers() and len(relay.workers()) == WORKERS, "another worker")

    def silent() -> bytes | None:
        """Whom the list names."""
        with Connection(relay.admin_port) as connection:
            connection.send("GET", "/streams")
            response = connection.read_head(3.0)
            response.finish()
            return response.header("X-Workers-Silent")

    eventually(lambda: silent() is None, "a list that misses nobody")
    stuck = relay.workers()[0]
    os.kill(stuck, signal.SIGSTOP)
    try:

        def named() -> bool:
            # The one that hangs may be the one that is asked: then somebody else is.
            with contextlib.suppress(DeadlineExceeded):
                return silent() == str(stuck).encode()
            return False

        eventually(named, "the one that hangs", 30)
    finally:
        os.kill(stuck, signal.SIGCONT)


def test_the_shared_folder_is_this_users_alone_and_goes_with_the_service(upstream: Upstream) -> None:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as running:
        (worker,) = running.workers()
        environ = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"SSE_RELAY_RUN_DIR" not in environ  # it is made by the master, for its own
        (folder,) = [path.parent for path in _folders() if path.name == f"streams-{worker}.sock"]
        assert folder.stat().st_mode & 0o777 == 0o700
        running.stop()
        assert not folder.exists()


def test_folders_of_a_service_that_was_killed_go_when_another_starts(upstream: Upstream) -> None:
    """And those of a living one stay."""
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url}
    with servers.gunicorn(settings) as living, servers.gunicorn(settings) as killed:
        folders = {
            server: [path.parent for path in _folders() if path.name == f"streams-{server.workers()[0]}.sock"]
            for server in (living, killed)
        }
        (worker,) = killed.workers()
        killed.stop(signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{worker}").exists(), "the end of its worker")
        with servers.gunicorn(settings):
            assert not folders[killed][0].exists()
            assert folders[living][0].exists()


def _folders() -> list[Path]:
    return [path for root in ("/dev/shm", "/tmp") for path in Path(root).glob("relay-run-*/streams-*.sock")]


def test_the_admin_address_has_nothing_of_the_relay_itself(relay: Gunicorn, upstream: Upstream) -> None:
    """Whoever guards the service, nginx for one, does not guard this address."""
    asked = len(upstream.seen())
    key = {"Authorization": "Bearer key-a", **JSON}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/api/stream-chat")):
        response = request(relay.admin_port, method, path, key, b"{}" if method == "POST" else b"")
        assert response.status == 404
        assert "the relay is on RELAY_BIND" in json.loads(response.finish().data)["error"]["message"]
    for path in ("/", "/relay-client.js", "/v1/_relay/ticks", "/nowhere"):
        assert request(relay.admin_port, "GET", path, key).status == 404
    for path in ("/health/live", "/health/ready", "/metrics", "/streams"):
        assert request(relay.admin_port, "GET", path).status == 200
    assert len(upstream.seen()) == asked
