"""Who is measured: how each is started, and what it needs. Each has one worker, as the relay has here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers import litellm, nginx
from bench.process import Server, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REPO = Path(__file__).resolve().parent.parent.parent
#: A shell that has its own settings for the relay, or a proxy, must not change what is measured.
_FOREIGN = ("RELAY_", "GUNICORN_", "UVICORN_", "LITELLM_", "WEB_CONCURRENCY", "PORT")


@dataclass(frozen=True)
class Task:
    """What a peer is started for."""

    port: int  # where to listen
    upstream_port: int
    ca: Path | None  # the upstream's certificate authority, if it is to be reached over HTTPS
    folder: Path  # for its files
    streams: int  # how many it must be able to have open; 0: what it has by default is enough
    root: Path  # the checkout whose code it runs, where it is ours
    settings: Mapping[str, str]  # over those that it has here

    @property
    def url(self) -> str:
        return f"{'https' if self.ca else 'http'}://127.0.0.1:{self.upstream_port}"


@dataclass(frozen=True)
class Peer:
    name: str
    label: str
    packages: tuple[str, ...]  # of Python, whose versions are noted
    command: Callable[[Task], tuple[list[str], dict[str, str]]]  # and its environment
    program: str = ""
    modules: tuple[str, ...] = ()  # what must be importable
    quick: signal.Signals = signal.SIGTERM  # ends it at once
    root: Path = REPO
    settings: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str:
        """Why it cannot be measured here; empty: it can."""
        if self.program and find_program(self.program) is None:
            return f"{self.program} is not installed"
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed: pip install -r requirements-bench.txt brings it"
        return ""

    def version(self) -> str:
        if self.name == "nginx":
            said = subprocess.run(
                [find_program("nginx") or "", "-v"], capture_output=True, text=True, check=False
            ).stderr
            return said.strip().rpartition(" ")[2]
        found = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
        return ", ".join(f"{package} {found[package]}" for package in self.packages if package in found)

    def start(self, upstream_port: int, folder: Path, *, ca: Path | None = None, streams: int = 0) -> Server:
        """Start it in front of the upstream. It is up once `wait` of the server has returned."""
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # the workers of an nginx that root starts are somebody else
        task = Task(free_port(), upstream_port, ca, folder, streams, self.root, self.settings)
        command, settings = self.command(task)
        env = {name: value for name, value in os.environ.items() if not _foreign(name)}
        # requests, httpx and LiteLLM read the first two.
        trust = {"REQUESTS_CA_BUNDLE": str(ca), "SSL_CERT_FILE": str(ca)} if ca else {}
        env |= trust | {"PYTHONPATH": str(self.root), "BENCH_UPSTREAM": task.url} | settings
        return Server(self.name, task.port, command, env, folder, quick=self.quick)


def find_program(name: str) -> str | None:
    """On the PATH, where root's programs are, or beside this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"])
    return shutil.which(name, path=path)


def _foreign(name: str) -> bool:
    return name.upper().startswith(_FOREIGN) or name.lower().endswith("_proxy")


def _nginx(task: Task) -> tuple[list[str], dict[str, str]]:
    config = task.folder / "nginx.conf"
    config.write_text(nginx.config(task.port, task.upstream_port, task.ca, root=os.geteuid() == 0))
    return [find_program("nginx") or "nginx", "-p", f"{task.folder}/", "-c", str(config), "-e", "stderr"], {}


def _relay(task: Task) -> tuple[list[str], dict[str, str]]:
    settings = {
        "RELAY_UPSTREAM_URL": f"{task.url}/v1",
        "RELAY_BIND": f"127.0.0.1:{task.port}",
        "RELAY_ADMIN_BIND": f"127.0.0.1:{free_port()}",
        "WEB_CONCURRENCY": "1",
    }
    if task.ca:
        settings["RELAY_UPSTREAM_CA"] = str(task.ca)
    if task.streams:
        settings["RELAY_MAX_STREAMS"] = str(task.streams)
    command = [sys.executable, "-m", "gunicorn", "-c", str(task.root / "gunicorn.conf.py"), "wsgi:app"]
    return command, {**settings, **task.settings}


def _aiohttp(task: Task) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "bench.peers.lean_aiohttp", str(task.port)], {}


def _flask(task: Task) -> tuple[list[str], dict[str, str]]:
    options = "-k gevent -w 1 --worker-connections 10000 --backlog 4096 --no-control-socket".split()
    bind = ["--bind", f"127.0.0.1:{task.port}"]
    return [sys.executable, "-m", "gunicorn", *options, *bind, "bench.peers.usual_flask:app"], {}


def _fastapi(task: Task) -> tuple[list[str], dict[str, str]]:
    options = f"--port {task.port} --workers 1 --backlog 4096 --no-access-log --log-level warning".split()
    return [sys.executable, "-m", "uvicorn", "bench.peers.usual_fastapi:app", *options], {}


def _litellm(task: Task) -> tuple[list[str], dict[str, str]]:
    config = task.folder / "config.yaml"
    config.write_text(litellm.config(task.url))
    options = f"--host 127.0.0.1 --port {task.port} --num_workers 1".split()
    return [find_program("litellm") or "litellm", "--config", str(config), *options], litellm.ENVIRONMENT


PEERS = (
    Peer("nginx", "nginx", (), _nginx, program="nginx"),
    Peer("relay", "relay", ("gunicorn", "gevent", "flask", "requests", "urllib3"), _relay, quick=signal.SIGQUIT),
    Peer(
        "aiohttp", "lean aiohttp", ("aiohttp", "uvloop"), _aiohttp, modules=("aiohttp",),
    ),
    Peer("flask", "usual Flask", ("gunicorn", "gevent", "flask", "requests"), _flask, quick=signal.SIGQUIT),
    Peer(
        "fastapi", "usual FastAPI", ("fastapi", "uvicorn", "httpx", "sse-starlette", "uvloop"), _fastapi,
        modules=("fastapi", "uvicorn", "httpx", "sse_starlette"),
        quick=signal.SIGKILL,  # SIGTERM waits for connections
    ),
    Peer("litellm", "LiteLLM", ("litellm",), _litellm, program="litellm"),
)  # fmt: skip
