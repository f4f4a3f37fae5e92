"""What is shipped for gunicorn and nginx says what the relay needs, and both programs accept it."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi
import pytest
from harness import REPO, eventually, servers
from harness.upstream import Upstream

from relay.service import cpus
from relay.settings import Settings, environment
from relay.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn, Nginx

DEFAULTS = Settings.from_mapping({}, service=True)
CONFIGS = ("gunicorn.conf.py", "python:relay.gunicorn_conf")

# Tells who was reached, and what the worker takes for the environment.
ECHO = """
import json
import os
from relay.settings import environment

def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json")])
    drain = environment.environment().get("RELAY_DRAIN")
    told = {"port": int(environ["SERVER_PORT"]), "target": environ["RAW_URI"], "drain": drain, "pid": os.getpid()}
    told["headers"] = {name: value for name, value in environ.items() if name.startswith("HTTP_")}
    return [json.dumps(told).encode()]
"""

# What gunicorn makes of command line and configuration, without starting anything.
SHOW = """
import json
from gunicorn.app.wsgiapp import WSGIApplication

gunicorn = WSGIApplication()
shown = {name: setting.get() for name, setting in gunicorn.cfg.settings.items()}
print(json.dumps({**shown, "app": gunicorn.app_uri}, default=str))
"""


def show(folder: Path, config: str, env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    path = config if config.startswith("python:") else str(REPO / config)
    return subprocess.run(
        [sys.executable, "-c", SHOW, "-c", path, *args],
        cwd=folder,
        env=servers.environment(env | {"PYTHONPATH": str(REPO)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def shown(folder: Path, config: str = CONFIGS[0], env: dict[str, str] | None = None, *args: str) -> dict[str, Any]:
    done = show(folder, config, env or {}, *args)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    settings: dict[str, Any] = json.loads(done.stdout)
    return settings


def directive(name: str) -> list[str]:
    """The values that a directive has anywhere in the shipped nginx configuration."""
    files = [REPO / "nginx/nginx.conf", *sorted((REPO / "nginx/snippets").glob("*.conf"))]
    text = "\n".join(re.sub(r"#.*", "", file.read_text()) for file in files)
    return [" ".join(value.split()) for value in re.findall(rf"^\s*{name}\s+([^;]*);", text, re.MULTILINE)]


def seconds(value: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", value).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


# --- gunicorn


@pytest.mark.parametrize("config", CONFIGS)
def test_gunicorn_listens_for_the_service_and_for_the_admin(tmp_path: Path, config: str):
    found = shown(tmp_path, config)
    assert found["bind"] == ["127.0.0.1:8000", "127.0.0.1:8001"]
    assert found["worker_class"] == "relay.worker.Worker"
    assert found["app"] == "relay.service.app:create_app()"


def test_the_environment_decides(tmp_path: Path):
    given = {
        "RELAY_UPSTREAM_URL": "http://127.0.0.1:9/v1",
        "PORT": "8123",
        "RELAY_ADMIN_BIND": "127.0.0.1:8124",
        "WEB_CONCURRENCY": "3",
        "RELAY_DRAIN": "60.5",
        "RELAY_KEEPALIVE": "9",
        "RELAY_MAX_STREAMS": "2000",
    }
    found = shown(tmp_path, env=given)
    assert found["bind"] == ["0.0.0.0:8123", "127.0.0.1:8124"]
    assert (found["workers"], found["graceful_timeout"], found["keepalive"]) == (3, 66, 9)
    assert found["worker_connections"] > 2000


def test_a_small_relay_accepts_whom_it_has_no_room_for(tmp_path: Path):
    assert shown(tmp_path, env={"RELAY_MAX_STREAMS": "10"})["worker_connections"] >= 2000


def test_an_empty_admin_address_is_none(tmp_path: Path):
    assert shown(tmp_path, env={"RELAY_ADMIN_BIND": ""})["bind"] == ["127.0.0.1:8000"]


def test_a_dotenv_file_counts_but_less_than_the_environment(tmp_path: Path):
    (tmp_path / ".env").write_text("RELAY_DRAIN=7\nRELAY_KEEPALIVE=8\nWEB_CONCURRENCY=4\n")
    found = shown(tmp_path, env={"RELAY_KEEPALIVE": "3", "WEB_CONCURRENCY": "2"})
    assert (found["graceful_timeout"], found["keepalive"], found["workers"]) == (12, 3, 2)


def test_the_command_line_has_the_last_word(tmp_path: Path):
    found = shown(tmp_path, CONFIGS[0], {}, "--workers", "5", "other:app")
    assert found["workers"] == 5
    assert found["app"] == "other:app"


def test_limits_leave_room_for_what_must_get_in(tmp_path: Path):
    found = shown(tmp_path)
    assert found["limit_request_line"] >= 6 * 1024 + 100
    assert found["limit_request_field_size"] >= 8 * 1024 + 100
    # Those that wait for a slot, and those that are told that there is none.
    assert found["worker_connections"] >= 2 * 900
    assert found["graceful_timeout"] > math.ceil(DEFAULTS.drain)
    assert found["max_requests"] == 0
    assert found["reuse_port"] is False
    assert found["accesslog"] is None
    assert found["control_socket_disable"] is True


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("name", "value"), [("RELAY_DRAIN", "abc"), ("RELAY_HARTBEAT", "5"), ("PORT", "0"), ("RELAY_BIND", "nowhere")]
)
def test_a_faulty_setting_is_named_and_gunicorn_ends(tmp_path: Path, config: str, name: str, value: str):
    done = show(tmp_path, config, {name: value})
    assert done.returncode == os.EX_CONFIG
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_faulty_worker_count_in_dotenv_is_named(tmp_path: Path):
    (tmp_path / ".env").write_text("WEB_CONCURRENCY=many\n")
    env = servers.environment({"PYTHONPATH": str(REPO)})
    del env["WEB_CONCURRENCY"]
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-c", str(REPO / "gunicorn.conf.py"), "wsgi:app"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == os.EX_CONFIG
    assert "WEB_CONCURRENCY = 'many'" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_that_uses_tls_is_imported_before_gevent_has_patched():
    """gevent warns if it comes too late; here that is an error."""
    for code in ("import relay.gunicorn_conf", "import runpy; runpy.run_path('gunicorn.conf.py')"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=REPO,
            env=servers.environment({"PYTHONPATH": str(REPO)}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture
def echo_app(tmp_path: Path) -> Path:
    (tmp_path / "echo_app.py").write_text(ECHO)
    return tmp_path


def get(port: int, target: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest("GET", target)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def told(port: int, target: str = "/", headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(get(port, target, headers)[1])
    return answer


def test_a_reload_begins_with_what_has_changed(echo_app: Path):
    dotenv = echo_app / ".env"
    dotenv.write_text("RELAY_DRAIN=1\n")
    env = {"PYTHONPATH": str(echo_app)}
    with servers.gunicorn(env, "echo_app:app", cwd=echo_app, ready="/") as relay:
        assert told(relay.port)["drain"] == "1"
        dotenv.write_text("RELAY_DRAIN=2\n")
        relay.reload(changed=False)

        def drain() -> str | None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # too slow for the old worker's last second
                return told(relay.port)["drain"]
            return None

        eventually(lambda: drain() == "2", "the new value", 20)
        assert "Not reloaded" not in relay.log()
        assert relay.stop(signal.SIGTERM) == 0


@pytest.fixture(scope="module")
def shipped() -> Iterator[tuple[Gunicorn, Path]]:
    """The service with a worker and a file of keys, a certificate authority and a `.env` that say something."""
    with Upstream(lambda ex: ex.reply(b"ok")) as upstream, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.joinpath("keys").write_text("a-client-key-of-20-c\n")
        place.joinpath("ca.pem").write_text(Path(certifi.where()).read_text())
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_CLIENT_KEYS": f"@{place / 'keys'}",
            "RELAY_UPSTREAM_CA": str(place / "ca.pem"),
            "RELAY_DRAIN": "1",
        }
        with servers.gunicorn(env) as relay:
            yield relay, place


@pytest.mark.parametrize(
    ("dotenv", "words"),
    [
        pytest.param(None, "nothing has changed", id="nothing"),
        pytest.param("RELAY_HARTBEAT=3\n", "RELAY_HARTBEAT", id="a faulty name"),
        pytest.param("RELAY_IDLE_TIMEOUT=soon\n", "RELAY_IDLE_TIMEOUT", id="a faulty value"),
        pytest.param("WEB_CONCURRENCY=many\n", "nothing has changed", id="what the environment says differently"),
        pytest.param(b"\xff\xfe\x00", ".env cannot be read", id="no text"),
    ],
)
def test_a_reload_that_begins_nothing_touches_nothing(
    shipped: tuple[Gunicorn, Path], dotenv: str | bytes | None, words: str
) -> None:
    """gunicorn would drain all workers, and with them all streams."""
    relay, _ = shipped
    file = relay.folder / "cwd" / ".env"
    if dotenv is not None:
        file.write_bytes(dotenv if isinstance(dotenv, bytes) else dotenv.encode())
    workers, said = relay.workers(), relay.log().count("Not reloaded")
    for times in (1, 2):  # the second is seen once the first is done with
        relay.reload(changed=False)
        eventually(lambda times=times: relay.log().count("Not reloaded") == said + times, "a word", 20)
    assert words in relay.log()
    assert relay.workers() == workers
    file.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["RELAY_BIND", "RELAY_ADMIN_BIND"])
def test_an_address_cannot_change_in_a_reload(name: str) -> None:
    """Its listeners would close under the streams. A `.env` that is gone changes addresses, too."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"RELAY_BIND": f"127.0.0.1:{servers.free_port()}"}
        settings["RELAY_ADMIN_BIND"] = f"127.0.0.1:{servers.free_port()}"
        dotenv = Path(folder, ".env")
        said = settings.pop(name)
        dotenv.write_text(f"{name}={said}\n")
        env = servers.environment(settings)
        command = [sys.executable, "-m", "gunicorn", "-c", "python:relay.gunicorn_conf"]
        log = Path(folder, "log")
        with log.open("wb") as out:
            master = subprocess.Popen(
                command, cwd=folder, env=env | {"PYTHONPATH": str(REPO)}, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            eventually(lambda: b"Booting worker" in log.read_bytes(), "a worker", 20)
            dotenv.unlink()
            master.send_signal(signal.SIGHUP)
            eventually(lambda: b"Not reloaded" in log.read_bytes(), "a word", 20)
            assert f"the service listens on {said}" in log.read_text()
            assert "can only change in a restart" in log.read_text()
            assert get(int(said.rpartition(":")[2]), "/health/live")[0].status == 200
        finally:
            master.terminate()
            master.wait(20)


@pytest.mark.parametrize("what", ["keys", "ca.pem"])
def test_a_reload_begins_with_the_files_that_settings_name(shipped: tuple[Gunicorn, Path], what: str) -> None:
    relay, place = shipped
    file = place / what
    file.write_text(file.read_text() + ("another-key-of-20-ch\n" if what == "keys" else "\n"))
    old = relay.workers()
    relay.reload(changed=False)
    eventually(lambda: len(relay.workers()) == 1 and relay.workers() != old, "another worker", 20)


def test_another_version_is_not_mixed_with_the_one_that_runs(tmp_path: Path) -> None:
    """Modules that a reload reads for the first time would be the new ones."""
    shutil.copytree(REPO / "relay", tmp_path / "relay", ignore=shutil.ignore_patterns("__pycache__"))
    version = tmp_path / "relay" / "version.py"
    with servers.gunicorn({"PYTHONPATH": str(tmp_path)}, config="python:relay.gunicorn_conf", cwd=tmp_path) as relay:
        version.write_text(version.read_text().replace(f'"{__version__}"', '"99.0"'))
        workers = relay.workers()
        relay.reload(changed=False)
        relay.wait_log("relay 99.0 is installed", 20)
        assert relay.workers() == workers
        # A worker that is replaced for whatever reason says so.
        relay.kill_worker()
        relay.wait_log("this worker runs", 20)


def test_the_workers_may_open_as_many_files_as_they_need(echo_app: Path):
    env = {"PYTHONPATH": str(echo_app)}
    with servers.gunicorn(env, "echo_app:app", ready="/") as relay:
        limits = Path(f"/proc/{relay.workers()[0]}/limits").read_text()
        soft, hard = map(int, re.search(r"Max open files\s+(\d+)\s+(\d+)", limits).groups())
        assert soft == min(hard, 65536) or soft > 65536


def test_a_header_cannot_move_the_routes_or_choose_the_scheme(echo_app: Path):
    env = {"PYTHONPATH": str(echo_app)}
    with servers.gunicorn(env, "echo_app:app", ready="/") as relay:
        headers = {"SCRIPT_NAME": "/x", "PATH_INFO": "/y", "X-Forwarded-Proto": "https", "X-Forwarded-SSL": "off"}
        answer = told(relay.port, "/z", headers)
        assert answer["target"] == "/z"


# --- CPUs


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, [], id="nothing there"),
        pytest.param({"proc/self/cgroup": "0::/\n"}, [], id="v2 without a quota file"),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, [], id="v2 unlimited"),
        pytest.param({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, [1.5], id="v2"),
        pytest.param(
            {
                "proc/self/cgroup": "0::/system.slice/relay.service\n",
                "sys/fs/cgroup/system.slice/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/system.slice/relay.service/cpu.max": "200000 100000\n",
            },
            [2.0, 4.0],
            id="v2 with parents",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [3.0],
            id="v1 in a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            [],
            id="v1 unlimited",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, [0.5], id="v2 climbing"
        ),
        pytest.param({"proc/self/cgroup": "?\n", "sys/fs/cgroup/cpu.max": "1 0\n"}, [], id="nonsense"),
    ],
)
def test_the_cgroups_quota_is_found(tmp_path: Path, files: dict[str, str], expected: list[float]):
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert list(cpus.quotas(tmp_path)) == expected
    mask = len(os.sched_getaffinity(0))
    assert cpus.allowed(tmp_path) == max(1, min([mask, *map(math.floor, expected)]))


# --- .env


def test_dotenv_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".env").write_text("RELAY_UPSTREAM_KEY=a${HOME}b\nRELAY_CHAT_MODEL='x y'\nRELAY_NOTHING\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELAY_CHAT_MODEL", "z")
    before = dict(os.environ)
    found = environment.read()
    assert found["RELAY_UPSTREAM_KEY"] == "a${HOME}b"
    assert found["RELAY_CHAT_MODEL"] == "z"
    assert "RELAY_NOTHING" not in found
    assert dict(os.environ) == before


def test_a_dotenv_that_is_no_text_is_named(tmp_path: Path):
    (tmp_path / ".env").write_bytes(b"RELAY_DRAIN=\xff\n")
    done = show(tmp_path, CONFIGS[0], {})
    assert done.returncode == os.EX_CONFIG
    assert ".env cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


# --- nginx


def test_nginx_accepts_the_shipped_configuration():
    done = subprocess.run([REPO / "tools/nginx-test"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_nginx_gives_idle_connections_up_before_gunicorn_does():
    in_upstreams = re.findall(r"keepalive_timeout\s+(\w+);", (REPO / "nginx/snippets/relay-upstream.conf").read_text())
    assert len(in_upstreams) == 2
    assert all(0 < seconds(value) < DEFAULTS.keepalive for value in in_upstreams)


def test_nginx_is_more_patient_and_takes_as_much_as_the_relay():
    longest = max(map(seconds, directive("proxy_read_timeout")))
    assert longest > max(DEFAULTS.first_byte_timeout, DEFAULTS.idle_timeout)
    assert directive("client_max_body_size") == [f"{DEFAULTS.max_body // 2**20}m"]
    assert seconds(directive("send_timeout")[0]) >= DEFAULTS.write_timeout


@pytest.fixture(scope="module")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gunicorn, Nginx]]:
    folder = tmp_path_factory.mktemp("echoes")
    (folder / "echo_app.py").write_text(ECHO)
    env = {"PYTHONPATH": str(folder)}
    with (
        servers.gunicorn(env, "echo_app:app", ready="/") as relay,
        servers.nginx(relay.port, relay.admin_port) as proxy,
    ):
        yield relay, proxy


def test_only_health_comes_from_the_admin_address(echoes: tuple[Gunicorn, Nginx]):
    relay, proxy = echoes
    for path in ("/health", "/health/live", "/health/ready"):
        assert told(proxy.port, path)["port"] == relay.admin_port
    for target in (
        "/metrics",
        "/metrics/",
        "/metrics?x",
        "/metrics/x",
        "/streams",
        "/streams/1",
        "/%6detrics",
        "/x/../metrics",
        "/health/../metrics",
        "/health/live/../../streams",
        "/health/%2e%2e/metrics",
    ):
        response, body = get(proxy.port, target)
        assert response.status == 404, target
        assert response.headers["Content-Type"] == "application/json"
        assert json.loads(body)["error"]["code"] == "not_found"
    # Whatever else arrives at the admin address arrives as one of the three paths.
    for target in (
        "//metrics",
        "/metrics/../health",
        "/metrics%3f/../health",
        "/metrics;/../health",
        "/health/",
        "/health/metrics",
        "/Metrics",
        "/metrics%20",
        "/healthmetrics",
        "http://127.0.0.1:8001/metrics%2f",
    ):
        answer = get(proxy.port, target)
        if answer[0].status == 404:
            continue
        reached = json.loads(answer[1])
        assert reached["port"] == relay.port or reached["target"] == "/health", target


@pytest.mark.parametrize(
    "target", ["/v1//a;b/%2F%7e/../c%20d?x=%zz&&y=%2F;#no", "/v1/%E2%82%AC?a=b?c=/d//e", "/a/./b//", "/v1/?%00"]
)
def test_the_target_arrives_as_it_was_sent(echoes: tuple[Gunicorn, Nginx], target: str):
    target = target.split("#", maxsplit=1)[0]
    assert told(echoes[1].port, target)["target"] == target


def test_who_asks_is_what_nginx_saw(echoes: tuple[Gunicorn, Nginx]):
    forged = {
        "X-Forwarded-For": "6.6.6.6",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil",
        "X-Real-IP": "6.6.6.6",
        "Forwarded": "for=6.6.6.6",
        "X-Request-ID": "mine-1",
        "X_Forwarded_For": "6.6.6.6",
    }
    for path in ("/", "/health"):
        headers = told(echoes[1].port, path, forged)["headers"]
        assert headers["HTTP_X_FORWARDED_FOR"] == "127.0.0.1"
        assert headers["HTTP_X_FORWARDED_PROTO"] == "http"
        # The admin address answers to no name of a client's choice.
        assert headers["HTTP_HOST"] == ("localhost" if path == "/health" else f"127.0.0.1:{echoes[1].port}")
        assert headers["HTTP_X_REQUEST_ID"] == "mine-1"
        assert "6.6.6.6" not in str(headers)
        assert "evil" not in str(headers)


def test_large_request_lines_and_headers_pass(echoes: tuple[Gunicorn, Nginx]):
    target = "/v1/x?" + "q" * 6144
    answer = told(echoes[1].port, target, {"X-Large": "h" * 8192})
    assert answer["target"] == target
    assert len(answer["headers"]["HTTP_X_LARGE"]) == 8192


def raw(port: int, request: bytes) -> tuple[int, dict[str, Any]]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(request)
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["X-Request-ID"]
        answer: dict[str, Any] = json.loads(response.read())["error"]
        assert answer["request_id"] == response.headers["X-Request-ID"]
        return response.status, answer


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request", id="no Host"),
        pytest.param(b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_request", id="bad path"),
        pytest.param(b"G=T / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_request", id="bad method"),
        pytest.param(b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method_not_allowed", id="trace"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 33554433\r\n\r\n", 413, "body_too_large", id="body"
        ),
        pytest.param(
            b"GET /?" + b"q" * 17000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "request_line_too_long", id="line"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"h" * 17000 + b"\r\n\r\n", 431, "headers_too_large", id="header"
        ),
        pytest.param(b"GET /.relay-error HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not_found", id="internal"),
    ],
)
def test_what_nginx_refuses_is_json(echoes: tuple[Gunicorn, Nginx], request_: bytes, status: int, code: str):
    found, error = raw(echoes[1].port, request_)
    assert (found, error["code"]) == (status, code)


def test_a_relay_that_is_not_there_may_be_asked_again():
    with servers.nginx(servers.free_port(), servers.free_port()) as proxy:
        response, body = get(proxy.port, "/v1/models")
        assert response.status == 502
        assert response.headers["x-should-retry"] == "true"
        assert json.loads(body)["error"]["code"] == "relay_unreachable"


def test_a_relay_that_hung_up_may_not():
    """The request may have reached the upstream, and be billed."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        servers.nginx(listener.getsockname()[1], servers.free_port()) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        relay, _ = listener.accept()
        relay.recv(65536)
        relay.close()
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == 502
        assert response.headers["x-should-retry"] == "false"
        assert json.loads(response.read())["error"]["code"] == "relay_unreachable"


def test_no_log_of_nginx_has_queries_or_referers():
    secret = "tell-me-a-secret"
    headers = {"Referer": f"http://x/?{secret}", "Authorization": f"Bearer {secret}", "Cookie": secret}
    with servers.nginx(servers.free_port(), servers.free_port()) as proxy:
        for target in ("/chat/stream?prompt=", "/metrics?", "/health?", "/%zz?"):
            get(proxy.port, target + secret, headers)
        raw(proxy.port, b"POST /?%b HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" % secret.encode())
        proxy.wait_log('"status":413')
        log = proxy.log()
        assert secret not in log
        entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert {entry["path"] for entry in entries} >= {"/chat/stream", "/metrics", "/health"}
        assert all(entry["request_id"] for entry in entries)
