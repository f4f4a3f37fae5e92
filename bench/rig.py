"""The upstream and the client, each in a process of its own, and a certificate for the upstream. Loopback only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import certifi

from bench import process
from bench.peers import REPO

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from bench.work import Plan

_OPENSSL = (
    (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=bench-ca"
        " -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign"
        " -keyout ca.key -out ca.pem"
    ),
    "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout key.pem -out leaf.csr",
    "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile leaf.ext -out leaf.pem",
)
_EXTENSIONS = "subjectAltName=DNS:localhost,IP:127.0.0.1\nauthorityKeyIdentifier=keyid\nextendedKeyUsage=serverAuth\n"


class Rig:
    """Runs jobs, one at a time. A context manager, at whose end both processes are gone."""

    def __init__(self, folder: Path) -> None:
        """`folder`: an empty one, for the certificate."""
        self.ca = _certificate(folder)
        files = [str(folder / "leaf.pem"), str(folder / "key.pem")] if self.ca else []
        self._upstream = _start("bench.upstream", *files)
        self._client = _start("bench.client")
        ports = json.loads(_line(self._upstream))
        self.port: int = ports["port"]
        self.tls_port: int = ports["tls_port"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for started in (self._client, self._upstream):
            started.kill()
            started.communicate()

    def run(
        self,
        port: int,
        pids: list[int],
        plans: Iterable[Plan],
        steps: list[dict[str, Any]],
        times: Iterable[int] = (0,),
    ) -> dict[str, Any]:
        """Have the client take the steps (bench.client) at a port. `pids`: whose CPU and memory is measured.

        Raises Broken if that was not possible to the end.
        """
        job = {
            "port": port, "control": self.port, "plans": [asdict(plan) for plan in plans], "times": list(times),
            "pids": {"peer": pids, "upstream": [self._upstream.pid]}, "steps": steps,
        }  # fmt: skip
        assert self._client.stdin is not None
        self._client.stdin.write(json.dumps(job).encode() + b"\n")
        self._client.stdin.flush()
        result: dict[str, Any] = json.loads(_line(self._client))
        if "error" in result:
            raise process.Broken(result["error"])
        return result


def _start(module: str, *args: str) -> subprocess.Popen[bytes]:
    # Both end by themselves when their standard input does, so also when this process is killed.
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which then ends them
    )


def _line(started: subprocess.Popen[bytes]) -> bytes:
    assert started.stdout is not None
    line = started.stdout.readline()
    if not line:
        raise SystemExit("bench: the load generator has ended; what it said stands above")
    return line


def _certificate(folder: Path) -> Path | None:
    """Make an authority and a certificate of it, elliptic ones as most APIs have; gives the file of whom to trust."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    (folder / "leaf.ext").write_text(_EXTENSIONS)
    for command in _OPENSSL:
        subprocess.run([openssl, *command.split()], cwd=folder, check=True, capture_output=True)
    # As long as the list that everybody has: some relays read all of it for each connection.
    trusted = folder / "trusted.pem"
    trusted.write_bytes(Path(certifi.where()).read_bytes() + (folder / "ca.pem").read_bytes())
    return trusted
