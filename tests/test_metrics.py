"""What the metrics say: the upstream's state by the latest word of any worker, tokens, refusals; and to whom."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import REPO, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream

from relay.observe import log
from relay.observe.metrics import metrics
from relay.service.app import create_app
from relay.settings import Settings
from relay.upstream.health import Health, Known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn

EVENTS = [("Content-Type", "text/event-stream")]


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A file system in this folder that has no byte left."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


needs_mount = pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="needs root on Linux, to mount")


@pytest.mark.parametrize("disk", [pytest.param("full", marks=needs_mount), "missing"])
def test_metrics_cost_no_answer(disk: str, upstream: Upstream, tmp_path: Path) -> None:
    """A process that writes to mapped memory for which the disk has no room is killed, and so is the next one."""
    folder = tmp_path / "metrics"
    path = upstream.serve(lambda ex: ex.reply(b"data: 1\n\n", headers=EVENTS))
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with full_disk(folder) if disk == "full" else contextlib.nullcontext(), servers.gunicorn(env) as relay:
        workers = relay.workers()
        for _ in range(3):
            assert request(relay.port, "POST", "/v1" + path, body=b"{}").finish().data == b"data: 1\n\n"
        assert request(relay.admin_port, "GET", "/metrics").status == 200
        assert relay.workers() == workers
        assert relay.log().count("has no metrics") == 1


def test_lost_lines_of_the_log_are_counted(upstream: Upstream, tmp_path: Path) -> None:
    """Nobody reads the pipe that standard output is."""
    port, admin = servers.free_port(), servers.free_port()
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    settings = {"RELAY_BIND": f"127.0.0.1:{port}", "RELAY_ADMIN_BIND": f"127.0.0.1:{admin}"}
    env = servers.environment(settings | {"RELAY_UPSTREAM_URL": upstream.base_url})
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    with (tmp_path / "stderr").open("wb") as err:
        master = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-c", "python:relay.gunicorn_conf"],
            cwd=tmp_path,
            env=env | {"PYTHONPATH": str(REPO)},
            stdout=write,
            stderr=err,
        )
    os.close(write)
    try:

        def lost() -> float | None:
            with contextlib.suppress(OSError):
                text = request(admin, "GET", "/metrics").finish().data.decode()
                return float(re.findall(r"^relay_log_lines_lost_total (\S+)$", text, re.MULTILINE)[0])
            return None

        eventually(lambda: lost() == 0, "the series, before a line is lost", 20)
        for _ in range(30):
            assert request(port, "POST", "/v1" + path, body=b"{}").finish().data == b"ok"
        eventually(lambda: (lost() or 0) > 10, "lost lines")
    finally:
        os.close(read)
        master.terminate()
        master.wait(20)


@needs_mount
def test_a_full_shared_memory_does_not_keep_it_from_serving(tmp_path: Path) -> None:
    """It would be where workers share what they know."""
    port, admin = servers.free_port(), servers.free_port()
    env = servers.environment({"RELAY_BIND": f"127.0.0.1:{port}", "RELAY_ADMIN_BIND": f"127.0.0.1:{admin}"})
    fill = "mount -t tmpfs -o size=64k tmpfs /dev/shm && head -c 1M /dev/zero >/dev/shm/filler; exec "
    serve = f"{sys.executable} -m gunicorn -c python:relay.gunicorn_conf"
    log = tmp_path / "log"
    with log.open("wb") as out:
        master = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", fill + serve],
            cwd=tmp_path,
            env=env | {"PYTHONPATH": str(REPO)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:

        def counted() -> bool:
            with contextlib.suppress(OSError):
                return b"relay_open_streams" in request(admin, "GET", "/metrics").finish().data
            return False

        eventually(counted, "metrics, from files on the disk", 20)
        assert "exited" not in log.read_text()
    finally:
        master.terminate()
        master.wait(20)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def relay(upstream: Upstream) -> Iterator[Gunicorn]:
    settings = {"RELAY_UPSTREAM_KEY": "sk-own", "RELAY_ALLOW": "*", "RELAY_MAX_STREAMS": "1", "WEB_CONCURRENCY": "1"}
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **settings}) as running:
        yield running


def exposed(relay: Gunicorn) -> dict[str, float]:
    text = request(relay.admin_port, "GET", "/metrics").finish().data.decode()
    return {name: float(value) for name, value in re.findall(r"^(relay_\S+) (\S+)$", text, re.MULTILINE)}


def is_now(relay: Gunicorn, name: str, value: float) -> None:
    eventually(lambda: exposed(relay).get(name) == value, f"{name} {value}")


def test_the_upstream_is_reachable_until_a_request_finds_nobody_there(relay: Gunicorn, upstream: Upstream) -> None:
    """Without anybody having to ask for the health."""
    answers, hangs_up = upstream.serve(lambda ex: ex.reply(b"{}")), upstream.serve(lambda ex: ex.abort())
    assert request(relay.port, "GET", "/v1" + answers).finish().data == b"{}"
    is_now(relay, 'relay_upstream_reachable{mount="relay"}', 1)
    is_now(relay, 'relay_upstream_key_accepted{mount="relay"}', 1)
    assert request(relay.port, "GET", "/v1" + hangs_up).status == 502
    is_now(relay, 'relay_upstream_reachable{mount="relay"}', 0)
    assert exposed(relay)['relay_upstream_key_accepted{mount="relay"}'] == 1, "it says nothing of the key"
    assert request(relay.port, "GET", "/v1" + answers).finish().data == b"{}"
    is_now(relay, 'relay_upstream_reachable{mount="relay"}', 1)


def test_what_has_not_changed_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker may have said otherwise meanwhile, and of all workers' words the latest counts."""
    told: list[bool] = []
    monkeypatch.setattr(metrics(), "upstream", lambda _mount, reachable, **_: told.append(reachable))
    clock = [1000.0]
    monkeypatch.setattr("relay.upstream.health.time.monotonic", lambda: clock[0])

    def nobody() -> object:
        raise AssertionError("nobody is asked")

    health = Health("relay", Settings.from_mapping({"RELAY_UPSTREAM_URL": "http://127.0.0.1:1"}), nobody)  # type: ignore[arg-type]
    for clock[0] in (1000.0, 1000.1, 1000.9, 1001.5, 1001.6):
        health.answered(200, 0.1)
    assert told == [True, True], "at most once a second"
    health.failed("upstream_error", reachable=False)
    health.answered(200, 0.1)
    assert told == [True, True, False, True]
    assert isinstance(health.known(ask=False), Known)


@pytest.mark.parametrize(
    ("path", "usage", "counts"),
    [
        pytest.param(
            "/chat/completions",
            b'{"usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens": 2}}',
            {"input": 7, "output": 2, "cache_read": 3},
            id="openai-chat",
        ),
        pytest.param(
            "/responses",
            b'{"type": "response.completed", "response": {"usage": {"input_tokens": 7, "output_tokens": 2}}}',
            {"input": 7, "output": 2},
            id="openai-responses",
        ),
        pytest.param(
            "/messages",
            b'{"type": "message_start", "message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 3, '
            b'"cache_creation_input_tokens": 5, "output_tokens": 1}}}\n\n'
            b'data: {"type": "message_delta", "usage": {"output_tokens": 2}}',
            {"input": 7, "output": 2, "cache_read": 3, "cache_write": 5},
            id="anthropic",
        ),
    ],
)
def test_tokens_are_counted_by_kind_for_each_api(
    relay: Gunicorn, upstream: Upstream, path: str, usage: bytes, counts: dict[str, int]
) -> None:
    before = exposed(relay)
    path = upstream.serve(lambda ex: ex.reply(b"data: " + usage + b"\n\n", headers=EVENTS), path)
    request(relay.port, "POST", "/v1" + path, body=b"{}").finish()
    for kind, count in counts.items():
        sample = f'relay_tokens_total{{kind="{kind}",mount="relay"}}'
        is_now(relay, sample, before.get(sample, 0) + count)


def test_a_request_that_finds_no_slot_is_refused_in_metric_and_log_alike(relay: Gunicorn, upstream: Upstream) -> None:
    path = upstream.by_hand()
    with Connection(relay.port) as connection:
        connection.send("GET", "/v1" + path)
        ex = upstream.next(path)
        answer = request(relay.port, "GET", "/v1" + path, [("X-Request-ID", "no-slot")])
        assert (answer.status, json.loads(answer.finish().data)["error"]["code"]) == (503, "full")
        relay.wait_log("no-slot")
        (line,) = (json.loads(line) for line in relay.log().splitlines() if "no-slot" in line)
        assert (line["event"], line["status"], line["reason"]) == ("refused", 503, "full")
        is_now(relay, 'relay_refused_total{reason="full"}', 1)
        ex.reply(b"{}")
        connection.read_head().finish()


def test_a_request_that_is_not_http_is_counted_and_its_id_is_in_the_log(relay: Gunicorn) -> None:
    before = exposed(relay).get('relay_refused_total{reason="bad_request"}', 0)
    with Connection(relay.port) as connection:
        connection.raw(b"GET /v1/a-secret HTTP/9\r\nHost: localhost\r\n\r\n")
        answer = connection.read_head()
        assert answer.status == 400
        error = json.loads(answer.finish().data)["error"]
    relay.wait_log(error["request_id"])
    (line,) = (json.loads(line) for line in relay.log().splitlines() if error["request_id"] in line)
    assert (line["event"], line["client"], line["status"]) == ("refused", "127.0.0.1", 400)
    assert line["reason"] == "bad_request"
    assert "a-secret" not in relay.log()
    is_now(relay, 'relay_refused_total{reason="bad_request"}', before + 1)


def test_metrics_have_a_request_id_as_every_response_does(relay: Gunicorn) -> None:
    answer = request(relay.admin_port, "GET", "/metrics", [("X-Request-ID", "mine")])
    assert answer.header("X-Request-ID") == b"mine"
    answer.finish()


@pytest.mark.parametrize(
    ("bind", "admin"),
    [
        pytest.param("127.0.0.2", "127.0.0.1", id="two-addresses"),
        pytest.param("127.0.0.2", "localhost", id="the-admin-address-by-name"),
        pytest.param("relay.example.com", "127.0.0.1", id="the-services-by-name"),
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/streams"])
def test_of_two_addresses_with_one_port_only_one_has_them(
    monkeypatch: pytest.MonkeyPatch, bind: str, admin: str, path: str
) -> None:
    monkeypatch.setattr(log, "_emit", log._emit)  # the app's goes to standard output
    port = servers.free_port()
    with socket.create_server(("127.0.0.1", port)) as for_admin, socket.create_server(("127.0.0.2", port)) as for_all:
        settings = {"RELAY_UPSTREAM_URL": "http://127.0.0.1:1", "RELAY_ALLOW_ANONYMOUS": "on"}
        binds = {"RELAY_BIND": f"{bind}:{port}", "RELAY_ADMIN_BIND": f"{admin}:{port}"}
        client = create_app({**settings, **binds}).test_client()
        for sock, status in ((for_all, 404), (for_admin, 200)):
            assert client.get(path, environ_overrides={"gunicorn.socket": sock}).status_code == status
