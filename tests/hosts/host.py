"""Hosts: network namespaces with a cable each to one switch, and scripts that run on them.

Between hosts there is no ARP, as between hosts with routers between them: one that is powered off answers nothing, and
nobody else says that it is gone. All names carry this process' id, so that several labs can run side by side.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import DEADLINE, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_HERE = Path(__file__).parent
_NET = "10.77.0."
_NUMBERS = {
    "edge": 2, "client": 3, "relay1": 11, "relay2": 12, "relay3": 13, "upstream1": 31, "upstream2": 32, "redis": 40,
}  # fmt: skip
#: The names of all hosts.
NAMES = tuple(_NUMBERS)
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def missing() -> str | None:
    """Why there can be no lab here."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (apt-get install iproute2)"
    space = f"rl{os.getpid()}-try"
    try:
        ip("netns", "add", space)
        ip("netns", "exec", space, "true")
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespace can be made here: {getattr(error, 'stderr', error)}"
    finally:
        remove(space)
    return None


def ip(*args: str, given: str = "") -> None:
    subprocess.run(["ip", *args], input=given, text=True, check=True, capture_output=True, timeout=DEADLINE)


def address(name: str) -> str:
    """The address of the host of this name."""
    return f"{_NET}{_NUMBERS[name]}"


def build_switch() -> str:
    """Make the namespace that has the bridge; returns its name."""
    switch = f"rl{os.getpid()}-switch"
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "br0", "type", "bridge")
    ip("-n", switch, "link", "set", "br0", "up")
    return switch


def remove(space: str) -> None:
    """Delete a namespace. Nothing may run in it any more."""
    subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True, timeout=DEADLINE)


class Host:
    """A network namespace with a cable to the switch."""

    def __init__(self, name: str, switch: str) -> None:
        self.name = name
        self.address = address(name)
        self.space = f"rl{os.getpid()}-{name}"
        self._switch = switch

    def build(self, hosts: Mapping[str, str]) -> None:
        """`hosts`: what its /etc/hosts has besides localhost, name by address."""
        names = Path("/etc/netns", self.space)  # ip-netns(8) binds what is there over /etc
        names.mkdir(parents=True)
        (names / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in hosts.items()))
        ip("netns", "add", self.space)
        ip("-n", self._switch, "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        ip("-n", self._switch, "link", "set", self.name, "master", "br0", "up")
        lines = [f"link set eth0 address {_mac(self.name)}", f"addr add {self.address}/24 dev eth0"]
        lines += ["link set lo up", "link set eth0 up"]
        others = [name for name in NAMES if name != self.name]
        lines += [f"neigh replace {address(name)} lladdr {_mac(name)} dev eth0 nud permanent" for name in others]
        ip("-n", self.space, "-batch", "-", given="\n".join(lines))

    def remove(self) -> None:
        """Delete it. Nothing may run on it any more."""
        remove(self.space)
        shutil.rmtree(Path("/etc/netns", self.space), ignore_errors=True)
        with contextlib.suppress(OSError):  # others may have theirs there
            Path("/etc/netns").rmdir()

    def command(self, *command: str) -> list[str]:
        """The command line that runs this one on the host."""
        return ["ip", "netns", "exec", self.space, *command]

    def run(self, *command: str) -> str:
        """Run it to its end; returns what it printed."""
        done = subprocess.run(self.command(*command), text=True, check=True, capture_output=True, timeout=DEADLINE)
        return done.stdout

    def spawn(self, script: str, *args: str) -> Script:
        """Start a script of this folder."""
        return Script(f"{script} on {self.name}", self.command(sys.executable, str(_HERE / script), *args))

    def sysctl(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            self.run("sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")

    def power_off(self) -> None:
        """From now on its packets are dropped in both directions: nobody gets a reset."""
        ip("-n", self._switch, "link", "set", self.name, "down")

    def power_on(self) -> None:
        ip("-n", self._switch, "link", "set", self.name, "up")

    def connect(self, port: int, within: float = 2.0) -> socket.socket:
        """A connection of this host to a port of its own. Raises OSError."""
        sock = _socket_in(self.space)
        try:
            sock.settimeout(within)
            sock.connect((self.address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def listens(self, port: int) -> bool:
        try:
            self.connect(port).close()
        except OSError:
            return False
        return True

    def connections(self) -> set[tuple[str, str]]:
        """Its own end and the other of each TCP connection, but for those that are over and only wait for a late packet
        (TIME_WAIT)."""
        rows = (line.split() for line in self.run("cat", "/proc/net/tcp").splitlines()[1:])
        return {(row[1], row[2]) for row in rows if row[3] not in ("0A", "06")}  # 0A: it listens

    def ask(
        self, method: str, port: int, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a request that the host sends to itself. Raises OSError or HTTPException."""
        connection = http.client.HTTPConnection(self.address, port)
        try:
            connection.sock = self.connect(port)
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _mac(name: str) -> str:
    return f"02:00:00:00:00:{_NUMBERS[name]:02x}"


def _socket_in(space: str) -> socket.socket:
    """A TCP socket in another network namespace. A thread of its own enters that: setns(2) moves a single thread, and
    a socket stays where it was made."""
    import ctypes

    made: list[socket.socket] = []

    def enter() -> None:
        with Path("/run/netns", space).open("rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) == 0:
                made.append(socket.socket())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if not made:
        raise OSError(f"the namespace {space} cannot be entered")
    return made[0]


class Script:
    """A running script that reports in lines of JSON. It ends when its standard input does."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.reports: list[dict[str, Any]] = []
        self._heard: list[Callable[[dict[str, Any]], None]] = []
        self._telling = threading.Lock()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        eventually(lambda: bool(self.reports), f"{self.name} is ready")
        assert self.reports[0]["event"] == "ready", self.reports

    def hear(self, listener: Callable[[dict[str, Any]], None]) -> None:
        self._heard.append(listener)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._telling:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(DEADLINE)
        self._thread.join(DEADLINE)
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = json.loads(line)
            self.reports.append(report)
            for listener in self._heard:
                listener(report)
