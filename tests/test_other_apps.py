"""The relay in apps whose extensions, hooks and factories do as they like."""

from __future__ import annotations

import functools
import gzip
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
from flask import Blueprint, Flask, Response
from flask.cli import routes_command
from harness import eventually, servers
from harness.client import request
from harness.upstream import Upstream

from relay import Relay
from relay.observe import log, metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EVENTS = [("Content-Type", "text/event-stream")]
DEAD = "http://127.0.0.1:9/v1"


def an_app(url: str = DEAD, **config: Any) -> Flask:
    app = Flask("bookshop", static_folder=None)
    app.config.update({"RELAY_UPSTREAM_URL": url, **config})
    return app


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


def refuse() -> tuple[str, int]:
    return "log in first", 401


def test_checks_given_before_the_first_app_hold_in_each() -> None:
    relay = Relay(url_prefix="/ai")
    relay.before_request(refuse)
    for _ in range(2):
        app = an_app()
        relay.init_app(app)
        assert app.test_client().get("/ai/models").status_code == 401


def test_a_factory_that_guards_first_is_refused_the_second_time() -> None:
    relay = Relay(url_prefix="/ai")
    relay.before_request(refuse)
    relay.init_app(an_app())
    with pytest.raises(RuntimeError, match="give all checks before"):
        relay.before_request(refuse)


def test_a_factory_that_guards_last_is_refused_the_second_time() -> None:
    relay = Relay(url_prefix="/ai")
    app = an_app()
    relay.init_app(app)
    relay.before_request(refuse)
    assert app.test_client().get("/ai/models").status_code == 401
    with pytest.raises(RuntimeError, match="would be without them"):
        relay.init_app(an_app())


def test_a_check_after_two_apps_is_refused() -> None:
    relay = Relay(url_prefix="/ai")
    relay.init_app(an_app())
    relay.init_app(an_app())
    with pytest.raises(RuntimeError, match="not certain"):
        relay.before_request(refuse)


def test_rules_can_be_listed() -> None:
    app = an_app()
    Relay(app, url_prefix="/ai")
    for rule in app.url_map.iter_rules():
        assert sorted(rule.methods), rule
        assert app.view_functions[rule.endpoint], rule
    assert app.test_cli_runner().invoke(routes_command).exit_code == 0
    response = app.test_client().open("/ai/models", method="TRACE")
    assert (response.status_code, response.get_json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/ai", "/ai/responses", "/ai/_relay/health", "/ai/_relay/ticks"])
def test_a_websocket_is_told_to_use_http(path: str) -> None:
    app = an_app()
    Relay(app, url_prefix="/ai")
    response = app.test_client().get(path, headers={"Connection": "Upgrade", "Upgrade": "websocket"})
    assert (response.status_code, response.get_json()["error"]["code"]) == (426, "upgrade_required")


def nested(app: Flask, relay: Relay) -> None:
    outer = Blueprint("outer", __name__, url_prefix="/outer")
    outer.register_blueprint(relay.blueprint)
    app.register_blueprint(outer)


REFUSED_PLACES = [
    pytest.param(lambda app, relay: relay.init_app(app, url_prefix="/t/<tenant>/ai"), ValueError, id="variables"),
    pytest.param(nested, RuntimeError, id="nested"),
    pytest.param(lambda app, relay: app.register_blueprint(relay.blueprint), RuntimeError, id="no_init_app"),
]


@pytest.mark.parametrize(("mount", "kind"), REFUSED_PLACES)
def test_places_that_cannot_work_are_refused_at_start(
    mount: Callable[[Flask, Relay], None], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="prefix"):
        mount(an_app(), Relay())


def test_an_app_that_routes_by_host_is_refused() -> None:
    app = Flask("bookshop", host_matching=True, static_folder=None)
    app.config["RELAY_UPSTREAM_URL"] = DEAD
    with pytest.raises(RuntimeError, match="routes by host"):
        Relay(app)


async def waits(*_: object) -> dict[str, str]:
    return {}


class Waits:
    async def __call__(self, *_: object) -> dict[str, str]:
        return {}


@pytest.mark.parametrize("hook", ["on_end", "request_headers"])
@pytest.mark.parametrize(
    "function", [pytest.param(waits, id="def"), pytest.param(functools.partial(waits), id="partial"), Waits()]
)
def test_async_hooks_are_refused_at_start(hook: str, function: Any) -> None:
    arguments: dict[str, Any] = {hook: function}
    with pytest.raises(TypeError, match=f"{hook} must be a plain function"):
        Relay(**arguments)


def compress(response: Response) -> Response:
    assert response.content_type
    response.set_data(gzip.compress(response.get_data()))
    response.headers["Content-Encoding"] = "gzip"
    response.headers["Content-Range"] = "bytes 0-1/2"
    response.headers["Digest"] = "sha-256=x"
    response.headers["X-Shop"] = "books"
    response.add_etag()
    return response


def test_what_hooks_say_of_the_placeholder_does_not_go_out(upstream: Upstream) -> None:
    app = an_app(upstream.base_url)
    Relay(app, url_prefix="/ai")
    app.after_request(compress)
    path = upstream.serve(lambda exchange: exchange.reply(b"plain bytes", 200, "OK", [("Content-Type", "text/plain")]))
    response = app.test_client().get(f"/ai{path}")
    assert (response.data, response.headers["X-Shop"]) == (b"plain bytes", "books")
    assert response.headers["Content-Type"] == "text/plain"
    assert {"Content-Encoding", "Content-Range", "Digest", "ETag"}.isdisjoint(response.headers.keys())


def test_a_hook_that_rebuilds_the_response_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = an_app()

    @app.after_request
    def rebuild(response: Response) -> Response:
        return Response(response.get_data(), status=response.status_code, headers=list(response.headers))

    Relay(app, url_prefix="/ai")
    response = app.test_client().get("/ai/models")
    assert (response.status_code, response.get_json()["error"]["code"]) == (500, "relay_error")
    assert "after_request hook has replaced" in caplog.text


def test_rules_of_the_app_below_the_mount_stay_the_apps() -> None:
    app = an_app()
    Relay(app)
    app.add_url_rule("/v1/orders", "orders", lambda: "orders", methods=["GET"])
    client = app.test_client()
    assert client.get("/v1/orders").data == b"orders"
    response = client.post("/v1/orders", headers={"Authorization": "Bearer shop"})
    assert (response.status_code, "GET" in response.headers["Allow"]) == (405, True)


@pytest.mark.parametrize("path", ["/ai/_relay/helth", "/ai/_relay/", "/ai/_relay", "/ai/_relay%2Fx"])
def test_a_typo_below_the_relays_own_paths_goes_nowhere(path: str) -> None:
    app = an_app()
    Relay(app, url_prefix="/ai")
    response = app.test_client().post(path)
    assert (response.status_code, response.get_json()["error"]["code"]) == (404, "not_found")


def test_a_prometheus_client_that_cannot_make_them_costs_the_metrics_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", types.ModuleType("prometheus_client"))
    metrics.Metrics().refused("bad_request")
    assert "there are no metrics" in caplog.text


def test_a_failure_is_told_where_the_logger_is_disabled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("relay"), "disabled", True)
    try:
        raise OSError("the ledger is full")
    except OSError:
        log.app_fault("on_end failed for request %s", "r1")
    told = capsys.readouterr().err
    assert "on_end failed for request r1" in told
    assert "the ledger is full" in told


# --- What the app says of a request, and hears of its end


def relayed_by(upstream: Upstream, folder: Path, program: str, worker: str = "gthread") -> Any:
    (folder / "bookshop.py").write_text(program.replace("@HERE@", upstream.base_url))
    return servers.gunicorn(
        {"PYTHONPATH": str(folder)}, "bookshop:app", None, ["-k", worker, "--threads", "8"], ready="/"
    )


_NAMES = """
from flask import Flask
from relay import Relay

app = Flask("bookshop")
ended = []
settings = {"RELAY_UPSTREAM_URL": "@HERE@"}
Relay(app, url_prefix="/ai", settings=settings, on_end=lambda record: ended.append(record.request_id))
app.add_url_rule("/", "ended", lambda: {"ended": ended})

@app.after_request
def names(response):
    response.headers["X-Request-ID"] = "of-the-app-7"
    return response
"""


@pytest.mark.parametrize("path", ["/ai/chat/completions", "/ai/_relay/api/stream-chat"])
def test_the_apps_request_id_is_the_requests(upstream: Upstream, tmp_path: Path, path: str) -> None:
    upstream.serve(
        lambda ex: ex.reply(b"data: 1\n\n", headers=[("Content-Type", "text/event-stream")]), "/chat/completions"
    )
    with relayed_by(upstream, tmp_path, _NAMES) as shop:
        response = request(shop.port, "POST", path, {"Content-Type": "application/json"}, b'{"prompt": "x"}')
        response.finish()
        assert response.all("X-Request-ID") == [b"of-the-app-7"]
        assert upstream.seen("/chat/completions")[-1].header("X-Request-ID") == b"of-the-app-7"

        def told() -> bool:
            return b'["of-the-app-7"]' in request(shop.port, "GET", "/").finish().data

        eventually(told, "the record")
    upstream.forget("/chat/completions")


_SLOW = """
import threading
from flask import Flask
from relay import Relay

app = Flask("bookshop")
go_on = threading.Event()
ended = []

def slow(record):
    go_on.wait(60)
    ended.append(record.reason)

Relay(app, url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": "@HERE@"}, on_end=slow)
app.add_url_rule("/", "ended", lambda: {"ended": ended})
app.add_url_rule("/go-on", "go_on", lambda: str(go_on.set()))
"""


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_on_end_does_not_delay_the_end_of_the_body(upstream: Upstream, tmp_path: Path, worker: str) -> None:
    path = upstream.serve(
        lambda ex: (ex.head(headers=[("Content-Type", "text/event-stream")]), ex.send(b"data: 1\n\n"), ex.end())
    )
    with relayed_by(upstream, tmp_path, _SLOW, worker) as shop:
        body = request(shop.port, "POST", "/ai" + path, {}, b"{}").finish()
        assert (body.data, body.ended) == (b"data: 1\n\n", "clean")
        assert request(shop.port, "GET", "/").finish().data.replace(b" ", b"").strip() == b'{"ended":[]}'
        request(shop.port, "GET", "/go-on").finish()
        eventually(lambda: b'"done"' in request(shop.port, "GET", "/").finish().data, "the hook's end")
    upstream.forget(path)


# --- An app's own tests


def test_an_app_is_tested_with_the_demo_upstream() -> None:
    """As the README says: no network, no key, and nothing that patches requests is in the way."""
    app = an_app("demo")
    Relay(app, url_prefix="/ai")
    asked = {"model": "relay-demo", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    response = app.test_client().post("/ai/chat/completions", json=asked)
    assert (response.status_code, response.mimetype) == (200, "text/event-stream")
    assert response.text.rstrip().endswith("data: [DONE]")
