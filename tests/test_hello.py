"""What `make run` says before gunicorn does (tools/hello): the addresses and the call are those of this service."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from harness import REPO, servers
from harness.client import request

if TYPE_CHECKING:
    from pathlib import Path


def hello(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Say it with these settings, in a folder that has a .env or not."""
    env = servers.environment({"RELAY_ADMIN_BIND": "", **settings})
    command = [sys.executable, str(REPO / "tools/hello")]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=30, check=False)


def call(said: str) -> list[str]:
    """The curl command in it, as a shell would take it apart."""
    return shlex.split(said[said.index("curl -N") :].replace("\\\n", " "))


def test_the_call_that_it_names_is_answered_by_the_demo(tmp_path: Path) -> None:
    with servers.gunicorn({}) as relay:
        bind = f"127.0.0.1:{servers.free_port()}"
        done = hello(tmp_path, RELAY_BIND=bind)
        assert (done.returncode, done.stderr) == (0, "")
        _, _, url, *_, body = call(done.stdout)
        assert url.startswith(f"http://{bind}/")
        path = url.removeprefix(f"http://{bind}")
        answer = request(relay.port, "POST", path, {"Content-Type": "application/json"}, body.encode())
        assert (answer.status, answer.finish().data[-14:]) == (200, b"data: [DONE]\n\n")


def test_a_dotenv_file_counts(tmp_path: Path) -> None:
    port = servers.free_port()
    (tmp_path / ".env").write_text(
        f"RELAY_BIND=0.0.0.0:{port}\nRELAY_UPSTREAM_URL=https://api.example.com/v1\nRELAY_CLIENT_KEYS=key-of-a-client\n"
    )
    done = hello(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "relays from api.example.com;" in done.stdout
    assert f"http://127.0.0.1:{port}/." in done.stdout  # an address that a browser can go to
    assert "key-of-a-client" not in done.stdout
    _, _, url, *_, body = call(done.stdout)
    assert (url, json.loads(body)) == (f"http://127.0.0.1:{port}/api/stream-chat", {"prompt": "Hello"})
    assert "Authorization: Bearer A-CLIENT-KEY" in call(done.stdout)


@pytest.mark.parametrize("name", ["RELAY_BIND", "RELAY_ADMIN_BIND"])
def test_an_address_that_is_taken_is_told_at_once(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        done = hello(tmp_path, **{name: bind})
    said = f"{bind} is taken by another program: end that, or set {name} to another address\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_a_faulty_setting_is_left_for_gunicorn_to_tell(tmp_path: Path) -> None:
    done = hello(tmp_path, RELAY_HEARTBEAT="often")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
