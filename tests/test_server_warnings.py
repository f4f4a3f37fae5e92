"""What a server cannot guarantee is said once in its log, at the first stream, with what to do about it."""

from __future__ import annotations

import json
import logging
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from harness import servers
from harness.client import Connection, request
from harness.upstream import Upstream
from werkzeug.test import create_environ

from relay import Relay
from relay.settings import Settings
from relay.web import server
from relay.web.mount import Mount

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENTS = [("Content-Type", "text/event-stream"), ("Connection", "close")]
APP = """
import os
from flask import Flask
from relay import Relay

app = Flask("app")
for name in ("one", "two"):
    Relay(app, name=name, url_prefix=f"/{name}", settings={"RELAY_UPSTREAM_URL": os.environ["UPSTREAM"]})
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        upstream.serve(lambda exchange: exchange.reply(b"data: 1\n\n", headers=EVENTS), "/v1/events")
        yield upstream
        upstream.check()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["-k", "sync"], ["one request at a time", "--timeout", "-k gevent"], id="sync"),
        pytest.param(["-k", "gthread", "--threads", "4"], ["8 streams at a time", "RELAY_THREADS"], id="gthread"),
        pytest.param(["-k", "gevent"], [], id="gevent"),
        pytest.param(["-k", "gevent_pywsgi"], ["clients' sockets", "RELAY_HEARTBEAT", "look whole"], id="pywsgi"),
    ],
)
def test_gunicorns_workers(arguments: list[str], said: list[str], upstream: Upstream, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("app")
    (folder / "small_app.py").write_text(APP)
    env = {"PYTHONPATH": str(folder), "UPSTREAM": f"http://127.0.0.1:{upstream.port}/v1"}
    with servers.gunicorn(env, "small_app:app", None, arguments, ready=None) as running:
        assert "streams at a time" not in running.log()
        for path in ("/one/events", "/one/events", "/two/events"):
            with Connection(running.port) as connection:
                assert connection.request("GET", path, [("Connection", "close")]).finish().data == b"data: 1\n\n"
                connection.wait_closed()  # or the sync worker is ended in the middle of its last write
        told = [line for line in running.log().splitlines() if "RELAY_" in line or "one request at a time" in line]
    assert len(told) == bool(said)
    assert all(word in told[0] for word in said)


def test_a_plain_call_without_a_socket(
    upstream: Upstream, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_told", set())
    app = Flask("app")
    Relay(app, url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{upstream.port}/v1"})
    for _ in range(2):
        environ = create_environ("/ai/events", multithread=True)
        body: Any = app.wsgi_app(environ, lambda *_: None)  # type: ignore[arg-type,return-value]
        assert b"".join(body) == b"data: 1\n\n"
        body.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["sockets" in each for each in warnings] == [False, True]


def tls() -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(socket.socket(), server_hostname="127.0.0.1")


@pytest.mark.parametrize(
    ("most", "threads", "says"), [(0, 4, False), (3, 4, False), (4, 4, True), (900, 4, True), (900, None, False)]
)
def test_streams_that_leave_no_thread(most: int, threads: int | None, says: bool) -> None:
    with socket.socket() as client:
        said = server.missing({"wsgi.multithread": True}, client, streams=None, most=most, threads=threads)
    assert len(said) == says
    assert not says or "no thread is left" in said[0]


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 6), (32, 24)])
def test_a_quarter_of_the_threads_is_left_to_the_app(threads: int, streams: int) -> None:
    relay = {"RELAY_UPSTREAM_URL": "http://127.0.0.1:1/v1", "RELAY_THREADS": str(threads)}
    assert Mount("relay", Settings.from_mapping(relay)).admission.maximum == streams


def test_pages_are_served_beside_all_the_streams_that_there_may_be(tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(
        "import os\nfrom flask import Flask\nfrom relay import Relay\n\napp = Flask('app')\n"
        "Relay(app, url_prefix='/ai', settings={'RELAY_UPSTREAM_URL': os.environ['UPSTREAM'], 'RELAY_THREADS': 4})\n"
    )
    with Upstream() as upstream:
        path = upstream.by_hand()
        env = {"UPSTREAM": upstream.base_url, "PYTHONPATH": str(tmp_path)}
        args = ["-k", "gthread", "--threads", "4"]
        with servers.gunicorn(env, "counted:app", config=None, args=args, ready=None) as shop, ExitStack() as stack:
            for _ in range(3):
                connection = stack.enter_context(Connection(shop.port))
                connection.send("POST", "/ai" + path, [], b"{}")
                ex = upstream.next(path)
                ex.head(headers=[("Content-Type", "text/event-stream")])
                ex.send(b"data: 1\n\n")
                connection.read_head().read_until(b"data: 1\n\n")
            full = request(shop.port, "POST", "/ai" + path, [("Connection", "close")], b"{}")
            assert (full.status, json.loads(full.finish().data)["error"]["code"]) == (503, "full")
            assert request(shop.port, "GET", "/a-page", [("Connection", "close")]).status == 404  # the app's own
            assert "RELAY_THREADS" not in shop.log()


@pytest.mark.parametrize(
    ("environ", "client", "streams", "words"),
    [
        pytest.param({"SERVER_SOFTWARE": "gunicorn/26.0"}, socket.socket, 8, ["kills it"], id="gunicorn-sync"),
        pytest.param({"SERVER_SOFTWARE": "Werkzeug/3"}, socket.socket, 8, ["one request"], id="flask-without-threads"),
        pytest.param({"wsgi.multithread": True}, socket.socket, 8, ["takes a thread"], id="threads"),
        pytest.param({"wsgi.multithread": True}, socket.socket, None, [], id="threads-with-a-number-set"),
        pytest.param({"SERVER_SOFTWARE": "gunicorn", "wsgi.multithread": True}, tls, None, ["TLS"], id="tls"),
        pytest.param({"HTTP_VERSION": "2", "wsgi.multithread": True}, lambda: None, None, ["HTTP/2"], id="http2"),
        pytest.param(
            {"SERVER_SOFTWARE": "waitress", "wsgi.multithread": True}, lambda: None, None, ["(waitress)"], id="waitress"
        ),
        pytest.param({"uwsgi.version": b"2"}, lambda: None, 8, ["one request", "look whole"], id="uwsgi"),
    ],
)
def test_what_is_missing(environ: dict[str, Any], client: Any, streams: int | None, words: list[str]) -> None:
    shown = client()
    try:
        said = server.missing(environ, shown, streams=streams)
    finally:
        if shown is not None:
            shown.close()
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))
