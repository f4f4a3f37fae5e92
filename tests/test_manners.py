"""Servers and middleware without manners: they never close what they iterate, stop early, or swallow exceptions."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.upstream import Exchange

EVENTS = [("Content-Type", "text/event-stream")]

_APP = """
from flask import Flask
from relay import Relay

app = Flask("bookshop")
ended = []
Relay(app, url_prefix="/ai", settings=%r, on_end=lambda record: ended.append(record.reason))
app.add_url_rule("/ended", "ended", lambda: {"ended": ended})

def never_closes(environ, start_response):
    for piece in app(environ, start_response):
        yield piece

def drops(environ, start_response):
    if environ["PATH_INFO"].startswith("/ai/"):
        app(environ, start_response)  # and never looks at it
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    return app(environ, start_response)

def swallows(environ, start_response):
    try:
        yield from app(environ, start_response)
    except Exception:
        yield b""  # as a debugger would, which has shown it to somebody
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module", params=["gevent", "gthread", "sync"])
def worker(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def serving(upstream: Upstream, folder: Path, name: str, worker: str) -> object:
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_MAX_STREAMS": "2"}
    (folder / "bookshop.py").write_text(textwrap.dedent(_APP % settings))
    args = ["-k", worker, "--threads", "8"]
    return servers.gunicorn({"PYTHONPATH": str(folder)}, f"bookshop:{name}", None, args, ready="/ended")


@pytest.mark.parametrize("name", ["never_closes", "drops"])
def test_what_nobody_closes_is_freed(upstream: Upstream, tmp_path: Path, name: str, worker: str) -> None:
    """More requests than there are slots: each gets one."""
    path = upstream.serve(lambda ex: (ex.head(headers=EVENTS), ex.send(b"data: 1\n\n"), ex.end()))
    with serving(upstream, tmp_path, name, worker) as shop:
        for _ in range(6):
            response = request(shop.port, "POST", "/ai" + path, {}, b"{}")
            assert (response.status, response.finish().ended) == (200, "clean")
        if name == "never_closes":

            def told() -> bool:
                return request(shop.port, "GET", "/ended").finish().data.count(b"done") == 6

            eventually(told, "the end of each")
    upstream.forget(path)


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("name", ["app", "swallows"])
def test_a_cut_never_looks_whole(upstream: Upstream, tmp_path: Path, name: str, version: str, worker: str) -> None:
    """In the middle of an event, where no frame fits."""

    def breaks_off(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        ex.send(b"data: half of")
        ex.abort()

    path = upstream.serve(breaks_off)
    with serving(upstream, tmp_path, name, worker) as shop, Connection(shop.port) as connection:
        response = connection.request("POST", "/ai" + path, {}, b"{}", version=version)
        body = response.finish(DEADLINE)
        assert body.ended != "clean", body
        if version == "HTTP/1.0":
            assert body.ended == "reset" or "RST" in (body.why or "")
    upstream.forget(path)
