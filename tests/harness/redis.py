"""A real redis-server as a context manager, in memory alone and on a port of its own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
from typing import TYPE_CHECKING

from harness import eventually
from harness.servers import _START, Server, _up, environment, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
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


def _program() -> str:
    program = shutil.which("redis-server")
    if program is None:
        raise AssertionError("these tests need redis-server (apt-get install redis-server): it is not installed")
    return program


@contextlib.contextmanager
def redis_server(host: str = "127.0.0.1", port: int | None = None) -> Iterator[Redis]:
    """An empty Redis, up and answering. `host`: its loopback address."""

    def launch(folder: Path) -> Redis:
        server = Redis(port or free_port(), folder, host)
        server.begin()
        return server

    with _up(launch, lambda port: _answers(port, host), _START) as server:
        yield server


def _answers(port: int, host: str) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2) as sock:
            sock.sendall(b"PING\r\n")
            return sock.recv(7) == b"+PONG\r\n"
    except OSError:
        return False
