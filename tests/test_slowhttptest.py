"""slowhttptest, the usual tool for it, holds connections by the thousand at the shipped nginx; others are served.

https://github.com/shekyan/slowhttptest. What own clients do in the same way, and more finely, is in test_fuzz.py.
"""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from harness import REPO, servers
from harness.client import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Service
    from harness.upstream import Upstream

SECONDS = 6  # it reports at the fifth
WAYS = {
    "heads": ["-H"],  # a head that never ends, a header a second
    "bodies": ["-B", "-s", "1000000"],  # a body that never ends, a field a second
}
EVENTS = [("Content-Type", "text/event-stream")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("slowhttptest") is None, reason="slowhttptest is not installed"),
]


@contextlib.contextmanager
def slowly(
    port: int, way: str, connections: int, folder: Path, seconds: int = SECONDS
) -> Iterator[subprocess.Popen[bytes]]:
    """slowhttptest at work on this port for so long; its words go to a file in the folder."""
    command = ["slowhttptest", *WAYS[way], "-u", f"http://127.0.0.1:{port}/v1/slow"]
    command += [
        "-c",
        str(connections),
        "-r",
        str(connections // 2),
        "-i",
        "1",
        "-x",
        "10",
        "-l",
        str(seconds),
        "-p",
        "5",
    ]
    with (folder / way).open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=folder)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def told(folder: Path, way: str, figure: str) -> list[str]:
    """What its reports, one every five seconds, say under this name."""
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", (folder / way).read_text(errors="replace"))
    return re.findall(rf"(?m)^{figure}:\s+(\S+)", text)


@pytest.fixture
def _files() -> Iterator[None]:
    """Descriptors for slowhttptest, which takes its limit from us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(8192, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def client(port: int, upstream: Upstream, mount: str) -> Iterator[Callable[[], float]]:
    """An ordinary client that has had a stream open since before; call it to have it do what it does, and know the
    seconds that it took: a short stream, a look at health, and one event more on the first."""
    path = upstream.serve(lambda ex: ex.reply(b"data: 1\n\n", headers=EVENTS))
    before = upstream.by_hand()
    with Connection(port, source="127.0.0.3") as connection:
        connection.send("POST", mount + before, {}, b"{}")
        ex = upstream.next(before)
        ex.head(headers=EVENTS)
        long = connection.read_head()

        def once() -> float:
            began = time.monotonic()
            with Connection(port, source="127.0.0.3") as connection:
                response = connection.request("POST", mount + path, {}, b"{}")
                assert response.finish()[:2] == (b"data: 1\n\n", "clean")
                assert connection.request("GET", "/health/live").status == 200
            ex.send(b"data: 2\n\n")
            assert long.read_event() == b"data: 2\n\n"
            return time.monotonic() - began

        try:
            yield once
            ex.end()
            assert long.finish().ended == "clean"
        finally:
            ex.finished.set()
            upstream.forget(path)
            upstream.forget(before)


def served_meanwhile(once: Callable[[], float], attacks: list[subprocess.Popen[bytes]]) -> None:
    """The ordinary client is served at once as long as the others are at it."""
    took = []
    while any(attack.poll() is None for attack in attacks):
        took.append(once())
        time.sleep(0.02)  # an ordinary client, not a flood
    assert [attack.wait() for attack in attacks] == [0] * len(attacks)
    # Most are served at once; without room for them nearly all would wait until the attack is over.
    assert len(took) >= 5
    assert sorted(took)[len(took) // 2] < 3, f"the slowest of {len(took)}: {sorted(took)[-5:]}"


@pytest.mark.usefixtures("_files")
def test_slow_heads_and_bodies_by_the_thousand_do_not_stop_others(behind_nginx: Service, tmp_path: Path) -> None:
    """A thousand of each at once."""
    port, upstream = behind_nginx.port, behind_nginx.upstream

    def attacked(seconds: int) -> int:
        """So many it had open at once of the way of which it had fewer."""
        with (
            client(port, upstream, behind_nginx.mount) as once,
            slowly(port, "heads", 1000, tmp_path, seconds) as heads,
            slowly(port, "bodies", 1000, tmp_path, seconds) as bodies,
        ):
            served_meanwhile(once, [heads, bodies])
        for way in WAYS:
            assert set(told(tmp_path, way, "service available")) == {"YES"}
        return min(max(map(int, told(tmp_path, way, "connected"))) for way in WAYS)

    # Opening them takes longer on a machine in full use.
    assert attacked(SECONDS) > 900 or attacked(3 * SECONDS) > 900, "too few of them"
    # What it sent to see whether the service is up has gone upstream, and nothing of its bodies.
    assert {ex.method for ex in upstream.seen("/slow")} <= {b"GET"}
    upstream.forget("/slow")


@pytest.mark.usefixtures("_files")
def test_with_a_limit_for_each_address_more_slow_bodies_than_gunicorn_has_connections_stop_nobody_else(
    behind_nginx: Service, tmp_path: Path
) -> None:
    """The limit of nginx-tls.conf. Without it 2,600 of them keep everybody out: they go on to gunicorn as they come."""
    limit = re.search(r"limit_conn relay_address \d+;", (REPO / "nginx/nginx-tls.conf").read_text())
    assert limit
    relay, upstream = behind_nginx.relay, behind_nginx.upstream
    with (
        servers.nginx(
            relay.port, relay.admin_port, limit[0], extra_http="include snippets/relay-limits.conf;"
        ) as proxy,
        client(proxy.port, upstream, behind_nginx.mount) as once,
        slowly(proxy.port, "bodies", 2600, tmp_path) as bodies,
    ):
        served_meanwhile(once, [bodies])
        assert proxy.log().count('"path":"/v1/slow","status":429') > 100
    upstream.forget("/slow")
