"""A lab of hosts: on namespaces of their own (host.py) an nginx, three relays, a Redis, two upstreams and clients.

The programs are the real ones with the shipped configuration; nothing but addresses is replaced.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import REPO, eventually, servers
from harness.redis import Redis, _program
from harness.servers import Gunicorn, Nginx, Server, _rewrite, environment

from hosts.host import NAMES, Host, Script, address, build_switch, remove
from hosts.streams import KEYS, Load, Row, Stream, ends, slowest, table
from relay.settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Self

_PORT, _ADMIN_PORT, _EDGE_PORT, _REDIS_PORT = 8000, 8001, 8080, 6379
#: For RELAY_LIMITS_URL.
REDIS_URL = f"redis://{address('redis')}:{_REDIS_PORT}/0"

#: Seconds.
WRITE_TIMEOUT, DRAIN, CONNECT_TIMEOUT, LAME_DUCK = 10, 10, 3, 5
_SETTINGS = {
    # Two addresses in /etc/hosts.
    "RELAY_UPSTREAM_URL": f"http://upstream.lab:{_PORT}/v1",
    "RELAY_CLIENT_KEYS": ",".join(KEYS),
    "RELAY_TRUSTED_PROXIES": address("edge"),
    "RELAY_WRITE_TIMEOUT": str(WRITE_TIMEOUT),
    "RELAY_DRAIN": str(DRAIN),
    "RELAY_LAME_DUCK": str(LAME_DUCK),
    "RELAY_CONNECT_TIMEOUT": str(CONNECT_TIMEOUT),
    "RELAY_HEARTBEAT": "2",  # silent streams must notice within the write timeout, too
    "RELAY_UPSTREAM_IDLE": "2",  # so that descriptors are back soon
}
_KNOWN = {setting.name for setting in SETTINGS}

#: What is shipped for the edge's kernel: a vanished relay is noticed after some 25 s.
_SYSCTL = {
    name: int(value)
    for name, value in re.findall(
        r"^net\.ipv4\.(\w+) = (\d+)$", (REPO / "deploy/sysctl.conf").read_text(), re.MULTILINE
    )
}

#: Descriptors that may stay: a probe's connection and the like.
SPARE_FILES = 4


def without_redis(connections: set[tuple[str, str]]) -> set[tuple[str, str]]:
    port = f":{_REDIS_PORT:04X}"
    return {(end, other) for end, other in connections if not end.endswith(port) and not other.endswith(port)}


@dataclass
class Relay:
    """A relay's host and the gunicorn on it."""

    host: Host
    server: Gunicorn
    files: int = 0  # its descriptors at the start

    def health(self) -> dict[str, Any]:
        _, body = self.host.ask("GET", _ADMIN_PORT, "/health")
        told: dict[str, Any] = json.loads(body)
        return told

    def is_idle(self) -> bool:
        """Whether no stream is open."""
        number: int = self.health()["streams"]["open"]
        return number == 0

    def descriptors(self) -> int:
        """Of the master and its workers, but for those to Redis: a worker keeps as many as it has asked at once."""
        pids = (self.server.pid, *self.server.workers())
        connections = self.host.connections()
        to_redis = connections - without_redis(connections)
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids) - len(to_redis)

    def memory(self) -> dict[int, int]:
        """The workers' resident memory in KiB, by process id."""
        found = {}
        for pid in self.server.workers():
            status = Path(f"/proc/{pid}/status").read_text()
            found[pid] = int(re.findall(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)[0])
        return found

    def answers(self) -> bool:
        try:
            return self.host.ask("GET", _ADMIN_PORT, "/health/live")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait_up(self) -> None:
        eventually(self.answers, f"{self.host.name} answers", 30, 0.05)

    def is_as_at_start(self) -> bool:
        """Whether it has no more descriptors than then."""
        self.play_once()
        return self.descriptors() <= self.files + SPARE_FILES

    def play_once(self) -> None:
        """A short request past the edge, after which the pool has let go of connections that are too old."""
        body = json.dumps({"id": f"alone-{time.monotonic_ns()}", "seconds": 0, "every": 1}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[-1]}"}
        status, answer = self.host.ask("POST", _PORT, "/v1/chat/completions", body, headers)
        assert status == 200, answer


class Lab:
    """All hosts and what runs on them: a context manager. `settings`: more of the relays'."""

    def __init__(self, settings: Mapping[str, str] | None = None, *, redis: bool = False) -> None:
        settings = _SETTINGS | dict(settings or {})
        # One that this version does not know yet would keep the relays from starting.
        self._settings = {name: value for name, value in settings.items() if name in _KNOWN}
        self._with_redis = redis
        self._folders = itertools.count()
        self._loads: dict[str, Load] = {}
        self._servers: list[Server] = []
        self._ends = contextlib.ExitStack()
        self.hosts: dict[str, Host] = {}
        self.relays: list[Relay] = []
        self.upstreams: list[Script] = []
        self.clients: Script

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._build_hosts(stack)
            self._start(stack)
            self._ends = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()

    # Building.

    def _build_hosts(self, stack: contextlib.ExitStack) -> None:
        switch = build_switch()
        stack.callback(remove, switch)
        names = {address(name): "upstream.lab" for name in ("upstream1", "upstream2")}
        for name in NAMES:
            host = self.hosts[name] = Host(name, switch)
            stack.callback(host.remove)
            host.build(names)

    def _start(self, stack: contextlib.ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-hosts-", ignore_cleanup_errors=True))
        self._folder = Path(folder)
        self._folder.chmod(0o755)  # the workers of an nginx that root starts are somebody else
        stack.callback(self._end_servers)
        self.clients = self._spawn(stack, "client", "load.py", address("edge"), str(_EDGE_PORT))
        self.clients.hear(self._client_said)
        for name in ("upstream1", "upstream2"):
            self.upstreams.append(self._spawn(stack, name, "upstream.py", self.hosts[name].address, str(_PORT)))
        if self._with_redis:
            self._start_redis()
        for name in ("relay1", "relay2", "relay3"):
            self.relays.append(Relay(self.hosts[name], self._launch_relay(name)))
        self._start_edge()
        for script in (self.clients, *self.upstreams):
            script.wait_ready()
        for relay in self.relays:
            relay.wait_up()
            relay.play_once()
            relay.files = relay.descriptors()

    def _spawn(self, stack: contextlib.ExitStack, name: str, *command: str) -> Script:
        script = self.hosts[name].spawn(*command)
        stack.callback(script.end)
        return script

    def _launch(self, server: Server, name: str, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        server.name = name
        server.launch(self.hosts[name].command(*command), env, cwd)
        self._servers.append(server)
        servers.running.append(server)  # their logs belong to a failed test's report

    def _new_folder(self) -> Path:
        folder = self._folder / str(next(self._folders))
        folder.mkdir()
        return folder

    def _launch_relay(self, name: str) -> Gunicorn:
        address, folder = self.hosts[name].address, self._new_folder()
        settings = {"RELAY_BIND": f"{address}:{_PORT}", "RELAY_ADMIN_BIND": f"{address}:{_ADMIN_PORT}"}
        env = environment(self._settings | settings | {"PYTHONPATH": str(REPO)})
        server = Gunicorn(_PORT, _ADMIN_PORT, folder)
        command = [sys.executable, "-m", "gunicorn", "-c", "python:relay.gunicorn_conf"]
        self._launch(server, name, command, env, folder)
        return server

    def _start_edge(self) -> None:
        host, folder = self.hosts["edge"], self._new_folder()
        prefix = folder / "prefix"
        shutil.copytree(REPO / "nginx", prefix, ignore=shutil.ignore_patterns("run"))
        for name in ("run", "logs"):
            (prefix / name).mkdir()
        relays = [self.hosts[name].address for name in ("relay1", "relay2", "relay3")]
        _rewrite(
            prefix,
            {
                r"listen\s+127\.0\.0\.1:8080\b": f"listen {host.address}:{_EDGE_PORT}",
                r"server\s+127\.0\.0\.1:8000\b([^;]*);": "".join(rf"server {each}:{_PORT}\1;" for each in relays),
                r"server\s+127\.0\.0\.1:8001\b([^;]*);": "".join(rf"server {each}:{_ADMIN_PORT}\1;" for each in relays),
            },
        )
        host.sysctl(_SYSCTL)
        program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
        assert program is not None, "the lab needs nginx (apt-get install nginx): it is not installed"
        command = [program, "-p", f"{prefix}/", "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        self._launch(Nginx(_EDGE_PORT, folder), "edge", command, os.environ, prefix)
        eventually(lambda: host.listens(_EDGE_PORT), "nginx listens")

    def _start_redis(self) -> None:
        host, folder = self.hosts["redis"], self._new_folder()
        command = [_program(), "--bind", host.address, "--protected-mode", "no", "--save", "", "--dir", str(folder)]
        self._launch(Redis(_REDIS_PORT, folder), "redis", command, os.environ, folder)
        eventually(lambda: host.listens(_REDIS_PORT), "redis listens")

    def _end_servers(self) -> None:
        for server in self._servers:
            server.end()
            if server in servers.running:
                servers.running.remove(server)

    # Relays.

    def restart(self, relay: Relay) -> None:
        """Start its gunicorn anew; what was left of the one before is ended."""
        relay.server.end()
        relay.server.check()
        servers.running.remove(relay.server)
        relay.server = self._launch_relay(relay.host.name)
        relay.wait_up()

    # Streams.

    def load(self, name: str) -> Load:
        """A new set of streams, whose ids begin with the name."""
        load = self._loads[name] = Load(name, self._send)
        return load

    def _send(self, asked: Mapping[str, Any]) -> None:
        self.clients.tell(json.dumps(asked))

    def _client_said(self, report: Mapping[str, Any]) -> None:
        if "id" in report:
            self._loads[report["id"].rpartition("-")[0]].heard(report)

    def billed(self) -> Counter[str]:
        """How many times each request was sent to an upstream, by its id."""
        return Counter(each["id"] for each in self.said("billed"))

    def billed_twice(self, load: Load) -> int:
        billed = self.billed()
        return sum(billed[name] > 1 for name in load.streams)

    def through(self, relay: Relay) -> set[str]:
        """The ids of the requests that this relay has sent to an upstream."""
        return {each["id"] for each in self.said("billed") if each["peer"] == relay.host.address}

    def through_upstream(self, number: int) -> set[str]:
        """The ids of the requests that this upstream has got."""
        return {each["id"] for each in list(self.upstreams[number].reports) if each["event"] == "billed"}

    def upstream_ends(self, load: Load) -> dict[str, float]:
        """When the upstream saw the peer of each stream go, by its id."""
        return {
            each["id"]: each["at"] for each in self.said("end") if each["how"] == "gone" and each["id"] in load.streams
        }

    def said(self, event: str) -> list[dict[str, Any]]:
        """The upstreams' reports of this event."""
        return [each for script in self.upstreams for each in list(script.reports) if each["event"] == event]

    def logged(self, host: str) -> Iterator[dict[str, Any]]:
        """All lines of JSON in the logs of what has run on this host."""
        for server in self._servers:
            if server.name == host:
                yield from (json.loads(line) for line in server.log().splitlines() if line.startswith("{"))

    def leases(self) -> list[str]:
        """The keys in Redis under which the relays count open streams."""
        with self.hosts["redis"].connect(_REDIS_PORT) as sock, sock.makefile("rb") as answer:
            sock.sendall(b"KEYS relay:streams:*\r\n")
            return [(answer.readline(), answer.readline().decode())[1] for _ in range(int(answer.readline()[1:]))]

    def half_open(self) -> set[tuple[str, str]]:
        """Connections of any host of which the other end is gone."""
        ends = set().union(*(host.connections() for host in self.hosts.values()))
        return {(end, other) for end, other in ends if (other, end) not in ends}

    def record(self, what: str, streams: Iterable[Stream], since: float = 0.0) -> None:
        """Add a row to the table. `since`: see `slowest`."""
        found = list(streams)
        billed = self.billed()
        twice = sum(billed[each.id] > 1 for each in found)
        table.append(Row(what, ends(found), twice, slowest(found, since)))

    # Afterwards.

    def settle(self, deadline: float = 40.0) -> None:
        """Power everybody on, start what was killed, end all streams, and wait until nothing is left of them."""
        for host in self.hosts.values():
            host.power_on()
        for relay in self.relays:
            if not relay.server.running():
                self.restart(relay)
        for script in self.upstreams:
            script.tell("release")
        for relay in self.relays:
            eventually(relay.is_idle, f"{relay.host.name}: no stream is open", deadline, 0.1)
            eventually(relay.is_as_at_start, f"{relay.host.name}: {relay.files} descriptors", deadline, 0.5)
