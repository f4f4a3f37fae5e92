"""What the README says of hosts like Heroku: its Procfile and settings, behind a router with Heroku's time-outs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import REPO, eventually, servers
from harness.calm import undisturbed
from harness.client import Connection, request
from harness.upstream import Exchange, Upstream
from test_docs import BLOCKS, block
from test_drain import kept, until_not_ready

from relay.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn, Nginx

SCALE = 12  # all times are so much shorter: the router's 30 s are 2.5, and a heartbeat may be late by half of that
DEFAULTS = Settings.from_mapping({}, service=True)
HEARTBEAT = b": keep-alive\n\n"
EVENTS = [("Content-Type", "text/event-stream")]
KEY = {"Authorization": "Bearer key-of-a-client", "Content-Type": "application/json"}
ASKED = b'{"stream": true}'
PATH = "/chat/completions"  # with an upstream key, not every path goes

# Heroku's waits 30 s for the first byte and 55 s for the next; nginx has one clock for both.
ROUTER = f"""
pid run/pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path run/1; proxy_temp_path run/2; fastcgi_temp_path run/3; uwsgi_temp_path run/4;
    scgi_temp_path run/5;
    server {{
        listen 127.0.0.1:8080;
        location / {{
            proxy_pass http://127.0.0.1:8000;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host relay.example.com;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_read_timeout {30_000 // SCALE}ms;
        }}
        location = /elsewhere {{ proxy_pass http://127.0.0.1:8001; }}
    }}
}}
"""


@contextlib.contextmanager
def dyno(upstream: Upstream, **more: str) -> Iterator[Gunicorn]:
    """The Procfile's line in a shell, in a folder as a checkout is, with the README's settings and `PORT`."""
    (line,) = [code for language, code in BLOCKS if language == "procfile"]
    name, _, command = line.strip().partition(": ")
    assert name == "web"
    told = dict(line.split("=", 1) for line in block("RELAY_KEEPALIVE=95s").split())
    assert told["RELAY_TRUSTED_PROXIES"] == "10.0.0.0/8"
    told["RELAY_TRUSTED_PROXIES"] = "127.0.0.1"  # where our router calls from
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_UPSTREAM_KEY": "of-the-upstream", **told, **more}

    def launch(folder: Path) -> Gunicorn:
        server = servers.Gunicorn(servers.free_port(), servers.free_port(), folder)
        for name in ("wsgi.py", "gunicorn.conf.py", "relay"):  # and no developer's .env
            (folder / name).symlink_to(REPO / name)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ports = {"PORT": str(server.port), "RELAY_ADMIN_BIND": f"127.0.0.1:{server.admin_port}", "PATH": path}
        server.launch(["sh", "-c", f"exec {command}"], servers.environment(env | ports), folder)
        return server

    with servers._up(launch, lambda port: servers._answers(port, "/health/live"), 20) as server:
        yield server
        server.check()


@contextlib.contextmanager
def router(relay: Gunicorn, folder: Path) -> Iterator[Nginx]:
    (folder / "nginx.conf").write_text(ROUTER)
    with servers.nginx(relay.port, relay.admin_port, source=folder) as proxy:
        yield proxy


def scaled(seconds: float) -> str:
    return f"{seconds * 1000 / SCALE:.0f}ms"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def chain(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gunicorn, Nginx]]:
    times = {"RELAY_HOLD": scaled(DEFAULTS.hold), "RELAY_HEARTBEAT": scaled(DEFAULTS.heartbeat)}
    with dyno(upstream, **times) as relay, router(relay, tmp_path_factory.mktemp("router")) as proxy:
        yield relay, proxy


@undisturbed(0.5)
def test_a_stream_outlives_a_router_that_waits_half_a_minute(chain: tuple[Gunicorn, Nginx], upstream: Upstream) -> None:
    """Silence of three heartbeats before the answer and again within it, longer than the router would wait."""
    upstream.forget(PATH)
    upstream.by_hand(PATH)
    with Connection(chain[1].port) as connection:
        connection.send("POST", "/v1" + PATH, KEY, ASKED)
        ex = upstream.next(PATH)
        response = connection.read_head()
        assert response.status == 200
        assert response.read_exactly(3 * len(HEARTBEAT)) == 3 * HEARTBEAT
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
        response.read_until(b"data: 1\n\n")
        assert response.read_exactly(3 * len(HEARTBEAT)) == 3 * HEARTBEAT
        ex.send(b"data: [DONE]\n\n")
        ex.end()
        received = response.finish()
        assert received.ended == "clean"
        assert received.data.replace(HEARTBEAT, b"") == b"data: 1\n\ndata: [DONE]\n\n"
    upstream.forget(PATH)


def test_that_router_gives_up_what_is_no_stream(chain: tuple[Gunicorn, Nginx], upstream: Upstream) -> None:
    """So the test before this one says something."""
    upstream.by_hand(PATH)
    with Connection(chain[1].port) as connection:
        connection.send("POST", "/v1" + PATH, KEY, b"{}")
        ex = upstream.next(PATH)
        assert connection.read_head().status == 504
        ex.wait_gone()
    upstream.forget(PATH)


def test_the_client_is_whom_the_router_has_seen(chain: tuple[Gunicorn, Nginx], upstream: Upstream) -> None:
    """And no one whom the client claims to be; a client needs a key, and no loopback name."""
    relay, proxy = chain
    upstream.serve(lambda ex: ex.reply(b"{}"), PATH)
    forged = KEY | {"X-Forwarded-For": "6.6.6.6", "X-Request-ID": "who-is-it"}
    with Connection(proxy.port, source="127.0.0.3") as connection:
        assert connection.request("POST", "/v1" + PATH, forged, b"{}").finish().data == b"{}"
    eventually(lambda: re.search("who-is-it.*\n", relay.log()) is not None, "the log line")
    lines = [json.loads(line) for line in relay.log().splitlines() if "who-is-it" in line]
    assert [line["client"] for line in lines] == ["127.0.0.3"]
    (ex,) = upstream.seen(PATH)
    assert ex.all("Authorization") == [b"Bearer of-the-upstream"]
    assert request(proxy.port, "POST", "/v1" + PATH, {}, b"{}").status == 401
    upstream.forget(PATH)


def test_a_signal_to_all_processes_at_once_drains(upstream: Upstream) -> None:
    """As Heroku's: a stream that ends in time is whole, one that does not gets its frame, and the end is no failure."""
    with dyno(upstream, RELAY_DRAIN="4s") as relay:
        streams: list[tuple[Exchange, Connection]] = []
        with contextlib.ExitStack() as stack:
            upstream.by_hand(PATH)
            for _ in range(2):
                connection = stack.enter_context(Connection(relay.port))
                connection.send("POST", "/v1" + PATH, KEY, ASKED)
                ex = upstream.next(PATH)
                ex.head(headers=EVENTS)
                ex.send(b"data: 1\n\n")
                streams.append((ex, connection))
            short, long = (connection.read_head() for _, connection in streams)
            assert short.read_event() == long.read_event() == b"data: 1\n\n"
            asked = stack.enter_context(kept(relay.port))
            os.killpg(relay.pid, signal.SIGTERM)
            os.killpg(relay.pid, signal.SIGTERM)  # "multiple SIGTERMs are possible"
            until_not_ready(asked)
            streams[0][0].send(b"data: 2\n\n")
            streams[0][0].end()
            assert short.finish()[:2] == (b"data: 1\n\ndata: 2\n\n", "clean")
            cut = long.finish()
            assert cut.ended == "cut"
            assert re.search(rb"event: error\ndata: .*\"drained\"", cut.data)
            assert relay.wait() == 0
            for ex, _ in streams:
                ex.finished.set()
        upstream.forget(PATH)
