"""What is shipped to run the relay with: deploy/, and the README's table of timeouts, held to each other and to the
code. Where the program that reads a file is not here, what it would run is run without it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import REPO, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream

from relay.observe import metrics
from relay.settings import SETTINGS, Settings

DEPLOY = REPO / "deploy"
DEFAULTS = Settings.from_mapping({}, service=True)
README = (REPO / "README.md").read_text(encoding="utf-8")


def lines(name: str) -> list[str]:
    """A file's lines without comments."""
    return [line for line in (DEPLOY / name).read_text().splitlines() if line and not line.startswith("#")]


def unit(name: str) -> dict[str, list[str]]:
    """A systemd unit's values by name."""
    values: dict[str, list[str]] = {}
    for line in lines(name):
        key, equals, value = line.partition("=")
        if equals:
            values.setdefault(key, []).append(value)
    return values


def kubernetes() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def pod() -> dict[str, Any]:
    found: dict[str, Any] = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    """The Containerfile's instructions of the image that is shipped, by name; ENV as pairs."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines("Containerfile")))
    last = text[text.rindex("\nFROM ") + 1 :]
    found: dict[str, Any] = {}
    for line in last.splitlines():
        name, _, rest = line.partition(" ")
        found[name] = rest
    found["ENV"] = dict(each.split("=", 1) for each in shlex.split(found["ENV"]))
    return found


def environment_of(name: str) -> dict[str, str]:
    return {k: v for k, _, v in (each.partition("=") for each in unit(name)["Environment"])}


def graceful(values: dict[str, str]) -> int:
    """gunicorn's graceful_timeout with these settings, asked of the shipped configuration."""
    code = "from relay import gunicorn_conf; print(gunicorn_conf.graceful_timeout)"
    env = servers.environment({"PYTHONPATH": str(REPO), "RELAY_UPSTREAM_URL": "https://api.example.com", **values})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def seconds(value: str) -> float:
    number, of = re.fullmatch(r"(\d+)(ms|s|m|h)?", value).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, None: 1}[of]


# --- Keepalive


def test_a_host_that_is_powered_off_is_found_out_within_30_seconds() -> None:
    """The file has settings that Linux knows, and only those."""
    lines = (REPO / "deploy/sysctl.conf").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" = ") for line in lines if line and not line.startswith("#")]
    values = {name.removeprefix("net.ipv4.tcp_").removeprefix("keepalive_"): int(value) for name, value in pairs}
    assert sorted(values) == ["intvl", "probes", "retries2", "time"]
    assert all(Path("/proc/sys", *name.split(".")).exists() for name, _ in pairs)
    assert values["time"] + values["intvl"] * values["probes"] < 30
    assert sum(0.2 * 2**n for n in range(values["retries2"] + 1)) < 30  # Linux' TCP_RTO_MIN, doubled each time


# --- Timeouts


def nginx(name: str, *files: str) -> float:
    """A directive's value, the same in all of these files."""
    found = set()
    for file in files:
        text = re.sub(r"#.*", "", (REPO / "nginx" / file).read_text())
        found |= set(re.findall(rf"^\s*{name}\s+(\w+);", text, re.MULTILINE))
    (value,) = found
    return seconds(value)


SERVERS = ("nginx.conf", "nginx-tls.conf")


def shipped(name: str) -> float | None:
    """The value that a cell of the table names; None: it is no file's of ours."""
    if match := re.fullmatch(r"`(RELAY_\w+)`", name):
        return float(getattr(DEFAULTS, match[1].removeprefix("RELAY_").lower()))
    config = kubernetes()["ConfigMap"]["data"]
    stop = pod()["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    known = {
        "nginx `keepalive_timeout`": lambda: nginx("keepalive_timeout", *SERVERS),
        "nginx `send_timeout`": lambda: nginx("send_timeout", *SERVERS),
        "nginx `proxy_read_timeout`": lambda: nginx("proxy_read_timeout", "snippets/relay-stream.conf"),
        "nginx `keepalive_timeout` in the `upstream` block": lambda: nginx(
            "keepalive_timeout", "snippets/relay-upstream.conf"
        ),
        "`RELAY_KEEPALIVE` on Heroku": lambda: seconds(re.search(r"(?m)^RELAY_KEEPALIVE=(\w+)$", README)[1]),
        "`RELAY_KEEPALIVE` in kubernetes.yaml": lambda: seconds(config["RELAY_KEEPALIVE"]),
        "gunicorn `graceful_timeout`": lambda: graceful({}),
        "`RELAY_LAME_DUCK` and gunicorn `graceful_timeout` in relay.service": lambda: (
            float(environment_of("relay.service")["RELAY_LAME_DUCK"]) + graceful(environment_of("relay.service"))
        ),
        "systemd `TimeoutStopSec`": lambda: seconds(unit("relay.service")["TimeoutStopSec"][0]),
        "Kubernetes `terminationGracePeriodSeconds`": lambda: pod()["terminationGracePeriodSeconds"],
        "`preStop`, `RELAY_LAME_DUCK` and gunicorn `graceful_timeout` in kubernetes.yaml": lambda: (
            stop + float(config["RELAY_LAME_DUCK"].removesuffix("s")) + graceful(config)
        ),
        "SDKs' read timeout": _sdks,
    }
    others = ("Cloudflare's ", "an ALB's ", "Heroku's ")  # as they document them
    assert name in known or name.startswith(others), f"the table names {name!r}, which this test cannot look up"
    return float(known[name]()) if name in known else None


def _sdks() -> float:
    import anthropic
    import openai

    (value,) = {openai.DEFAULT_TIMEOUT.read, anthropic.DEFAULT_TIMEOUT.read}
    return float(value)


def timeouts() -> list[tuple[str, str]]:
    text = README.split("### Which timeout must be larger than which\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    return [(row[0], row[1]) for row in rows]


@pytest.mark.parametrize(("larger", "smaller"), timeouts())
def test_what_is_shipped_has_its_timeouts_in_order(larger: str, smaller: str) -> None:
    said = []
    for cell in (larger, smaller):
        name, value = re.fullmatch(r"(.*?), (\d+) s(?: .*|,.*)?", cell).groups()
        actual = shipped(name)
        assert actual in (float(value), None), name
        said.append(float(value))
    assert said[0] > said[1] or ("(or the same)" in smaller and said[0] == said[1])


def test_the_table_of_timeouts_has_every_link_of_the_chain() -> None:
    text = " ".join(" ".join(row) for row in timeouts())
    for name in ("SDKs", "Cloudflare", "Heroku", "ALB", "nginx", "gunicorn", "systemd", "Kubernetes"):
        assert name in text
    for setting in ("HEARTBEAT", "HOLD", "FIRST_BYTE_TIMEOUT", "IDLE_TIMEOUT", "WRITE_TIMEOUT", "KEEPALIVE", "DRAIN"):
        assert f"`RELAY_{setting}`" in text


# --- systemd


def test_the_unit_drains_for_a_minute_and_ends_with_faulty_settings_for_good() -> None:
    service = unit("relay.service")
    assert environment_of("relay.service")["RELAY_DRAIN"] == "60"
    assert service["RestartPreventExitStatus"] == [str(os.EX_CONFIG)]
    assert service["KillMode"] == ["mixed"]
    known = {setting.name for setting in SETTINGS}
    assert {name for name in environment_of("relay.service") if name.startswith("RELAY_")} <= known


def test_the_socket_has_the_addresses_that_the_relay_has() -> None:
    assert unit("relay.socket")["ListenStream"] == [DEFAULTS.bind, DEFAULTS.admin_bind]


# What systemd does with a socket unit: the listeners as descriptors 3 and 4, and where to say READY=1.
ACTIVATE = """
import os, sys
for number, inherited in enumerate(map(int, sys.argv[1:3]), 3):
    os.dup2(inherited, number)
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), "2"
os.execv(sys.argv[3], sys.argv[3:])
"""


def test_the_units_command_serves_on_sockets_that_it_is_handed_and_says_when_it_is_ready(tmp_path: Path) -> None:
    """What it cannot show without systemd is the confinement."""
    command = shlex.split(unit("relay.service")["ExecStart"][0])
    assert Path(command[0]).name == "gunicorn"
    with contextlib.ExitStack() as stack:
        service, admin = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        port, admin_port = service.getsockname()[1], admin.getsockname()[1]
        # Numbers that 3 and 4 cannot overwrite.
        handed = [os.dup2(each.fileno(), number) for each, number in ((service, 101), (admin, 102))]
        env = servers.environment({
            "PYTHONPATH": str(REPO),
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            **environment_of("relay.service"),
            "RELAY_BIND": f"127.0.0.1:{port}",
            "RELAY_ADMIN_BIND": f"127.0.0.1:{admin_port}",
        })  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, *map(str, handed), sys.executable, "-m", "gunicorn", *command[1:]],
            env=env, cwd=tmp_path, pass_fds=handed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            for number in handed:
                os.close(number)
            assert b"READY=1" in notify.recv(4096)
            assert request(port, "GET", "/health/live", deadline=30).status == 200  # its worker may load still
            assert request(port, "GET", "/metrics").status == 404
            assert request(admin_port, "GET", "/metrics").status == 200

            # A restart: who connects meanwhile waits in the kernel, and is not refused.
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            with Connection(port):
                pass
        finally:
            process.kill()
            process.wait()


# --- The container


def test_the_container_is_not_root_and_is_asked_on_its_admin_address() -> None:
    found = container()
    user = int(found["USER"].partition(":")[0])
    assert user >= 1000
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert found["ENV"]["RELAY_DRAIN"] == "60"
    assert json.loads(found["CMD"])[0] == "gunicorn"
    assert found["ENV"]["RELAY_ADMIN_BIND"].rpartition(":")[2] in found["HEALTHCHECK"]
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (REPO / name).exists()
        assert f"!{name}" in ignored


@pytest.fixture
def contained(tmp_path: Path) -> dict[str, Any]:
    """The container's command and environment in an empty folder, with ports of our own."""
    found = container()
    ports = servers.free_port(), servers.free_port()
    env = found["ENV"] | {
        "PYTHONPATH": str(REPO),
        "RELAY_BIND": found["ENV"]["RELAY_BIND"].replace("8000", str(ports[0])),
        "RELAY_ADMIN_BIND": found["ENV"]["RELAY_ADMIN_BIND"].replace("8001", str(ports[1])),
    }
    del env["PATH"]
    return {"env": env, "ports": ports, "command": json.loads(found["CMD"]), "health": found["HEALTHCHECK"]}


def test_the_containers_command_and_health_check_do_what_they_should(contained: dict[str, Any], tmp_path: Path) -> None:
    port, admin_port = contained["ports"]
    health = json.loads(contained["health"][contained["health"].index("CMD") + 4 :].replace(":8001", f":{admin_port}"))
    assert health[0] == "python"
    with Upstream() as upstream:
        env = servers.environment(contained["env"] | {"RELAY_UPSTREAM_URL": upstream.base_url})
        process = subprocess.Popen(
            [sys.executable, "-m", *contained["command"]], env=env, cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

        def healthy() -> bool:
            return subprocess.run([sys.executable, *health[1:]], capture_output=True, check=False).returncode == 0

        try:
            eventually(healthy, "the health check to pass", 30)
            assert request(port, "GET", "/v1/models", {"Host": "localhost"}).status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert not healthy()
        finally:
            process.kill()
            process.wait()


def test_without_an_upstream_the_container_says_what_is_missing(contained: dict[str, Any], tmp_path: Path) -> None:
    env = servers.environment(contained["env"])
    done = subprocess.run(
        [sys.executable, "-m", *contained["command"]], env=env, cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == os.EX_CONFIG
    assert "RELAY_UPSTREAM_URL" in done.stderr


# --- Kubernetes


def test_the_pods_probes_ask_the_admin_port_and_exist() -> None:
    (relay,) = pod()["containers"]
    admin = {each["name"]: each["containerPort"] for each in relay["ports"]}["admin"]
    config = kubernetes()["ConfigMap"]["data"]
    assert config["RELAY_ADMIN_BIND"] == f"0.0.0.0:{admin}"
    with servers.gunicorn({}) as running:
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = relay[name]["httpGet"]
            assert probe["port"] == "admin"
            # The kubelet names the pod's address.
            host = {"Host": f"10.1.2.3:{admin}"}
            assert request(running.admin_port, "GET", probe["path"], host).status == 200


def test_the_pod_has_no_more_than_it_needs() -> None:
    found = pod()
    assert found["enableServiceLinks"] is False
    assert found["automountServiceAccountToken"] is False
    assert found["securityContext"]["runAsNonRoot"] is True
    assert found["securityContext"]["runAsUser"] == int(container()["USER"].partition(":")[0])
    (relay,) = found["containers"]
    context = relay["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"]["drop"] == ["ALL"]
    assert [port["targetPort"] for port in kubernetes()["Service"]["spec"]["ports"]] == ["http"]


def test_the_manifests_settings_are_settings_and_the_labels_meet() -> None:
    found = kubernetes()
    values = found["ConfigMap"]["data"]
    keys = {"RELAY_UPSTREAM_KEY": "x", "RELAY_CLIENT_KEYS": "y"}
    settings = Settings.from_mapping({k: v for k, v in values.items() if k.startswith("RELAY_")} | keys, service=True)
    assert settings.drain == 60
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


# --- Grafana


def queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    variables = [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    return variables + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def exposed() -> dict[str, set[str]]:
    """The names of all series that the relay exposes, and their labels, after a relayed and a refused request."""
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
        request(relay.port, "GET", "/v1/models").finish()
        request(relay.port, "GET", "/nowhere").finish()

        def metrics() -> str:
            found: str = request(relay.admin_port, "GET", "/metrics").finish().data.decode()
            return found

        # What has come whole to its client is counted a moment later.
        eventually(lambda: "relay_streams_ended_total{" in metrics(), "the count of the request that was relayed")
        text = metrics()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def test_every_query_of_the_dashboard_names_a_metric_that_exists_and_every_metric_is_shown() -> None:
    names = {name for query in queries() for name in re.findall(r"\brelay_\w+", query)}
    assert len(queries()) > 15
    allowed = set(metrics.NAMES)
    for name in metrics.NAMES:
        if name.endswith("_seconds"):  # the histograms
            allowed |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
            allowed.discard(name)
    assert names - allowed == set()
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert shown == set(metrics.NAMES)


def test_the_dashboard_asks_for_labels_that_are_there() -> None:
    series = exposed()
    given = {"job", "le"}  # by Prometheus, and by every histogram
    for query in queries():
        for name, labels in re.findall(r"\b(relay_\w+)\{([^}]*)\}", query):
            if name in series:
                assert set(re.findall(r"(\w+)[=!]~?\"", labels)) <= series[name] | given, query
        for by in re.findall(r"by \(([^)]*)\)", query):
            named = re.findall(r"\b(relay_\w+)", query)
            if all(name in series for name in named):
                assert set(re.split(r",\s*", by)) <= set().union(*(series[name] for name in named)) | given, query


def test_every_panel_has_a_place_of_its_own() -> None:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


# --- The checkers


def test_the_checkers_find_nothing() -> None:
    """`make check` runs them too, where the programs are."""
    folder = str(Path(sys.executable).parent)
    done = subprocess.run(
        [REPO / "tools/deploy-check", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fault_is_found(tmp_path: Path) -> None:
    """Whoever runs the checkers must hear of it."""
    (tmp_path / "tools").mkdir()
    shutil.copy(REPO / "tools/deploy-check", tmp_path / "tools")
    for name in ("deploy", "nginx"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("run"))
    (tmp_path / "relay").mkdir()
    manifest = tmp_path / "deploy/kubernetes.yaml"
    manifest.write_text(manifest.read_text().replace("terminationGracePeriodSeconds:", "terminationGraceSeconds:"))
    folder = str(Path(sys.executable).parent)
    done = subprocess.run(
        [tmp_path / "tools/deploy-check", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "terminationGraceSeconds" in done.stderr


def test_what_security_md_names_is_there() -> None:
    text = (REPO / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"test_\w+\.py", text))
    assert len(named) > 10
    assert [name for name in named if not (REPO / "tests" / name).exists()] == []
    settings = set(re.findall(r"\bRELAY_[A-Z_]*[A-Z]\b", text))
    assert settings <= {setting.name for setting in SETTINGS}


def test_pods_are_scaled_on_a_metric_that_there_is_and_below_what_they_hold() -> None:
    found = kubernetes()
    (metric,) = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in metrics.NAMES
    held = 900 * int(found["ConfigMap"]["data"]["WEB_CONCURRENCY"])
    assert held / 2 < int(metric["pods"]["target"]["averageValue"]) < held
    assert found["HorizontalPodAutoscaler"]["spec"]["minReplicas"] == found["Deployment"]["spec"]["replicas"]


def test_the_network_policy_lets_in_to_ports_that_there_are() -> None:
    found = kubernetes()
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    names = [port["name"] for port in container["ports"]]
    assert [rule["ports"][0]["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"]] == names
