"""The relay in a shop that was there before: its login, hooks, pages, database pool and mounts, under three servers."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from flask import Flask
from harness import REPO, eventually, servers
from harness.client import Client, Connection, request
from harness.upstream import Upstream

from relay import Relay
from relay.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.client import Response
    from harness.servers import Server
    from harness.upstream import Exchange, Header

SSE = "text/event-stream"
EVENTS: list[Header] = [("Content-Type", SSE)]
#: The client looks whether a connection is still there before it uses it. Of gunicorn's own 2 s a busy machine may take
#: more from the look to the use.
KEEP_ALIVE = ["--keep-alive", "20"]


@pytest.fixture(scope="module")
def upstreams() -> Iterator[tuple[Upstream, Upstream]]:
    with Upstream(base_path="/first/v1") as first, Upstream(base_path="/second") as second:
        yield first, second


def environment(upstreams: tuple[Upstream, Upstream]) -> dict[str, str]:
    first, second = upstreams
    return {"PYTHONPATH": str(REPO / "tests"), "SHOP_FIRST_URL": first.base_url, "SHOP_SECOND_URL": second.base_url}


@contextlib.contextmanager
def gevent(app: str, env: dict[str, str]) -> Iterator[Server]:
    with servers.gunicorn(env, app, None, ["-k", "gevent", *KEEP_ALIVE], ready=None) as server:
        yield server


@contextlib.contextmanager
def gthread(app: str, env: dict[str, str]) -> Iterator[Server]:
    with servers.gunicorn(env, app, None, ["-k", "gthread", "--threads", "16", *KEEP_ALIVE], ready=None) as server:
        yield server


@contextlib.contextmanager
def flask_run(app: str, env: dict[str, str]) -> Iterator[Server]:
    """Flask's own threaded server, as `flask run` starts it."""

    def launch(folder: Path) -> Server:
        server = servers.Server(servers.free_port(), folder)
        server.name = "flask run"
        command = [sys.executable, "-m", "flask", "--app", app, "run", "--port", str(server.port)]
        path = f"{REPO}:{env['PYTHONPATH']}"
        server.launch(command, servers.environment(env | {"PYTHONPATH": path}), folder)
        return server

    with servers._up(launch, lambda port: servers._answers(port, None), servers._START) as server:
        yield server


SERVERS = [
    pytest.param(serve, id=name) for name, serve in (("gevent", gevent), ("gthread", gthread), ("flask", flask_run))
]


class Shop:
    """The running bookshop. `prefix` and upstream of its first relay; the second's are `/other/v2` and `second`."""

    def __init__(self, server: Server, client: Client, upstreams: tuple[Upstream, Upstream]) -> None:
        self.server = server
        self.client = client
        self.port = client.port
        self.upstream, self.second = upstreams
        self.cookie = ""

    def log_in(self, user: str = "anna") -> dict[str, str]:
        """The header by which the shop knows a customer."""
        form = urlencode({"user": user}).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        response = request(self.port, "POST", "/login", headers, form)
        assert response.finish().data == b"welcome"
        (cookie,) = [value for value in response.all("Set-Cookie") if value.startswith(b"session=")]
        return {"Cookie": cookie.partition(b";")[0].decode()}

    def get(self, path: str, headers: dict[str, str]) -> Response:
        response = self.client.request("GET", path, headers)
        response.finish()
        return response

    def ran(self, tag: str) -> dict[str, int]:
        """How often each of the shop's hooks has run for the requests that came with this tag."""
        found: dict[str, int] = json.loads(self.client.request("GET", f"/ran?tag={tag}").finish().data)
        return found


@pytest.fixture(scope="module", params=SERVERS)
def shop(request: pytest.FixtureRequest, upstreams: tuple[Upstream, Upstream]) -> Iterator[Shop]:
    with request.param("shops.bookshop:app", environment(upstreams)) as server, Client(server.port) as client:
        yield Shop(server, client, upstreams)
    for upstream in upstreams:
        upstream.check()


@pytest.fixture(scope="module")
def anna(shop: Shop) -> dict[str, str]:
    return shop.log_in("anna")


@contextlib.contextmanager
def opened(shop: Shop, headers: dict[str, str], path: str | None = None) -> Iterator[tuple[Exchange, Connection]]:
    """A stream that the upstream has been asked for and has not answered."""
    path = shop.upstream.by_hand(path)
    with Connection(shop.port) as connection:
        connection.send("POST", "/ai" + path, headers | {"Content-Type": "application/json"}, b'{"stream": true}')
        ex = shop.upstream.next(path)
        try:
            yield ex, connection
        finally:
            ex.finished.set()
            shop.upstream.forget(path)


# --- Beside the shop's own


def test_the_shops_own_pages_are_as_they_were(shop: Shop, anna: dict[str, str]) -> None:
    assert shop.get("/", {}).body == b"<h1>Books</h1>"
    assert shop.get("/books", anna).body == b"three books for anna"
    for path, headers, status, page in (
        ("/books", {}, 401, b"<h1>Please log in</h1>"),
        ("/nothing", anna, 404, b"<h1>No such book</h1>"),
        ("/boom", anna, 500, b"<h1>The shop is closed</h1>"),
        ("/aix", anna, 404, b"<h1>No such book</h1>"),
    ):
        response = shop.get(path, headers)
        assert (response.status, bytes(response.body)) == (status, page)


def test_the_shops_login_guards_both_relays(shop: Shop, anna: dict[str, str]) -> None:
    for upstream, prefix in ((shop.upstream, "/ai"), (shop.second, "/other/v2")):
        path = upstream.serve(lambda ex: ex.reply(b"relayed"))
        response = shop.get(prefix + path, {})
        assert (response.status, bytes(response.body)) == (401, b"<h1>Please log in</h1>")
        assert upstream.seen(path) == []
        if prefix == "/other/v2":
            path = upstream.serve(lambda ex: ex.reply(b"relayed"), "/models")
        response = shop.get(prefix + path, anna)
        assert (response.status, bytes(response.body)) == (200, b"relayed")
        assert len(upstream.seen(path)) == 1
        upstream.forget(path)


def test_each_relay_has_its_own_upstream_key_paths_and_checks(shop: Shop, anna: dict[str, str]) -> None:
    """The same path below each of the two prefixes."""
    for upstream, prefix in ((shop.upstream, "/ai"), (shop.second, "/other/v2")):
        upstream.serve(lambda ex, prefix=prefix: ex.reply(prefix.encode()), "/models/x")  # type: ignore[misc]
        assert shop.get(f"{prefix}/models/x", anna).body == prefix.encode()
    (first,), (second,) = shop.upstream.seen("/models/x"), shop.second.seen("/models/x")
    assert (first.target, second.target) == (b"/first/v1/models/x", b"/second/models/x")
    assert (first.all("Authorization"), second.all("Authorization")) == ([b"Bearer key-of-anna"], [b"Bearer sk-second"])
    assert (first.all("X-Shop"), second.all("X-Shop")) == ([b"bookshop"], [])
    # What the second has a key for is limited, what the first has none for is not.
    assert shop.client.request("DELETE", "/other/v2/models/x", anna).finish().data.find(b"path_not_allowed") > 0
    assert shop.client.request("DELETE", "/ai/models/x", anna).finish().data == b"/ai"
    assert len(shop.second.seen("/models/x")) == 1
    # And the second has a check of its own.
    eve = shop.log_in("eve")
    assert shop.get("/other/v2/models/x", eve).status == 403
    assert shop.get("/ai/models/x", eve).status == 200
    for upstream in (shop.upstream, shop.second):
        upstream.forget("/models/x")


def test_the_hook_sets_headers_for_each_call(shop: Shop) -> None:
    """In place of whatever the client has sent under these names."""
    path = shop.upstream.serve(lambda ex: ex.reply(b"ok"))
    for user in ("anna", "ben"):
        headers = shop.log_in(user) | {"Authorization": "Bearer forged", "x-tenant": "forged"}
        assert shop.get("/ai" + path, headers).status == 200
    assert [ex.all("Authorization") for ex in shop.upstream.seen(path)] == [
        [b"Bearer key-of-anna"],
        [b"Bearer key-of-ben"],
    ]
    assert [ex.all("X-Tenant") for ex in shop.upstream.seen(path)] == [[b"anna"], [b"ben"]]
    shop.upstream.forget(path)


@pytest.mark.parametrize("fault", ["line break", "line feed", "nul", "euro", "name", "length", "coding", "host"])
def test_a_header_of_the_hooks_that_cannot_be_sent_goes_nowhere(shop: Shop, fault: str) -> None:
    """A customer's key with a line break in it, from the shop's database, is the shop's fault and nobody's header."""
    path = shop.upstream.serve(lambda ex: ex.reply(b"ok"))
    response = shop.get("/ai" + path, shop.log_in(fault))
    assert response.status == 500
    assert shop.upstream.seen(path) == []
    shop.upstream.forget(path)


@pytest.mark.parametrize("target", ["/a%2Fb//c;d?x=%20&&y", "/%E2%82%AC?", "/x?a=&b", "//two", "/100%25", "/%C3%BC%0A"])
def test_path_and_query_go_upstream_as_they_came(shop: Shop, anna: dict[str, str], target: str) -> None:
    path = target.partition("?")[0]
    shop.upstream.serve(lambda ex: ex.reply(b"ok"), path)
    assert shop.get("/ai" + target, anna).status == 200
    assert [ex.target for ex in shop.upstream.seen(path)] == [b"/first/v1" + target.encode()]
    shop.upstream.forget(path)


def test_each_event_arrives_before_the_next_is_sent(shop: Shop, anna: dict[str, str]) -> None:
    with opened(shop, anna) as (ex, connection):
        ex.head(headers=EVENTS)
        response = connection.read_head()
        for n in range(20):
            ex.send(b"data: %d\n\n" % n)
            assert response.read_event() == b"data: %d\n\n" % n
        ex.end()
        assert response.finish().ended == "clean"


@pytest.mark.parametrize(("sent", "framed"), [(b"data: x\n\n", True), (b"data: x", False)])
def test_a_cut_is_seen_as_a_cut(shop: Shop, anna: dict[str, str], sent: bytes, framed: bool) -> None:
    with opened(shop, anna) as (ex, connection):
        ex.head(headers=EVENTS)
        ex.send(sent)
        response = connection.read_head()
        assert response.read_exactly(len(sent)) == sent
        ex.abort()
        received = response.finish()
        assert received.ended == "cut"
        assert received.data[len(sent) :].startswith(b"event: error\ndata: {") is framed


def test_a_client_that_leaves_takes_the_upstream_with_it(shop: Shop, anna: dict[str, str]) -> None:
    """Before the answer, and in the silence after it."""
    with opened(shop, anna) as (ex, connection):
        connection.close()
        ex.wait_gone()
    with opened(shop, anna) as (ex, connection):
        ex.head(headers=EVENTS)
        connection.read_head()
        connection.close()
        ex.wait_gone()


def test_request_bodies_go_upstream_whole(shop: Shop, anna: dict[str, str]) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"%d" % len(ex.body)))
    body = bytes(range(256)) * 4000
    for sent in (body, b"", [body[:5], body[5:]]):
        ex_body = body if sent else b""
        response = shop.client.request("POST", "/ai" + path, anna, sent)
        assert (response.status, response.finish().data) == (200, b"%d" % len(ex_body))
        assert shop.upstream.seen(path)[-1].body == ex_body
    shop.upstream.forget(path)


# --- What the shop holds is free while the relay waits


def test_the_pool_of_one_is_free_before_the_upstream_has_answered(shop: Shop, anna: dict[str, str]) -> None:
    with opened(shop, anna) as (ex, connection):
        for _ in range(3):
            assert shop.get("/books", anna).body == b"three books for anna"
        ex.reply(b"data: x\n\n", headers=EVENTS)
        assert connection.read_head().finish()[:2] == (b"data: x\n\n", "clean")


def test_the_pool_of_one_is_free_while_streams_are_open(shop: Shop, anna: dict[str, str]) -> None:
    """Five of them, which have each passed the login check and so had the one connection in their hands."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(opened(shop, anna)) for _ in range(5)]
        for ex, connection in streams:
            ex.head(headers=EVENTS)
            response = connection.read_head()
            ex.send(b"data: x\n\n")
            assert response.read_event() == b"data: x\n\n"
        assert shop.get("/books", anna).body == b"three books for anna"


# --- Hooks


TAGS = (f"tag-{n}" for n in itertools.count())


def each_hook_ran(shop: Shop, tag: str, times: int = 1) -> None:
    """Every hook has run so often for the requests with this tag."""
    once_each = dict.fromkeys(("after_request", "on_close", "teardown_request", "teardown_appcontext"), times)
    eventually(lambda: shop.ran(tag).items() >= once_each.items(), f"the hooks of {tag}")
    assert shop.ran(tag) == once_each


def cut(ex: Exchange) -> None:
    """Inside an event."""
    ex.head(headers=EVENTS)
    ex.send(b"data: x")
    ex.abort()


ENDS: list[tuple[str, Callable[[Exchange], object]]] = [
    ("whole", lambda ex: ex.reply(b"data: x\n\n", headers=EVENTS, framing="chunked")),
    ("json", lambda ex: ex.reply(b"{}", headers=[("Content-Type", "application/json")])),
    ("204", lambda ex: ex.reply(status=204, framing="none")),
    ("500", lambda ex: ex.reply(b"no", 500)),
    ("502", lambda ex: ex.abort()),
    ("cut", cut),
]


@pytest.mark.parametrize("end", [pytest.param(end, id=name) for name, end in ENDS])
def test_hooks_fire_once_however_the_stream_ends(
    shop: Shop, anna: dict[str, str], end: Callable[[Exchange], None]
) -> None:
    """after_request, call_on_close and both teardowns."""
    path = shop.upstream.serve(end)
    tag = next(TAGS)
    for _ in range(3):
        shop.get("/ai" + path, anna | {"X-Tag": tag})
    each_hook_ran(shop, tag, 3)
    shop.upstream.forget(path)


def test_hooks_fire_once_for_a_head_and_for_what_the_relay_refuses(shop: Shop, anna: dict[str, str]) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(headers=EVENTS, framing="none"))
    for method, target, headers, status in (
        ("HEAD", "/ai" + path, {}, 200),
        ("GET", "/ai/%2e%2e/x", {}, 400),
        ("GET", "/ai" + path, {"Origin": "https://evil.example"}, 403),
    ):
        tag = next(TAGS)
        response = shop.client.request(method, target, anna | headers | {"X-Tag": tag})
        response.finish()
        assert response.status == status
        each_hook_ran(shop, tag)
    shop.upstream.forget(path)


def test_hooks_fire_once_when_the_client_leaves(shop: Shop, anna: dict[str, str]) -> None:
    """Before the answer, and in the middle of it."""
    tag = next(TAGS)
    with opened(shop, anna | {"X-Tag": tag}) as (ex, connection):
        connection.close()
        ex.wait_gone()
        each_hook_ran(shop, tag)
    tag = next(TAGS)
    with opened(shop, anna | {"X-Tag": tag}) as (ex, connection):
        ex.head(headers=EVENTS)
        ex.send(b"data: x\n\n")
        connection.read_head().read_event()
        connection.close()
        ex.wait_gone()
        each_hook_ran(shop, tag)


def test_the_contexts_are_gone_while_the_stream_is_open_and_the_response_is_closed_after_it(
    shop: Shop, anna: dict[str, str]
) -> None:
    tag = next(TAGS)
    while_open = {"after_request": 1, "teardown_request": 1, "teardown_appcontext": 1}
    with opened(shop, anna | {"X-Tag": tag}) as (ex, connection):
        assert shop.ran(tag) == while_open
        ex.head(headers=EVENTS)
        response = connection.read_head()
        ex.send(b"data: x\n\n")
        response.read_event()
        assert shop.ran(tag) == while_open
        ex.end()
        response.finish()
        each_hook_ran(shop, tag)


# --- What comes back


@pytest.mark.parametrize("content_type", [SSE, "application/json"])
def test_what_the_shops_hooks_put_on_the_answer_goes_out(shop: Shop, anna: dict[str, str], content_type: str) -> None:
    """Its session and cookies, its CORS headers in place of the upstream's, the class of its responses."""
    sent: list[Header] = [
        ("Content-Type", content_type),
        ("Set-Cookie", "session=stolen"),
        ("Access-Control-Allow-Origin", "*"),
        ("X-Frame-Options", "ALLOWALL"),
        ("X-Upstreams-Own", "1"),
    ]
    path = shop.upstream.serve(lambda ex: ex.reply(b"data: x\n\n", 203, "So", sent))
    response = shop.get("/ai" + path, anna)
    assert (response.status, response.reason, bytes(response.body)) == (203, b"So", b"data: x\n\n")
    cookies = sorted(value.partition(b"=")[0] for value in response.all("Set-Cookie"))
    assert cookies == [b"basket", b"session"]
    assert b"stolen" not in response.head
    assert response.all("Access-Control-Allow-Origin") == [b"https://pages.shop.example"]
    assert response.all("X-Frame-Options") == [b"DENY"]
    assert response.all("X-Class") == [b"ShopResponse"]
    assert response.all("X-Upstreams-Own") == [b"1"]
    assert response.all("Content-Type") == [content_type.encode()]
    assert b"Origin" in b", ".join(response.all("Vary"))
    assert b"Cookie" in b", ".join(response.all("Vary"))
    shop.upstream.forget(path)


def test_the_shops_cors_headers_win_over_a_transparent_upstreams(shop: Shop, anna: dict[str, str]) -> None:
    """And its cookies stand beside the upstream's, which are wanted there."""
    sent: list[Header] = [("Access-Control-Allow-Origin", "*"), ("Set-Cookie", "theirs=1"), ("Vary", "Accept")]
    shop.second.serve(lambda ex: ex.reply(b"{}", headers=sent), "/models")
    response = shop.get("/other/v2/models", anna)
    assert response.all("Access-Control-Allow-Origin") == [b"https://pages.shop.example"]
    cookies = sorted(value.partition(b"=")[0] for value in response.all("Set-Cookie"))
    assert cookies == [b"basket", b"session", b"theirs"]
    assert b"Accept" in b", ".join(response.all("Vary"))
    shop.second.forget("/models")


def test_the_shops_session_never_goes_upstream(shop: Shop, anna: dict[str, str]) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"{}"))
    shop.get("/ai" + path, anna | {"X-CSRFToken": "secret", "X-Beside": "1"})
    (ex,) = shop.upstream.seen(path)
    assert (ex.all("Cookie"), ex.all("X-CSRFToken"), ex.all("X-Beside")) == ([], [], [b"1"])
    shop.upstream.forget(path)


def test_event_streams_and_sandbox_stay_as_they_must_be(shop: Shop, anna: dict[str, str]) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"data: x\n\n", headers=EVENTS))
    response = shop.get("/ai" + path, anna)
    assert response.all("Cache-Control") == [b"no-cache, no-store, no-transform"]
    assert response.all("X-Accel-Buffering") == [b"no"]
    assert response.all("X-Content-Type-Options") == [b"nosniff"]
    assert b"sandbox" in (response.header("Content-Security-Policy") or b"")
    shop.upstream.forget(path)


def json_error(response: Response, status: int) -> dict[str, str]:
    body = response.finish().data
    assert response.status == status, body
    assert response.header("Content-Type") == b"application/json"
    error: dict[str, str] = json.loads(body)["error"]
    assert sorted(error) == ["code", "message", "request_id", "type"]
    assert error["request_id"].encode() == response.header("X-Request-ID")
    return error


def test_the_relays_errors_are_json_in_a_shop_with_strict_pages(shop: Shop, anna: dict[str, str]) -> None:
    html = anna | {"Accept": "text/html"}
    json_error(shop.client.request("GET", "/ai/%2e%2e/x", html), 400)
    json_error(shop.client.request("GET", "/ai/x", html | {"Origin": "https://evil.example"}), 403)
    json_error(shop.client.request("DELETE", "/other/v2/files/x", html), 403)
    path = shop.upstream.serve(lambda ex: ex.abort())
    error = json_error(shop.client.request("POST", "/ai" + path, html, b"{}"), 502)
    assert error["code"] == "upstream_error"
    shop.upstream.forget(path)


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "BREW"])
def test_a_method_that_is_not_relayed_is_a_405_in_json_here_too(shop: Shop, anna: dict[str, str], method: str) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"ok"))
    with Connection(shop.port) as connection:
        assert json_error(connection.request(method, "/ai" + path, anna), 405)["code"] == "method_not_allowed"
    assert shop.upstream.seen(path) == []
    shop.upstream.forget(path)


def test_the_upstreams_404_and_500_are_its_own_and_not_the_shops_pages(shop: Shop, anna: dict[str, str]) -> None:
    for status in (401, 404, 500):
        path = shop.upstream.serve(lambda ex, status=status: ex.reply(b"of the upstream", status))  # type: ignore[misc]
        response = shop.get("/ai" + path, anna)
        assert (response.status, bytes(response.body)) == (status, b"of the upstream")
        shop.upstream.forget(path)


def test_a_foreign_host_is_the_shops_affair(shop: Shop, anna: dict[str, str]) -> None:
    """A mounted relay is as open as its shop; only strange origins are not."""
    path = shop.upstream.serve(lambda ex: ex.reply(b"ok"))
    assert shop.get("/ai" + path, anna | {"Host": "shop.example"}).status == 200
    own = {"Host": "shop.example", "Origin": "https://shop.example", "Sec-Fetch-Site": "same-origin"}
    assert shop.get("/ai" + path, anna | own).status == 200
    shop.upstream.forget(path)


# --- Other mounts


@contextlib.contextmanager
def factory(upstreams: tuple[Upstream, Upstream], app: str) -> Iterator[tuple[Client, Upstream]]:
    with gevent(f"shops.factory:{app}", environment(upstreams)) as server, Client(server.port) as client:
        yield client, upstreams[0]
    upstreams[0].check()


MOUNTS = [
    pytest.param("create_app()", "", {}, id="factory"),
    pytest.param("dispatched", "/shop", {}, id="dispatcher"),
    pytest.param("proxied", "", {"X-Forwarded-Prefix": "/outside"}, id="proxy-fix"),
]


@pytest.mark.parametrize(("app", "mounted", "headers"), MOUNTS)
def test_the_raw_path_below_the_mount_goes_upstream_wherever_the_shop_is(
    upstreams: tuple[Upstream, Upstream], app: str, mounted: str, headers: dict[str, str]
) -> None:
    with factory(upstreams, app) as (client, upstream):
        home = client.request("GET", mounted + "/", headers).finish().data.decode()
        assert home == f"home is {mounted or headers.get('X-Forwarded-Prefix', '')}/"
        for target in ("/x", "/a%2Fb//c;d?x=%20&y", "//x", "/shop/ai/x", "/%61%69/x?", "/ai/ai%2Fai"):
            path = target.partition("?")[0]
            upstream.serve(lambda ex: ex.reply(b"ok"), path)
            response = client.request("POST", f"{mounted}/ai{target}", headers, b"{}")
            assert (response.status, response.finish().data) == (200, b"ok")
            assert [ex.target for ex in upstream.seen(path)] == [b"/first/v1" + target.encode()]
            upstream.forget(path)
        response = client.request("GET", f"{mounted}/ai/x", headers | {"X-Member": "no"})
        assert (response.status, response.finish().data) == (402, b"members only")
        assert client.request("GET", f"{mounted}/ai/_relay/health/live", headers).finish().data.find(b'"ok"') > 0


def test_it_keeps_wsgis_rules(upstreams: tuple[Upstream, Upstream]) -> None:
    """PEP 3333 by wsgiref's validator, around every kind of answer; what it finds is a traceback in the log."""
    env = environment(upstreams)
    with gthread("shops.factory:checked", env) as server, Client(server.port) as client:
        upstream = upstreams[0]
        for method, handler in (
            ("GET", lambda ex: ex.reply(b"data: x\n\n", headers=EVENTS, framing="chunked")),
            ("POST", lambda ex: ex.reply(b"data: x\n\n", headers=EVENTS, framing="close")),
            ("GET", lambda ex: ex.reply(b"{}", headers=[("Content-Type", "application/json")])),
            ("POST", lambda ex: ex.reply(b"", headers=[("Content-Type", "application/json")])),
            ("DELETE", lambda ex: ex.reply(status=204, reason="No Content", framing="none")),
            ("GET", lambda ex: ex.reply(status=304, framing="none")),
            ("HEAD", lambda ex: ex.reply(headers=EVENTS, framing="none")),
            ("GET", lambda ex: ex.abort()),
            ("GET", cut),
        ):
            path = upstream.serve(handler)
            response = client.request(method, "/ai" + path, body=b"{}" if method == "POST" else b"")
            response.finish()
            assert response.status in (200, 204, 304, 502)
            upstream.forget(path)
        for path in ("/", "/ai/_relay/health", "/ai/%2e%2e/x", "/nothing"):
            client.request("GET", path).finish()
        assert "garbage collected without being closed" not in server.log()


# --- In the test's own process: no server


def test_every_fault_in_a_shops_settings_is_told_at_once() -> None:
    app = Flask("shop")
    app.config.update(RELAY_UPSTREAM_URL="ftp://x", RELAY_HEARTBEAT="soon", RELAY_UPSTREM_KEY="sk-secret")
    with pytest.raises(SettingsError) as caught:
        Relay(app, url_prefix="/ai")
    assert len(caught.value.faults) == 3
    for name in ("RELAY_UPSTREAM_URL", "RELAY_HEARTBEAT", "RELAY_UPSTREM_KEY"):
        assert name in str(caught.value)
    assert "RELAY_UPSTREAM_KEY" in str(caught.value)  # the suggestion
    assert "sk-secret" not in str(caught.value)
    with pytest.raises(SettingsError, match="RELAY_UPSTREAM_URL"):
        Relay().init_app(Flask("without an upstream"))
    with pytest.raises(SettingsError, match="RELAY_MAX_BODY"):
        Relay(Flask("shop"), settings={"RELAY_UPSTREAM_URL": "http://127.0.0.1:9", "RELAY_MAX_BODY": "much"})


def test_a_mounted_relay_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a faulty one: only the app's config and what is passed to it."""
    monkeypatch.setenv("RELAY_HEARTBEAT", "soon")
    monkeypatch.setenv("RELAY_UPSTREAM_URL", "http://127.0.0.1:9")
    with pytest.raises(SettingsError, match="RELAY_UPSTREAM_URL is not set"):
        Relay(Flask("shop"), url_prefix="/ai")
    Relay(Flask("shop"), url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": "http://127.0.0.1:9"})


def test_two_relays_in_an_app_need_two_names() -> None:
    app = Flask("shop")
    app.config["RELAY_UPSTREAM_URL"] = "http://127.0.0.1:9"
    Relay(app, url_prefix="/a")
    with pytest.raises(ValueError, match="name"):
        Relay(app, url_prefix="/b")
    Relay(app, name="b", url_prefix="/b")
    assert {rule.rule.split("/")[1] for rule in app.url_map.iter_rules() if rule.endpoint != "static"} == {"a", "b"}


def test_two_relays_in_an_app_need_two_prefixes() -> None:
    """The second would never be called, and nothing would say so."""
    app = Flask("shop")
    app.config["RELAY_UPSTREAM_URL"] = "http://127.0.0.1:9"
    Relay(app, url_prefix="/a")
    with pytest.raises(ValueError, match="the app has a relay at /a already"):
        Relay(app, name="b", url_prefix="/a/")
    with pytest.raises(ValueError, match="url_prefix must begin with a slash: 'b'"):
        Relay(app, name="b", url_prefix="b")
    Relay(app, name="b", url_prefix="/a/b")
    Relay(app, name="root", url_prefix="/")


def test_one_extension_serves_several_apps() -> None:
    """As a test suite makes an app for each test."""
    relay = Relay(url_prefix="/ai")
    for n in range(3):
        app = Flask(f"shop {n}")
        app.config["RELAY_UPSTREAM_URL"] = "http://127.0.0.1:9/v1"
        relay.init_app(app)
        report: Any = app.test_client().get("/ai/_relay/health/live")
        assert (report.status_code, report.json["status"]) == (200, "ok")


QUIET = """
import os, sys, threading
connects = []
sys.addaudithook(lambda event, args: connects.append(args) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"
) else None)
from flask import Flask
from relay import Relay
app = Flask("shop")
app.config["RELAY_UPSTREAM_URL"] = "https://upstream.example/v1"
relay = Relay(app, url_prefix="/ai")
settings = {"RELAY_UPSTREAM_URL": "http://127.0.0.1:9", "RELAY_UPSTREAM_KEY": "k"}
Relay(name="second", url_prefix="/b", settings=settings).init_app(app)
files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
links = [os.readlink(file) for file in files if os.path.lexists(file)]
sockets = [link for link in links if link.startswith(("socket:", "anon_inode:"))]
print(connects, sockets, [thread.name for thread in threading.enumerate()], "gevent" in sys.modules)
"""


def test_importing_and_mounting_opens_no_socket_and_starts_no_thread() -> None:
    """Celery workers, migrations and shells import the app too; nor is gevent loaded into them."""
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        cwd=REPO,
        env=servers.environment({}),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[] [] ['MainThread'] False"


def test_importing_the_package_imports_neither_flask_nor_requests() -> None:
    heavy = "{'flask', 'requests', 'ssl', 'urllib3', 'gevent'}"
    code = f"import sys, relay, relay.settings; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env=servers.environment({}),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
