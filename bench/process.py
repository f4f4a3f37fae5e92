"""Processes: what the kernel knows of one (CPU, memory, children), and a server started and ended. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Below the range from which the kernel takes outgoing ports, so that no stream can take one that is about to be used.
_PORTS = range(15_000, 32_000)
#: Seconds to start in. LiteLLM imports for ten on a busy machine.
_START = 60.0
_PR_SET_PDEATHSIG = 1


class Broken(Exception):
    """A program did not start, or ended by itself. The text says what it said."""


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def cpu(pids: Sequence[int]) -> float:
    """Seconds of CPU that processes have used, all threads, those that have ended too.

    The scheduler's own sum, in nanoseconds, which clock_getcpuclockid(3) gives for a process; utime and stime of
    /proc/PID/stat are the same in steps of 10 ms. Raises OSError if one has ended.
    """
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def pss_kib(pids: Sequence[int]) -> float:
    """Memory of processes, of pages that several have only the share (proportional set size)."""
    total = 0.0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += float(line.split()[1])
    return total


def machine_busy() -> float:
    """Seconds of CPU that the machine has used, whoever it was."""
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody listens on now."""
    for _ in range(200):
        port = random.choice(_PORTS)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise Broken("no free port")


def _end_with_parent() -> None:
    # A benchmark that is killed leaves nothing behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Server:
    """A program that listens. `port` is where; it speaks HTTP."""

    def __init__(
        self,
        name: str,
        port: int,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        *,
        quick: signal.Signals,
    ) -> None:
        """`folder` is its own: its log goes there, and it is its working directory. `quick` is the signal that ends it
        without waiting for anything."""
        self.name = name
        self.port = port
        self._quick = quick
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - there are no threads here
            )

    def wait(self) -> None:
        """Wait until it answers. Raises Broken."""
        give_up = time.monotonic() + _START
        while True:
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise Broken(f"{self.name} did not start; it said: {self.said()}")
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
            try:
                connection.request("GET", "/v1/models")
                connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
            else:
                return
            finally:
                connection.close()

    def pids(self) -> list[int]:
        """Its processes. Raises Broken if it has ended."""
        if self._process.poll() is not None:
            raise Broken(f"{self.name} has ended; it said: {self.said()}")
        return tree(self._process.pid)

    def end(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(self._quick)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-2000:].strip() or "nothing"
