"""What a server cannot guarantee is said once in its log, at the first stream, with what to do about it."""

from __future__ import annotations

import logging
import socket
import ssl
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from harness import servers
from harness.client import Connection
from harness.upstream import Upstream
from werkzeug.test import create_environ

from relay import Relay
from relay.web import server

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
        pytest.param(["-k", "gthread", "--threads", "4"], ["8 streams at a time", "RELAY_MAX_STREAMS"], id="gthread"),
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
