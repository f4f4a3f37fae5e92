"""A real redis-server as a context manager, in memory alone and on a port of its own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

from harness import eventually
from harness.servers import _START, Server, _up, environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class Redis(Server):
    """A redis-server. It can be stopped, started again (empty, on the same port), and made to hang."""

    name = "redis"

    def __init__(self, port: int, folder: Path, host: str = "127.0.0.1") -> None:
        super().__init__(port, folder)
        self.host = host

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def begin(self, *more: str) -> None:
        """`more`: options of its own."""
        options = {"port": self.port, "bind": self.host, "save": "", "appendonly": "no", "dir": self.folder}
        command = [_program(), *(text for name, value in options.items() for text in (f"--{name}", str(value))), *more]
        self.launch(command, environment({}), self.folder)

    def start_again(self) -> None:
        self.begin()
        eventually(lambda: _answers(self.port, self.host), "redis answers again")

    def hang(self) -> None:
        """From now on it takes connections and answers nothing."""
        self.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send_signal(signal.SIGCONT)

    def end(self) -> None:
        if self.running():
            self.go_on()
        super().end()


def _program(name: str = "redis-server") -> str:
    program = shutil.which(name)
    if program is None:
        raise AssertionError(f"these tests need {name} (apt-get install redis-server): it is not installed")
    return program


@contextlib.contextmanager
def redis_server(host: str = "127.0.0.1", port: int | None = None, options: Sequence[str] = ()) -> Iterator[Redis]:
    """An empty Redis, up and answering. `host`: its loopback address. `options`: more of the command line."""

    def launch(folder: Path) -> Redis:
        server = Redis(port or free_port(), folder, host)
        server.begin(*options)
        return server

    with _up(launch, lambda port: _answers(port, host), _START) as server:
        yield server


@contextlib.contextmanager
def redis_cluster(masters: int = 3) -> Iterator[list[Redis]]:
    """So many masters, which share the slots."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(masters):
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            nodes.append(stack.enter_context(redis_server(options=options)))
        if masters == 1:
            cli(nodes[0], "CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        else:
            cli(nodes[0], "--cluster", "create", *(f"{node.host}:{node.port}" for node in nodes), "--cluster-yes")
        for node in nodes:
            eventually(lambda node=node: "cluster_state:ok" in cli(node, "CLUSTER", "INFO"), "the cluster is there")  # type: ignore[misc]
        yield nodes


def cli(server: Redis, *words: str) -> str:
    """What redis-cli prints of a command to this server."""
    command = [_program("redis-cli"), "-h", server.host, "-p", str(server.port), *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


class Sentinel(Redis):
    """A Sentinel that takes one word of its own for a master's death."""

    name = "sentinel"

    def watch(self, master: Redis) -> None:
        file = self.folder / "sentinel.conf"
        file.write_text(
            f"port {self.port}\nbind {self.host}\ndir {self.folder}\n"
            f"sentinel monitor mymaster {master.host} {master.port} 1\n"
            "sentinel down-after-milliseconds mymaster 1000\nsentinel failover-timeout mymaster 4000\n"
        )
        self.launch([_program(), str(file), "--sentinel"], environment({}), self.folder)


@contextlib.contextmanager
def redis_sentinel(master: Redis) -> Iterator[Sentinel]:
    """A Sentinel that watches this master under the name mymaster."""

    def launch(folder: Path) -> Sentinel:
        server = Sentinel(free_port(), folder)
        server.watch(master)
        return server

    with _up(launch, lambda port: _answers(port, "127.0.0.1"), _START) as server:
        yield server


def _answers(port: int, host: str) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(7) == b"+PONG\r\n"
    except OSError:
        return False
