"""What comes before a drain, and what a drain still takes: by real signals, and by `POST /drain`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import REPO, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream
from test_drain import PIECES, exists, kept, pieces, relay, until_not_ready, whole
from test_life import EVENTS, Rig, frame, mute, silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.client import Response
    from harness.servers import Gunicorn


def ready(port: int) -> int:
    response = request(port, "GET", "/health/ready")
    response.finish()
    return response.status


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def drain(rig: Rig, method: str = "POST", headers: dict[str, str] | None = None, port: int = 0) -> tuple[int, Any]:
    """What `/drain` answers on the admin address."""
    response = request(port or rig.relay.admin_port, method, "/drain", headers or {})
    return response.status, json.loads(response.finish().data)


@contextlib.contextmanager
def running_in(folder: Path) -> Iterator[tuple[Upstream, Gunicorn]]:
    """A service whose operator has named the folder that its workers share, and its upstream."""
    with (
        Upstream() as upstream,
        servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, "SSE_RELAY_RUN_DIR": str(folder)}) as service,
    ):
        yield upstream, service


# --- SIGTERM --------------------------------------------------------------------------------------------------------


def test_for_the_lame_duck_time_it_is_not_ready_and_serves_as_before() -> None:
    with relay(lame_duck="4", drain="20", workers="2") as rig:
        path = rig.upstream.serve(pieces)
        assert (ready(rig.port), ready(rig.relay.admin_port)) == (200, 200)
        told = time.monotonic()
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: ready(rig.relay.admin_port) == 503, "not ready")
        served = 0
        while time.monotonic() < told + 3:
            assert (ready(rig.port), ready(rig.relay.admin_port)) == (503, 503), "in every worker"
            response = request(rig.port, "POST", "/v1" + path)
            assert response.header("Connection") == b"close"
            assert whole(response) == "whole"
            served += 1
        report = request(rig.relay.admin_port, "GET", "/health")
        assert (report.status, json.loads(report.finish().data)["status"]) == (503, "draining")
        assert served > 10
        assert rig.relay.wait(15) == 0
        assert time.monotonic() - told > 4, "it did not wait"
        assert "Not ready any more" in rig.relay.log()


def test_what_begins_in_the_lame_duck_time_has_all_of_the_drain() -> None:
    with relay(lame_duck="2", drain="3", heartbeat="0", hold="0") as rig:
        path = rig.upstream.by_hand()
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: ready(rig.relay.admin_port) == 503, "not ready")
        connection = rig.ask(path)
        ex = rig.upstream.next(path)
        ex.head(headers=EVENTS)
        eventually(lambda: not accepts(rig.port), "the drain has begun")
        for event in PIECES:
            ex.send(event)
        ex.end()
        assert whole(connection.read_head()) == "whole"
        assert rig.relay.wait(15) == 0


def test_a_unix_socket_is_there_for_the_lame_duck_time(tmp_path: Path) -> None:
    """gunicorn's master removes it when it begins to stop."""
    path = tmp_path / "relay.sock"
    with relay(lame_duck="3", admin_bind=f"unix:{path}") as rig:
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: ready(rig.port) == 503, "not ready")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert rig.relay.wait(15) == 0
        assert not path.exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_whoever_signals_twice_does_not_wait(second: signal.Signals) -> None:
    with relay(lame_duck="100", drain="0") as rig:
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: ready(rig.relay.admin_port) == 503, "not ready")
        rig.relay.send_signal(second)
        assert rig.relay.wait(15) == 0


def test_a_worker_that_dies_meanwhile_is_replaced_by_one_that_is_not_ready() -> None:
    with relay(lame_duck="100", drain="0") as rig:
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: ready(rig.relay.admin_port) == 503, "not ready")
        killed = rig.relay.kill_worker()
        eventually(lambda: rig.relay.workers() not in ([], [killed]), "another worker")
        eventually(lambda: accepts(rig.port) and ready(rig.port) == 503, "it serves, and is not ready")
        rig.relay.send_signal(signal.SIGTERM)
        assert rig.relay.wait(15) == 0


def test_a_reload_has_no_lame_duck_time() -> None:
    """New workers are there at once, so no balancer needs to know."""
    with relay(lame_duck="100", drain="1") as rig:
        (worker,) = rig.relay.workers()
        rig.relay.reload()
        eventually(lambda: worker not in rig.relay.workers(), "the old worker ended", 15)
        assert ready(rig.port) == 200
        rig.relay.send_signal(signal.SIGINT)
        assert rig.relay.wait(15) == 0


def test_a_worker_that_is_signalled_as_it_is_made_tells_nobody_to_leave() -> None:
    """A worker has its master's handlers until it has its own."""
    with relay(lame_duck="100", drain="0") as rig:
        for _ in range(3):
            rig.relay.kill_worker()
            known: set[int] = set()
            eventually(lambda known=known: bool(known.update(rig.relay.workers()) or known), "a worker", every=0)
            for pid in known:
                os.kill(pid, signal.SIGTERM)
            eventually(lambda: accepts(rig.port) and bool(rig.relay.workers()), "another worker")
        eventually(lambda: ready(rig.port) == 200, "ready")
        rig.relay.send_signal(signal.SIGINT)
        assert rig.relay.wait(15) == 0


def test_one_of_two_masters_leaves_without_a_lame_duck_time(tmp_path: Path) -> None:
    """After SIGUSR2 the other accepts from the same addresses. It is the script that can be started anew, not the
    module (`python -m gunicorn`)."""
    service = servers.Gunicorn(servers.free_port(), servers.free_port(), tmp_path)
    settings = {
        "RELAY_BIND": f"127.0.0.1:{service.port}",
        "RELAY_ADMIN_BIND": f"127.0.0.1:{service.admin_port}",
        "RELAY_LAME_DUCK": "100",
        "RELAY_DRAIN": "0",
        "PYTHONPATH": str(REPO),
    }
    command = [str(Path(sys.executable).with_name("gunicorn")), "-c", str(REPO / "gunicorn.conf.py"), "wsgi:app"]
    service.launch(command, servers.environment(settings), tmp_path)
    try:
        service.wait_log("Booting worker")
        old = service.workers()
        service.send_signal(signal.SIGUSR2)
        eventually(lambda: service.log().count("Booting worker") == 2, "the new master has a worker")
        service.send_signal(signal.SIGTERM)
        assert service.wait(15) == 0
        assert not any(exists(worker) for worker in old)
        eventually(lambda: accepts(service.port) and ready(service.port) == 200, "the new one is ready")
    finally:
        service.end()  # the new one too


def test_a_service_that_is_about_to_stop_does_not_reload() -> None:
    with relay(lame_duck="3", drain="0") as rig:
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: ready(rig.relay.admin_port) == 503, "not ready")
        rig.relay.reload()
        rig.relay.wait_log("Not reloaded: the service is about to stop")
        assert rig.relay.wait(15) == 0


# --- POST /drain ----------------------------------------------------------------------------------------------------


def test_a_drain_that_is_asked_for_makes_all_workers_not_ready_until_it_is_taken_back() -> None:
    with relay(workers="2") as rig:
        path = rig.upstream.serve(pieces)
        assert drain(rig) == (200, {"status": "draining"})
        for _ in range(20):
            assert (ready(rig.port), ready(rig.relay.admin_port)) == (503, 503), "whichever worker is asked"
        assert whole(request(rig.port, "POST", "/v1" + path)) == "whole"

        def says_close() -> bool:
            return request(rig.port, "POST", "/v1" + path).header("Connection") == b"close"

        eventually(says_close, "connections are closed")
        assert drain(rig, "DELETE") == (200, {"status": "ok"})
        assert drain(rig, "DELETE") == (200, {"status": "ok"}), "there was nothing to take back"
        for _ in range(20):
            assert (ready(rig.port), ready(rig.relay.admin_port)) == (200, 200)
        eventually(lambda: not says_close(), "connections are kept again")


def test_the_time_since_a_drain_was_asked_for_counts_as_lame_duck_time() -> None:
    with relay(lame_duck="1", drain="0") as rig:
        drain(rig)
        asked = time.monotonic()
        eventually(lambda: time.monotonic() > asked + 1.5, "the time is over")
        connection = kept(rig.relay.admin_port)
        rig.relay.send_signal(signal.SIGTERM)
        eventually(lambda: not accepts(rig.port), "stopped", 15)
        assert rig.relay.wait(15) == 0
        connection.close()


def test_the_file_does_as_much_and_is_no_word_to_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(0o700)
    with running_in(folder) as (_, first):
        assert ready(first.port) == 200
        (folder / "drain").touch()
        assert ready(first.port) == 503
        first.send_signal(signal.SIGTERM)
        assert first.wait(15) == 0
        assert (folder / "drain").exists()
        with running_in(folder) as (_, second):
            assert ready(second.port) == 200


def test_asking_again_does_not_start_the_time_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with running_in(folder) as (_, server):
        assert request(server.admin_port, "POST", "/drain").status == 200
        os.utime(folder / "drain", (1, 1))
        assert request(server.admin_port, "POST", "/drain").status == 200
        assert (folder / "drain").stat().st_mtime == 1


def test_a_file_that_cannot_be_removed_is_told_and_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "drain").mkdir(parents=True)
    folder.chmod(0o700)
    with running_in(folder) as (_, server):
        assert ready(server.port) == 200
        assert "A drain cannot be asked for" in server.log()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "rebound.example"}, 403),
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_no_page_of_another_site_can_drain(quiet: Rig, method: str, headers: dict[str, str], status: int) -> None:
    assert drain(quiet, method, headers)[0] == status
    assert ready(quiet.port) == 200


def test_drain_is_on_the_admin_address_only(quiet: Rig) -> None:
    told, answer = drain(quiet, port=quiet.port)
    assert (told, answer["error"]["code"]) == (404, "not_found")
    for method in ("GET", "PUT", "HEAD"):
        assert request(quiet.relay.admin_port, method, "/drain").status == 404
    assert ready(quiet.port) == 200


def test_where_the_workers_share_no_folder_it_says_so(tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    with running_in(missing) as (_, server):
        shutil.rmtree(missing)
        response = request(server.admin_port, "POST", "/drain")
        assert response.status == 500
        assert "SIGTERM" in json.loads(response.finish().data)["error"]["message"]


def test_a_folder_that_cannot_be_used_costs_no_answer(tmp_path: Path) -> None:
    """One whose name others may use, such as the temporary folder itself."""
    tmp_path.chmod(0o755)
    with running_in(tmp_path) as (upstream, server):
        assert whole(request(server.port, "POST", "/v1" + upstream.serve(pieces))) == "whole"
        assert "must be a folder that belongs to this user alone" in server.log()


@pytest.fixture(scope="module")
def quiet() -> Any:
    with relay() as rig:
        yield rig


# --- What a drain still takes ---------------------------------------------------------------------------------------


def test_what_comes_late_in_a_drain_is_refused_before_it_goes_upstream() -> None:
    with relay(drain="6", heartbeat="0", hold="0") as rig:
        path, idle = rig.upstream.serve(pieces), rig.upstream.serve(silent)
        streams = rig.ask(idle).read_head()  # keeps the worker from ending
        streams.read_until(b"data: 1\n\n")
        connections = [kept(rig.port) for _ in range(2)]
        admin = kept(rig.relay.admin_port)
        rig.relay.send_signal(signal.SIGTERM)
        told = time.monotonic()
        until_not_ready(admin)

        early = connections[0].request("POST", "/v1" + path)
        assert early.header("Connection") == b"close"
        assert whole(early) == "whole", "there is time for it"
        eventually(lambda: time.monotonic() > told + 3.2, "the second half")
        before = len(rig.upstream.seen(path))
        late = connections[1].request("POST", "/v1" + path)
        assert (late.status, late.header("x-should-retry"), late.header("Connection")) == (503, None, b"close")
        assert late.header("Retry-After") in (b"1", b"2")
        error = json.loads(late.finish().data)["error"]
        assert error["code"] == "drained"
        assert len(rig.upstream.seen(path)) == before, "it was not sent upstream"
        assert rig.relay.wait(15) == 0


def test_an_answer_that_begins_in_a_drain_says_that_its_connection_closes() -> None:
    with relay(drain="10", heartbeat="0", hold="0") as rig:
        path = rig.upstream.by_hand()
        connection = rig.ask(path)
        ex = rig.upstream.next(path)
        admin = kept(rig.relay.admin_port)
        rig.relay.send_signal(signal.SIGTERM)
        until_not_ready(admin)
        time.sleep(1)  # what has just begun is answered as it was then
        ex.reply(b"{}", 200, "OK", [("Content-Type", "application/json")])
        response = connection.read_head()
        assert (response.status, response.header("Connection")) == (200, b"close")
        assert response.finish().ended == "clean"
        assert rig.relay.wait(15) == 0


def test_a_connection_whose_answer_did_not_say_so_is_not_closed_under_its_next_request() -> None:
    """The client may have sent it just then."""
    with relay(drain="10", heartbeat="0", hold="0") as rig:
        path, short = rig.upstream.by_hand(), rig.upstream.serve(pieces)
        connection = rig.ask(path)
        ex = rig.upstream.next(path)
        ex.head(headers=EVENTS)
        ex.send(PIECES[0])
        response = connection.read_head()
        assert response.header("Connection") != b"close"
        admin = kept(rig.relay.admin_port)
        rig.relay.send_signal(signal.SIGTERM)
        until_not_ready(admin)
        for event in PIECES[1:]:
            ex.send(event)
        ex.end()
        assert whole(response) == "whole"
        following = connection.request("POST", "/v1" + short)
        assert following.header("Connection") == b"close"
        assert whole(following) == "whole"
        assert rig.relay.wait(15) == 0


def test_the_cuts_are_spread_over_the_last_third() -> None:
    with relay(drain="6", heartbeat="0", hold="0") as rig:
        path = rig.upstream.serve(silent)
        streams = [rig.ask(path).read_head() for _ in range(30)]
        for response in streams:
            response.read_until(b"data: 1\n\n")
        rig.relay.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with ThreadPoolExecutor(len(streams)) as pool:
            ends = sorted(at - began for at in pool.map(_ended, streams))
        assert ends[0] > 3.5, "none before the last third"
        assert ends[-1] - ends[0] > 1.0, ends
        assert max(after - before for before, after in itertools.pairwise(ends)) < 1.0, "no herd"
        assert rig.relay.wait(15) == 0


def _ended(response: Response) -> float:
    body = response.finish()
    assert (frame(body.data)["code"], body.ended) == ("drained", "cut")
    return time.monotonic()


def test_who_waits_for_a_slot_until_late_in_a_drain_is_not_sent() -> None:
    """The cuts give slots free."""
    with relay(drain="6", heartbeat="0", hold="0", max_streams="3", queue="30") as rig:
        path = rig.upstream.serve(silent)
        streams = [rig.ask(path).read_head() for _ in range(3)]
        for response in streams:
            response.read_until(b"data: 1\n\n")
        waiting = rig.ask(rig.upstream.serve(pieces, "/waiting"))
        eventually(lambda: accepts(rig.port), "it is in the queue")
        rig.relay.send_signal(signal.SIGTERM)
        response = waiting.read_head()
        assert response.status == 503
        assert json.loads(response.finish().data)["error"]["code"] in ("drained", "full")
        assert not rig.upstream.seen("/waiting")
        assert rig.relay.wait(15) == 0


def test_an_upload_that_ends_late_in_a_drain_is_not_sent() -> None:
    with relay(drain="6", heartbeat="0", hold="0") as rig:
        path = rig.upstream.serve(mute)
        connection = Connection(rig.port)
        connection.raw(f"POST /v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{".encode())
        eventually(lambda: [each["state"] for each in rig.streams()] == ["uploading"], "it is uploading")
        rig.relay.send_signal(signal.SIGTERM)
        told = time.monotonic()
        eventually(lambda: time.monotonic() > told + 3.2, "the second half")
        connection.raw(b"}")
        response = connection.read_head()
        assert (response.status, response.header("x-should-retry")) == (503, None)
        assert json.loads(response.finish().data)["error"]["code"] == "drained"
        assert not rig.upstream.seen(path)
        assert rig.relay.wait(15) == 0
