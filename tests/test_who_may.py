"""A key that the relay adds opens only the paths that were meant, to whom it was meant; no stranger's page spends it.

Whatever is refused has never reached the upstream.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE, eventually, servers
from harness.client import Client
from harness.upstream import Upstream

from relay.settings import Settings
from relay.web.mount import Mount

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Service
    from harness.client import Headers, Response
    from harness.servers import Gunicorn
    from harness.upstream import Exchange

KEY = {"RELAY_UPSTREAM_KEY": "sk-the-relays-own"}
ORIGINS = {"RELAY_CORS_ORIGINS": "https://shop.example, http://localhost:3000"}


def _welcome(ex: Exchange) -> None:
    ex.reply(b"" if ex.method == b"HEAD" else b"welcome")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(_welcome) as upstream:
        yield upstream


class Relay:
    """A relay with settings of its own in front of the upstream that they all share."""

    def __init__(self, upstream: Upstream, server: Gunicorn, client: Client) -> None:
        self.upstream = upstream
        self.server = server
        self.client = client
        self.port = client.port

    def call(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> tuple[Response, int]:
        """The answer, read to its end, and how many requests of it have reached the upstream."""
        before = len(self.upstream.seen())
        response = self.client.request(method, target, headers, body)
        response.finish()
        return response, len(self.upstream.seen()) - before

    def passes(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> None:
        response, reached = self.call(method, target, headers, body)
        assert (response.status, reached) == (200, 1), bytes(response.body)
        assert bytes(response.body) == (b"" if method == "HEAD" else b"welcome")

    def refuses(self, code: str, method: str, target: str, headers: Headers = (), body: bytes = b"") -> None:
        response, reached = self.call(method, target, headers, body)
        assert (response.status, reached) == (403, 0)
        if method == "HEAD":
            return
        error = json.loads(response.body)["error"]
        assert (error["code"], error["type"]) == (code, "permission_error")
        assert sorted(error) == ["code", "message", "request_id", "type"]
        # Nobody is told what is kept from them.
        assert "sk-the-relays-own" not in bytes(response.body).decode()
        assert not [name for name, _ in response.headers if name.lower().startswith(b"access-control")]


@contextlib.contextmanager
def relaying(upstream: Upstream, settings: dict[str, str]) -> Iterator[Relay]:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, **settings}
    with servers.gunicorn(env) as server, Client(server.port) as client:
        yield Relay(upstream, server, client)
    upstream.check()


@pytest.fixture(scope="module")
def keyed(upstream: Upstream) -> Iterator[Relay]:
    """With an upstream key, two origins that may call, and nothing else."""
    with relaying(upstream, KEY | ORIGINS) as relay:
        yield relay


@pytest.fixture(scope="module")
def keyed_behind_nginx(keyed: Relay) -> Iterator[Relay]:
    with servers.nginx(keyed.port, keyed.server.admin_port) as nginx, Client(nginx.port) as client:
        yield Relay(keyed.upstream, keyed.server, client)


@pytest.fixture(params=["keyed", "keyed_behind_nginx"], ids=["gunicorn", "nginx"])
def either(request: pytest.FixtureRequest) -> Relay:
    relay: Relay = request.getfixturevalue(request.param)
    return relay


@pytest.fixture(scope="module")
def for_anyone(upstream: Upstream) -> Iterator[Relay]:
    with relaying(upstream, KEY | {"RELAY_ALLOW_ANONYMOUS": "on", "RELAY_ALLOW": "*"}) as relay:
        yield relay


@pytest.fixture(scope="module")
def for_any_origin(upstream: Upstream) -> Iterator[Relay]:
    with relaying(upstream, KEY | {"RELAY_CORS_ORIGINS": "*"}) as relay:
        yield relay


# --- What may be called

ALLOWED = [
    ("POST", "chat/completions"),
    ("POST", "completions"),
    ("POST", "responses"),
    ("POST", "messages"),
    ("POST", "messages/count_tokens"),
    ("POST", "embeddings"),
    ("GET", "models"),
    ("GET", "models/x"),
    ("GET", "models/gpt-4.1?a=b"),
    ("GET", "models/org%2Fmodel"),
    ("HEAD", "models"),
    ("HEAD", "models/x"),
    ("POST", "chat/completions?api-version=1"),
]
NOT_ALLOWED = [
    ("DELETE", "files/x"),
    ("GET", "files"),
    ("POST", "files"),
    ("POST", "fine_tuning/jobs"),
    ("GET", "organization/usage"),
    ("GET", ""),
    ("GET", "/"),
    ("DELETE", "models/x"),
    ("POST", "models"),
    ("GET", "models/"),
    ("GET", "models/x/y"),
    ("GET", "/models"),
    ("GET", "models//x"),
    ("GET", "models%2Fx"),
    ("GET", "models;x"),
    ("GET", "modelsx"),
    ("GET", "Models"),
    ("GET", "chat/completions"),
    ("GET", "chat/completions/id"),
    ("PUT", "chat/completions"),
    ("PATCH", "chat/completions"),
    ("DELETE", "chat/completions"),
    ("OPTIONS", "chat/completions"),
    ("HEAD", "chat/completions"),
    ("POST", "chat/completions/"),
    ("POST", "chat//completions"),
    ("POST", "/chat/completions"),
    ("POST", "chat%2Fcompletions"),
    ("POST", "chat/%63ompletions"),
    ("POST", "chat/completions%00"),
    ("POST", "chat/completions%0a"),
    ("POST", "chat/completions%3Fx"),
    ("POST", "x/chat/completions"),
    ("POST", "responses/id/cancel"),
    ("POST", "v1/chat/completions"),
]


@pytest.mark.parametrize(("method", "path"), ALLOWED)
def test_with_a_key_inference_and_models_are_open(either: Relay, method: str, path: str) -> None:
    either.passes(method, f"/v1/{path}", body=b"{}" if method == "POST" else b"")


@pytest.mark.parametrize(("method", "path"), NOT_ALLOWED)
def test_with_a_key_nothing_else_reaches_the_upstream(keyed: Relay, method: str, path: str) -> None:
    keyed.refuses("path_not_allowed", method, f"/v1/{path}", body=b"{}" if method == "POST" else b"")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-HTTP-Method-Override", "DELETE"),
        ("X-HTTP-Method", "DELETE"),
        ("X-Method-Override", "DELETE"),
        ("X-Original-URL", "/v1/files"),
        ("X-Rewrite-URL", "/v1/files"),
    ],
)
def test_no_header_turns_what_may_be_called_into_what_may_not(keyed: Relay, name: str, value: str) -> None:
    """Some servers take the method or the path from these."""
    keyed.passes("GET", "/v1/models/x", {name: value})
    assert keyed.upstream.seen()[-1].all(name) == []


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("path", ["files/x", "anything/at//all", "chat/completions"])
def test_without_a_key_everything_is_open(service: Service, method: str, path: str) -> None:
    """The upstream judges by the client's own key."""
    before = len(service.upstream.seen())
    response = service.client.request(method, f"/v1/{path}", {"Authorization": "Bearer the-clients-own"})
    assert response.finish().data == b'{"error":{"message":"unscripted"}}'
    assert len(service.upstream.seen()) == before + 1
    assert service.upstream.seen()[-1].all("Authorization") == [b"Bearer the-clients-own"]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"RELAY_UPSTREAM_HEADERS": '{"X-Api-Key": "sk-the-relays-own"}'}, id="among-the-headers"),
        pytest.param({"RELAY_UPSTREAM_QUERY": "a=b&key=sk-the-relays-own"}, id="in-the-query"),
        pytest.param(KEY | {"RELAY_UPSTREAM_KEY_HEADER": "api-key"}, id="in-a-header-of-another-name"),
    ],
)
def test_a_key_is_a_key_wherever_it_stands(upstream: Upstream, settings: dict[str, str]) -> None:
    with relaying(upstream, settings) as relay:
        relay.passes("GET", "/v1/models/x")
        relay.refuses("path_not_allowed", "DELETE", "/v1/files/x")
        relay.refuses("address_not_allowed", "GET", "/v1/models", {"X-Forwarded-For": "203.0.113.7"})


def test_relay_allow_says_what_is_open_with_a_key_and_without(upstream: Upstream) -> None:
    for settings in ({}, KEY):
        with relaying(upstream, settings | {"RELAY_ALLOW": "GET feeds/**, POST hooks/*"}) as relay:
            relay.passes("GET", "/v1/feeds/a/b")
            relay.passes("HEAD", "/v1/feeds/a")
            relay.passes("POST", "/v1/hooks/a")
            relay.refuses("path_not_allowed", "POST", "/v1/hooks/a/b")
            relay.refuses("path_not_allowed", "POST", "/v1/chat/completions")
            relay.refuses("path_not_allowed", "GET", "/v1/models")


# --- Pages of strangers

FOREIGN = [
    "https://evil.example",
    "http://evil.example",
    "null",
    "",
    "file://",
    "chrome-extension://abcdefghijklmnop",
    "http://127.0.0.1.evil.example:{port}",
    "http://evil.example:{port}",
    "http://127.0.0.1:1",
    "http://127.0.0.1",
    "http://127.0.0.2:{port}",
    "http://localhost:{port}",  # the Host is 127.0.0.1
    "http://[::1]:{port}",
    "http://localhost:3001",
    "https://localhost:3000",
    "https://shop.example.evil.example",
    "https://sub.shop.example",
    "https://shop.example:8443",
    "http://shop.example",
    "https://shop.example/",
    "https://SHOP.example",
    "https://shop.example, https://evil.example",
    "http://evil.example@127.0.0.1:{port}:1",
    "//127.0.0.1:{port}",
    "127.0.0.1:{port}",
    "gopher://127.0.0.1:{port}",
    "http://127.0.0.1:{port}x",
    "http://[127.0.0.1:{port}",
    "*",
]


@pytest.mark.parametrize("origin", FOREIGN)
def test_a_page_of_a_strange_origin_is_refused(either: Relay, origin: str) -> None:
    headers = {"Origin": origin.format(port=either.port)}
    for method, path in (("POST", "chat/completions"), ("GET", "models"), ("OPTIONS", "chat/completions")):
        either.refuses("origin_not_allowed", method, f"/v1/{path}", headers, b"{}" if method == "POST" else b"")


def test_one_strange_origin_among_two_is_enough_to_be_refused(keyed: Relay) -> None:
    for origins in (("https://shop.example", "https://evil.example"), ("https://evil.example", "https://shop.example")):
        keyed.refuses("origin_not_allowed", "GET", "/v1/models", [("Origin", origin) for origin in origins])


def test_a_strange_page_is_refused_without_a_key_too(service: Service) -> None:
    """It could spend what a cookie or an address opens upstream, and read what is for this machine only."""
    before = len(service.upstream.seen())
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        response = service.client.request("GET", "/v1/models", headers)
        assert json.loads(response.finish().data)["error"]["code"] == "origin_not_allowed"
        assert response.status == 403
    assert len(service.upstream.seen()) == before


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "shop.localhost", "[::1]"])
def test_a_page_of_the_relays_own_origin_passes(either: Relay, host: str, site: str) -> None:
    origin = f"http://{host.lower()}:{either.port}"
    headers = {"Host": f"{host}:{either.port}", "Origin": origin, "Sec-Fetch-Site": site}
    either.passes("POST", "/v1/chat/completions", headers, b"{}")


@pytest.mark.parametrize(
    ("host", "origin"), [("localhost", "http://localhost"), ("localhost:443", "https://localhost")]
)
def test_a_default_port_may_be_left_out_of_either(keyed: Relay, host: str, origin: str) -> None:
    keyed.passes("POST", "/v1/chat/completions", {"Host": host, "Origin": origin}, b"{}")


@pytest.mark.parametrize("origin", ["https://shop.example", "http://localhost:3000"])
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_a_configured_origin_passes(either: Relay, origin: str, site: str) -> None:
    either.passes("POST", "/v1/chat/completions", {"Origin": origin, "Sec-Fetch-Site": site}, b"{}")


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Sec-Fetch-Site": "cross-site"}, id="alone"),
        pytest.param(
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, id="image"
        ),
        pytest.param({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, id="link"),
        pytest.param({"Sec-Fetch-Site": "cross-site", "Referer": "http://127.0.0.1/"}, id="with-a-referer"),
    ],
)
def test_what_the_browser_marks_cross_site_is_refused(either: Relay, headers: dict[str, str]) -> None:
    """No Origin comes with an image, a script or a link, and yet they would spend the key."""
    either.refuses("origin_not_allowed", "GET", "/v1/models", headers)


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
def test_what_the_browser_marks_otherwise_passes(either: Relay, site: str) -> None:
    either.passes("GET", "/v1/models", {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "cors"})


@pytest.mark.parametrize("headers", [{}, {"User-Agent": "curl/8.0", "Accept": "*/*"}, {"Authorization": "Bearer x"}])
def test_a_program_passes(either: Relay, headers: dict[str, str]) -> None:
    """curl and the SDKs send neither Origin nor Sec-Fetch-Site."""
    either.passes("POST", "/v1/chat/completions", headers, b"{}")


def test_any_origin_may_call_where_that_is_configured(for_any_origin: Relay) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        for_any_origin.passes("POST", "/v1/chat/completions", headers, b"{}")


def test_health_is_no_secret_of_a_pages(keyed: Relay) -> None:
    """Probes and uptime checks have all sorts of origins and hosts; what they are told costs and reveals nothing."""
    for headers in ({"Origin": "https://evil.example"}, {"Host": "relay.example"}, {"Sec-Fetch-Site": "cross-site"}):
        response = keyed.client.request("GET", "/health/live", headers)
        assert (response.status, response.finish().ended) == (200, "clean")


# --- GETs that cost money

#: By a name over plain http, where browsers send no Sec-Fetch-Site, and nothing else by which a page shows.
LAN = {"Host": "relay.lan"}
PROMPT = "/chat/stream?prompt=hi"


@pytest.mark.parametrize("target", [PROMPT, "/v1/paid/feed"])
@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(LAN, id="an-image"),
        pytest.param(LAN | {"Accept": "text/event-stream", "Range": "bytes=0-"}, id="with-safelisted-headers"),
        pytest.param(LAN | {"Referer": "http://evil.example/"}, id="a-link"),
        pytest.param(LAN | {"Referer": "http://relay.lan.evil.example/"}, id="a-longer-name"),
        pytest.param(LAN | {"Referer": "http://relay.lan:8080/"}, id="another-port"),
        pytest.param(LAN | {"Authorization": "Basic dTpw"}, id="a-login-that-browsers-send-by-themselves"),
        pytest.param({"Host": "192.168.1.5:8000"}, id="an-address"),
        pytest.param({"Host": "localhost", "Sec-Fetch-Site": "same-site"}, id="another-port-of-localhost"),
        pytest.param(LAN | {"X-Forwarded-Proto": "http"}, id="plain-http-before-the-proxy"),
    ],
)
def test_a_get_that_costs_money_must_not_be_a_foreign_pages(
    for_anyone: Relay, target: str, headers: dict[str, str]
) -> None:
    for_anyone.refuses("origin_not_allowed", "GET", target, headers)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="a-program-on-loopback"),
        pytest.param(LAN | {"X-Requested-With": "curl"}, id="a-word-that-a-page-cannot-say"),
        pytest.param(LAN | {"Authorization": "Bearer anything"}, id="a-bearer"),
        pytest.param(LAN | {"Referer": "http://relay.lan/page"}, id="the-relays-own-page"),
        pytest.param({"Host": "relay.lan:8080", "Referer": "http://relay.lan:8080/"}, id="on-its-port"),
        pytest.param(LAN | {"Sec-Fetch-Site": "same-origin"}, id="marked-as-its-own"),
        pytest.param(LAN | {"Sec-Fetch-Site": "none"}, id="typed-by-a-person"),
        pytest.param(LAN | {"X-Forwarded-Proto": "https"}, id="https-before-the-proxy"),
    ],
)
def test_a_get_that_says_who_made_it_passes(for_anyone: Relay, headers: dict[str, str]) -> None:
    for_anyone.passes("GET", "/v1/paid/feed", headers)


def test_the_list_of_models_costs_nothing(for_anyone: Relay) -> None:
    for path in ("/v1/models", "/v1/models/gpt-4.1"):
        for_anyone.passes("GET", path, LAN)


@pytest.mark.slow
def test_a_foreign_page_in_a_browser_cannot_spend_the_key(for_anyone: Relay, upstream: Upstream) -> None:
    """Every way by which a page makes a GET without asking, and a form, over plain http to a name."""
    from harness.browser import chromium, new_page

    target = f"http://relay.lan:{for_anyone.port}"
    get, post = f"{target}/chat/stream?prompt=hi", f"{target}/v1/chat/completions"
    page_of_a_stranger = f"""<!doctype html><img src="{get}"><script src="{get}"></script>
        <link rel="stylesheet" href="{get}"><iframe src="{get}"></iframe>
        <form id="form" method="post" enctype="text/plain" target="frame" action="{post}"><input name="a"></form>
        <iframe name="frame"></iframe><a id="link" rel="noreferrer" target="other" href="{get}">x</a>
        <script>
          const ignored = () => undefined;
          document.getElementById("form").submit();
          document.getElementById("link").click();
          navigator.sendBeacon("{post}", "{{}}");
          fetch("{get}", {{ mode: "no-cors", headers: {{ Accept: "text/event-stream" }} }}).catch(ignored);
          fetch("{post}", {{ method: "POST", mode: "no-cors", body: "{{}}" }}).catch(ignored);
          new EventSource("{get}");
        </script>"""

    def serve(ex: Exchange) -> None:
        ex.reply(page_of_a_stranger.encode(), headers=[("Content-Type", "text/html")])

    before = len(upstream.seen())
    with Upstream(serve) as stranger, chromium("relay.lan") as browser, new_page(browser) as (page, console):
        console.expect("relay.lan")
        console.expect("403")
        page.goto(f"{stranger.base_url}/page")
        page.wait_for_load_state("networkidle")
        eventually(lambda: for_anyone.server.log().count("origin_not_allowed") >= 8, "all of it is refused")
        assert len(upstream.seen()) == before


# --- Redirects, and paths that are not the mount


@pytest.mark.parametrize(
    ("status", "method", "location", "headers", "passes"),
    [
        pytest.param(307, "POST", "https://evil.example/v1", {}, False, id="307"),
        pytest.param(308, "GET", "//evil.example/", {}, False, id="308-without-a-scheme"),
        pytest.param(308, "POST", "/\\evil.example/", {}, False, id="a-backslash"),
        pytest.param(307, "POST", "https:evil.example", {}, False, id="a-scheme-without-slashes"),
        pytest.param(307, "POST", "\thttps://evil.example", {}, False, id="a-tab-before-it"),
        pytest.param(302, "POST", "https://evil.example/", {}, False, id="302-of-a-post"),
        pytest.param(302, "GET", "https://cdn.example/file?sig=1", {}, True, id="a-signed-download"),
        pytest.param(302, "GET", "https://cdn.example/file", {"x-api-key": "k"}, False, id="with-a-key-beside"),
        pytest.param(307, "POST", "/v1/elsewhere", {}, True, id="a-path"),
        pytest.param(308, "GET", "elsewhere?a=https://b.example/", {}, True, id="relative"),
        pytest.param(307, "POST", "http://{host}/v1/x", {}, True, id="to-the-relay-itself"),
        pytest.param(201, "POST", "https://api.example/items/7", {}, True, id="no-redirect"),
    ],
)
def test_a_redirect_takes_no_request_and_no_key_elsewhere(
    service: Service, status: int, method: str, location: str, headers: dict[str, str], passes: bool
) -> None:
    location = location.format(host=f"127.0.0.1:{service.port}")
    path = service.upstream.serve(lambda ex: ex.reply(b"moved", status=status, headers=[("Location", location)]))
    response = service.client.request(method, service.mount + path, {"Authorization": "Bearer k", **headers}, b"")
    body = response.finish().data
    if passes:
        assert response.status == status
        assert response.header("Location") is not None
    else:
        assert (response.status, json.loads(body)["error"]["code"]) == (502, "upstream_redirect")
        assert response.header("Location") is None
        assert b"evil" not in body


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        pytest.param({}, 307, id="nothing-at-stake"),
        pytest.param(KEY, 502, id="a-key-of-the-relays"),
        pytest.param({"RELAY_CLIENT_KEYS": "sk-a-clients"}, 502, id="keys-of-its-clients"),
    ],
)
def test_a_transparent_relay_lets_redirects_lead_away_only_without_a_key(settings: dict[str, str], status: int) -> None:
    def moved(ex: Exchange) -> None:
        ex.reply(b"moved", status=307, headers=[("Location", "https://elsewhere.example/")])

    with Upstream(moved) as upstream, relaying(upstream, settings | {"RELAY_TRANSPARENT": "on"}) as relay:
        response, reached = relay.call("POST", "/v1/chat/completions", {"Authorization": "Bearer sk-a-clients"}, b"{}")
        assert (response.status, reached) == (status, 1)


def test_a_transparent_relay_guards_redirects_where_a_hook_adds_a_key() -> None:
    settings = Settings.from_mapping({"RELAY_UPSTREAM_URL": "http://127.0.0.1:9/v1", "RELAY_TRANSPARENT": "on"})
    assert Mount("relay", settings).trusts_upstream
    assert not Mount("relay", settings, request_headers=dict).trusts_upstream


@pytest.mark.parametrize(
    "target", ["//v1/models", "///v1/models", "/%2Fv1/models", "//health", "//chat/stream?prompt=x"]
)
def test_a_path_that_begins_with_slashes_is_nowhere(for_anyone: Relay, target: str) -> None:
    """A proxy that guards `location /v1/` without merging slashes has not guarded it."""
    response, reached = for_anyone.call("GET", target)
    assert (response.status, reached) == (404, 0)


# --- The admin address


@pytest.fixture(scope="module")
def admin(upstream: Upstream) -> Iterator[Gunicorn]:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_ADMIN_HOSTS": "relay.internal,monitor"}
    with servers.gunicorn(env) as server:
        yield server


def admin_says(server: Gunicorn, path: str, headers: dict[str, str]) -> tuple[int, str]:
    with Client(server.admin_port) as client:
        response = client.request("GET", path, headers)
        body = response.finish().data
    return response.status, json.loads(body)["error"]["code"] if response.status == 403 else ""


@pytest.mark.parametrize("path", ["/metrics", "/streams", "/health", "/health/ready"])
@pytest.mark.parametrize(
    ("headers", "code"),
    [
        pytest.param({"Host": "evil.com"}, "host_not_allowed", id="a-name-that-points-here"),
        pytest.param({"Host": "127.0.0.1.evil.com:8001"}, "host_not_allowed", id="a-longer-name"),
        pytest.param({"Host": "2130706433"}, "host_not_allowed", id="a-number"),
        pytest.param({"Host": "[::1"}, "host_not_allowed", id="a-torn-bracket"),
        pytest.param({"Host": "a@127.0.0.1, evil.com"}, "host_not_allowed", id="two"),
        pytest.param({"Host": "localhost", "Origin": "https://evil.com"}, "origin_not_allowed", id="a-strangers-page"),
        pytest.param({"Host": "localhost", "Origin": "null"}, "origin_not_allowed", id="a-sandboxed-page"),
        pytest.param({"Host": "localhost:1", "Origin": "http://localhost:2"}, "origin_not_allowed", id="another-port"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, "origin_not_allowed", id="an-image"),
        pytest.param({"Sec-Fetch-Site": "same-site"}, "origin_not_allowed", id="an-image-of-another-port"),
    ],
)
def test_the_admin_address_is_for_no_page_and_no_foreign_name(
    admin: Gunicorn, path: str, headers: dict[str, str], code: str
) -> None:
    assert admin_says(admin, path, headers) == (403, code)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Host": "localhost:8001"}, id="localhost"),
        pytest.param({"Host": "LOCALHOST."}, id="in-capitals-with-a-dot"),
        pytest.param({"Host": "10.244.0.17:8001"}, id="a-pods-address"),
        pytest.param({"Host": "[fd00::17]:8001"}, id="an-ipv6-address"),
        pytest.param({"Host": "relay.internal:8001"}, id="a-configured-name"),
        pytest.param({"Host": "Monitor"}, id="another-in-capitals"),
        pytest.param({"Host": "127.0.0.1:8001", "Origin": "http://127.0.0.1:8001"}, id="its-own-page"),
        pytest.param({"Sec-Fetch-Site": "none"}, id="typed-by-a-person"),
        pytest.param({"Sec-Fetch-Site": "same-origin"}, id="marked-as-its-own"),
    ],
)
def test_probes_and_persons_reach_the_admin_address(admin: Gunicorn, headers: dict[str, str]) -> None:
    for path in ("/metrics", "/streams", "/health/live"):
        assert admin_says(admin, path, headers)[0] == 200


# --- Hosts and addresses

FOREIGN_HOSTS = [
    "relay.example",
    "relay.example:{port}",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "notlocalhost",
    "localhost.",
    "0.0.0.0",
    "10.0.0.1",
    "169.254.169.254",
    "[::]",
    "[fe80::1]",
    "2130706433",  # 127.0.0.1 as one number: a name to whom it may concern
    "127.1",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_name_that_somebody_else_points_here_is_refused_without_client_keys(either: Relay, host: str) -> None:
    """DNS rebinding: to the browser the page is of the relay's own origin."""
    name = host.format(port=either.port)
    for headers in ({"Host": name}, {"Host": name, "Origin": f"http://{name}", "Sec-Fetch-Site": "same-origin"}):
        either.refuses("host_not_allowed", "GET", "/v1/models", headers)


def test_a_foreign_name_is_refused_without_a_key_too(service: Service) -> None:
    response = service.client.request("GET", "/v1/models", {"Host": "relay.example"})
    assert (response.status, json.loads(response.finish().data)["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "a.localhost",
        "127.0.0.1",
        "127.0.0.2:80",
        "[::1]",
        "[::1]:8000",
        "[::ffff:127.0.0.1]",
    ],
)
def test_a_loopback_name_passes(either: Relay, host: str) -> None:
    either.passes("GET", "/v1/models", {"Host": host})


def test_the_host_in_an_absolute_target_is_no_way_in(keyed: Relay) -> None:
    """RFC 9112 section 3.2.2 gives it precedence; here it can only be ignored."""
    keyed.refuses("host_not_allowed", "GET", "http://127.0.0.1/v1/models", {"Host": "relay.example"})


def test_any_name_and_address_passes_where_anonymous_clients_are_meant(for_anyone: Relay) -> None:
    for_anyone.passes("GET", "/v1/models", {"Host": "relay.example"})
    for_anyone.passes("GET", "/v1/models", {"X-Forwarded-For": "203.0.113.7"})
    for_anyone.refuses("origin_not_allowed", "GET", "/v1/models", {"Origin": "https://evil.example"})


def test_any_name_and_address_passes_with_a_client_key(upstream: Upstream) -> None:
    with relaying(upstream, KEY | {"RELAY_CLIENT_KEYS": "ck-1"}) as relay:
        headers = {"Authorization": "Bearer ck-1", "Host": "relay.example", "X-Forwarded-For": "203.0.113.7"}
        relay.passes("GET", "/v1/models", headers)
        assert b"ck-1" not in b"".join(value for _, value in upstream.seen()[-1].headers)


AFAR = [
    "203.0.113.7",
    "203.0.113.7:1234",
    "10.0.0.1",
    "192.168.1.1",
    "2001:db8::1",
    "[2001:db8::1]",
    "[2001:db8::1]:443",
    "::ffff:203.0.113.7",
    "0.0.0.0",
    "127.0.0.1, 203.0.113.7",  # what the client has written, and what the proxy has added
    "203.0.113.7, 127.0.0.1",  # through two proxies of ours
    "203.0.113.7,127.0.0.1 , ::1",
    "::1, 2001:db8::1",
]


@pytest.mark.parametrize("forwarded", AFAR)
def test_with_a_key_and_no_client_keys_a_client_from_afar_is_refused(keyed: Relay, forwarded: str) -> None:
    """A tunnel or proxy on this machine that somebody has put in front must not make the key everybody's."""
    keyed.refuses("address_not_allowed", "GET", "/v1/models", {"X-Forwarded-For": forwarded})


@pytest.mark.parametrize(
    ("method", "target", "route", "code"),
    [("GET", "/v1/models?prompt=secret", "relay.relay", "address_not_allowed"), ("GET", "/secret", "", "not_found")],
)
def test_the_log_says_who_was_refused_and_where(keyed: Relay, method: str, target: str, route: str, code: str) -> None:
    """And nothing of the path or query."""
    request_id = f"refused-{code}"
    headers = {"X-Forwarded-For": "6.6.6.6, 203.0.113.7", "X-Request-ID": request_id}
    keyed.call(method, target, headers)
    keyed.server.wait_log(request_id)
    (line,) = [line for line in keyed.server.log().splitlines() if request_id in line]
    assert "secret" not in line
    told = json.loads(line)
    assert (told["event"], told["client"], told["method"], told["route"]) == ("refused", "203.0.113.7", method, route)
    assert told["reason"] == code


def test_a_client_from_afar_is_refused_when_the_proxies_write_lines_of_their_own(keyed: Relay) -> None:
    lines = [("X-Forwarded-For", "203.0.113.7"), ("X-Forwarded-For", "127.0.0.1")]
    keyed.refuses("address_not_allowed", "GET", "/v1/models", lines)


@pytest.mark.parametrize("forwarded", ["unknown", "_hidden", "somebody", "203.0.113", "203.0.113.7.8"])
def test_a_client_whom_the_proxy_does_not_name_is_not_taken_for_the_proxy(keyed: Relay, forwarded: str) -> None:
    keyed.refuses("address_not_allowed", "GET", "/v1/models", {"X-Forwarded-For": forwarded})


@pytest.mark.parametrize(
    "forwarded",
    ["127.0.0.1", "::1", "127.0.0.1:5678", "[::1]:5678", "127.8.9.10", "::ffff:127.0.0.1", "127.0.0.1, ::1", "", ","],
)
def test_a_client_on_this_machine_passes_through_a_proxy(keyed: Relay, forwarded: str) -> None:
    keyed.passes("GET", "/v1/models", {"X-Forwarded-For": forwarded})


@pytest.mark.parametrize("name", ["Forwarded", "X-Real-IP", "True-Client-IP", "CF-Connecting-IP", "X-Client-IP"])
def test_no_other_header_names_the_client(keyed: Relay, name: str) -> None:
    """Neither to let in nor to keep out: one header is believed, and a trusted proxy overwrites it."""
    keyed.passes("GET", "/v1/models", {name: "for=203.0.113.7"})
    keyed.refuses("address_not_allowed", "GET", "/v1/models", {"X-Forwarded-For": "203.0.113.7", name: "127.0.0.1"})


@pytest.mark.parametrize("forwarded", ["203.0.113.7", "127.0.0.1, 203.0.113.7", "unknown"])
def test_what_a_client_of_nginx_writes_about_itself_is_worth_nothing(keyed_behind_nginx: Relay, forwarded: str) -> None:
    """The shipped nginx puts there whom it sees."""
    keyed_behind_nginx.passes("GET", "/v1/models", {"X-Forwarded-For": forwarded})


def test_only_a_trusted_proxy_is_believed(keyed: Relay) -> None:
    """127.0.0.2 is not among RELAY_TRUSTED_PROXIES: whatever it says, it is itself, and the log says so."""
    with socket.create_connection(("127.0.0.1", keyed.port), DEADLINE, ("127.0.0.2", 0)) as sock:
        sock.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 203.0.113.7\r\n"
            b"X-Request-ID: from-127-0-0-2\r\nConnection: close\r\n\r\n"
        )
        with sock.makefile("rb") as file:
            assert file.read().startswith(b"HTTP/1.1 200 ")
    keyed.server.wait_log("from-127-0-0-2")
    (line,) = [line for line in keyed.server.log().splitlines() if "from-127-0-0-2" in line]
    assert json.loads(line)["client"] == "127.0.0.2"


def test_without_a_key_a_client_from_afar_passes(service: Service) -> None:
    """There is nothing of the relay's to spend; and its address is the one that the log has."""
    response = service.client.request("GET", "/v1/x", {"X-Forwarded-For": "203.0.113.7", "X-Request-ID": "from-afar"})
    assert response.finish().data == b'{"error":{"message":"unscripted"}}'
    service.relay.wait_log("from-afar")
    (line,) = [line for line in service.relay.log_since_mark().splitlines() if "from-afar" in line]
    assert json.loads(line)["client"] == "203.0.113.7"
