"""Pages of other origins, through real gunicorn: whom preflights let in, and what a page may read of each answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from harness import eventually, llm, servers
from harness.client import Connection, request
from harness.upstream import Upstream

from relay.web.cors import EXPOSED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.client import Response

SHOP, OTHER, FOREIGN = "https://shop.example", "http://[::1]:3000", "https://evil.example"
KEY = {"Authorization": "Bearer key-a"}
STREAM = [("Content-Type", "text/event-stream"), ("Access-Control-Allow-Origin", "*"), ("Vary", "Accept")]


class Place(NamedTuple):
    upstream: Upstream
    port: int
    mount: str
    endpoints: str  # before the prompt endpoints' paths


def settings(upstream: Upstream, origins: str = f"{SHOP},{OTHER}") -> dict[str, str]:
    return {
        "RELAY_UPSTREAM_URL": upstream.base_url,
        "RELAY_CLIENT_KEYS": "key-a,key-b",
        "RELAY_CORS_ORIGINS": origins,
        "RELAY_MAX_STREAMS_PER_CLIENT": "1",
        "RELAY_RATE_LIMIT": "1000/minute",
    }


_SHOP = """
from flask import Flask, abort, request
from flask_cors import CORS
from relay import Relay

app = Flask("shop")
CORS(app, origins=["https://shop.example", "https://partner.example"])
relay = Relay(app, url_prefix="/ai", settings=%r)

@relay.before_request
def login():
    if "Authorization" not in request.headers:
        abort(401)

@app.get("/own")
def own():
    return "own"
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module", params=["service", "gevent", "gthread"])
def place(
    upstream: Upstream, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The service, and a relay in a shop that uses flask-cors itself."""
    if request.param == "service":
        with servers.gunicorn(settings(upstream)) as relay:
            yield Place(upstream, relay.port, "/v1", "")
        return
    folder: Path = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(_SHOP % settings(upstream))
    args = ["-k", request.param, "--threads", "16"]
    with servers.gunicorn({"PYTHONPATH": str(folder)}, "shop:app", None, args, ready=None) as relay:
        yield Place(upstream, relay.port, "/ai", "/ai/_relay")


def preflight(port: int, path: str, origin: str, headers: str = "authorization,content-type") -> Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers}
    return request(port, "OPTIONS", path, asked)


def allowed(response: Response) -> list[bytes]:
    return response.all("Access-Control-Allow-Origin")


def tokens(response: Response, name: str) -> set[str]:
    return {token.strip().lower() for value in response.all(name) for token in value.decode().split(",")}


def settled(place: Place) -> None:
    """The key's one stream is over. Its client may have had all of it before the relay counts it as ended."""

    def open_streams() -> int:
        health = request(place.port, "GET", f"{place.endpoints}/health", KEY)
        found: int = json.loads(health.finish().data)["streams"]["open"]
        return found

    eventually(lambda: open_streams() == 0, "no slot taken")


def paths(place: Place) -> list[str]:
    health = "/health" if not place.endpoints else f"{place.endpoints}/health"
    ticket = ["/ticket"] if not place.endpoints else []
    return [
        f"{place.mount}/chat/completions",
        *(
            f"{place.endpoints}{path}"
            for path in ("/api/stream-chat", "/chat/stream", "/stream/aware", "/stream/heartbeat")
        ),
        health,
        *ticket,
    ]


def test_a_preflight_is_answered_here_and_lets_a_named_origin_in(place: Place) -> None:
    before = len(place.upstream.seen())
    names = "authorization,content-type,x-api-key,last-event-id,x-request-id,traceparent,anthropic-version,openai-beta"
    for path in paths(place):
        for origin in (SHOP, OTHER):
            response = preflight(place.port, path, origin, names)
            assert response.status == 204, path
            assert allowed(response) == [origin.encode()]
            assert response.all("Access-Control-Allow-Credentials") == [b"true"]
            assert response.header("Access-Control-Max-Age") == b"600"
            assert tokens(response, "Access-Control-Allow-Headers") == set(names.split(","))
            assert {"get", "post", "delete"} <= tokens(response, "Access-Control-Allow-Methods")
            assert "origin" in tokens(response, "Vary")
            assert response.finish().data == b""
    assert len(place.upstream.seen()) == before


@pytest.mark.parametrize(
    "origin", [FOREIGN, "https://shop.example.evil.example", "http://shop.example", "null", "https://SHOPxexample"]
)
def test_a_foreign_origin_gets_nothing(place: Place, origin: str) -> None:
    before = len(place.upstream.seen())
    for path in paths(place):
        response = preflight(place.port, path, origin)
        assert response.status == 403, path
        assert allowed(response) == response.all("Access-Control-Allow-Methods") == []
        response.finish()
    for path in (f"{place.mount}/chat/completions", f"{place.endpoints}/chat/stream"):
        response = request(place.port, "POST", path, {**KEY, "Origin": origin}, b'{"prompt": "x"}')
        assert response.status == 403
        assert allowed(response) == []
        assert json.loads(response.finish().data)["error"]["code"] == "origin_not_allowed"
    assert len(place.upstream.seen()) == before


def asks(place: Place) -> list[tuple[str, bytes]]:
    return [
        (f"{place.mount}/chat/completions", b'{"stream": true}'),
        (f"{place.endpoints}/api/stream-chat", b'{"prompt": "x"}'),
        (f"{place.endpoints}/chat/stream", b'{"prompt": "x"}'),
    ]


def test_a_page_may_read_streams_and_their_headers(place: Place) -> None:
    place.upstream.serve(
        lambda ex: ex.reply(b"".join(llm.chat_events()), headers=STREAM, framing="chunked"), "/chat/completions"
    )
    for path, body in asks(place):
        settled(place)
        response = request(place.port, "POST", path, {**KEY, "Origin": SHOP}, body)
        assert response.status == 200
        assert allowed(response) == [SHOP.encode()]  # once, and not the upstream's
        assert response.all("Access-Control-Allow-Credentials") == [b"true"]
        assert tokens(response, "Access-Control-Expose-Headers") == {name.lower() for name in EXPOSED}
        assert "origin" in tokens(response, "Vary")
        assert response.finish().ended == "clean"
        # Without an origin there is nothing to allow; caches are told that this may differ.
        settled(place)
        response = request(place.port, "POST", path, KEY, body)
        assert allowed(response) == []
        assert "origin" in tokens(response, "Vary")
        response.finish()


def test_a_page_may_read_why_it_was_refused(place: Place) -> None:
    def check(response: Response, status: int) -> None:
        assert response.status == status
        assert allowed(response) == [SHOP.encode()]
        assert "retry-after" in tokens(response, "Access-Control-Expose-Headers")
        response.finish()

    origin = {"Origin": SHOP}
    for path, body in asks(place):
        check(request(place.port, "POST", path, {**origin, "Authorization": "Bearer wrong"}, body), 401)
    check(request(place.port, "POST", f"{place.endpoints}/chat/stream", {**origin, **KEY}, b"{}"), 400)
    # From the stream itself, after Flask is done.
    path = "/chat/completions"
    place.upstream.forget(path)
    place.upstream.by_hand(path)
    settled(place)
    with Connection(place.port) as first:
        first.send("POST", f"{place.mount}{path}", {**KEY, **origin}, b"{}")
        ex = place.upstream.next(path)
        ex.head(headers=STREAM)
        first.read_head()
        for each, body in asks(place):
            check(request(place.port, "POST", each, {**KEY, **origin}, body), 429)
    place.upstream.serve(lambda ex: ex.abort(), path)
    for each, body in asks(place):
        settled(place)
        check(request(place.port, "POST", each, {**KEY, **origin}, body), 502)


def test_options_that_are_no_preflight_go_upstream(place: Place) -> None:
    path = place.upstream.serve(lambda ex: ex.reply(b"options", headers=[("Allow", "GET")]))
    for headers in ({}, {"Origin": SHOP}, {"Access-Control-Request-Method": "POST"}):
        settled(place)
        response = request(place.port, "OPTIONS", place.mount + path, {**KEY, **headers})
        assert (response.status, response.header("Allow")) == (200, b"GET")
        assert response.finish().data == b"options"


@pytest.mark.parametrize("place", ["gevent", "gthread"], indirect=True)
def test_the_shops_own_routes_keep_its_own_rules(place: Place) -> None:
    response = request(place.port, "GET", "/own", {"Origin": "https://partner.example"})
    assert allowed(response) == [b"https://partner.example"]
    assert response.all("Access-Control-Expose-Headers") == []
    response.finish()


def test_everybody_is_let_in_without_credentials(upstream: Upstream) -> None:
    with servers.gunicorn(settings(upstream, "*")) as relay:
        for origin in (FOREIGN, "null"):
            response = preflight(relay.port, "/v1/models", origin)
            assert response.status == 204
            assert allowed(response) == [b"*"]
            assert response.all("Access-Control-Allow-Credentials") == []
            response.finish()
        response = request(relay.port, "GET", "/v1/models", {**KEY, "Origin": FOREIGN})
        assert (response.status, allowed(response)) == (200, [b"*"])
        assert response.all("Access-Control-Allow-Credentials") == []
        response.finish()


def test_the_admin_address_shows_pages_nothing(upstream: Upstream) -> None:
    with servers.gunicorn(settings(upstream)) as relay:
        for path in ("/metrics", "/streams"):
            response = request(relay.admin_port, "GET", path, {"Origin": SHOP})
            assert response.status == 403
            assert allowed(response) == []
            response.finish()
            assert allowed(preflight(relay.admin_port, path, SHOP)) == []


def test_without_the_setting_nothing_is_added(upstream: Upstream) -> None:
    path = upstream.serve(lambda ex: ex.reply(b"", 204, framing="none"))
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
        response = preflight(relay.port, "/v1" + path, f"http://127.0.0.1:{relay.port}")
        assert (response.status, allowed(response)) == (204, [])  # the upstream's answer, as ever
        assert len(upstream.seen(path)) == 1
        response.finish()


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    import subprocess
    import sys

    from harness import REPO

    code = (
        "import sys; sys.modules['flask_cors'] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'flask_cors' else found(name, *a)\n"
        "from relay.settings import Settings, SettingsError\n"
        "try: Settings.from_mapping({'RELAY_UPSTREAM_URL': 'http://x', 'RELAY_CORS_ORIGINS': 'https://shop.example'})\n"
        "except SettingsError as error: print(error)\n"
    )
    env: Any = servers.environment({"PYTHONPATH": str(REPO)})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=30)
    assert "RELAY_CORS_ORIGINS is set: needs the package flask-cors; pip install flask-cors" in done.stdout
