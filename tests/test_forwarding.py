"""The request goes upstream as it came and the answer comes back as it was, headers by README.md's two lists.

Everything by raw sockets at both ends: what is compared are the bytes on the wire.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from conftest import Service
from harness import servers
from harness.client import Client, Connection, NoResponse, Response
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.client import Headers
    from harness.upstream import Exchange, Framing, Handler, Header

SSE = "text/event-stream"
KEY = "sk-the-relays-own-key"
LIMIT = 65_536  # RELAY_MAX_BODY of the `keyed` service


@pytest.fixture(scope="module")
def based() -> Iterator[Upstream]:
    """An upstream whose URL has a path."""
    with Upstream(base_path="/base/v1") as upstream:
        yield upstream


@contextlib.contextmanager
def serving(upstream: Upstream, settings: dict[str, str]) -> Iterator[Service]:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, **settings}
    with servers.gunicorn(env) as relay, Client(relay.port) as client:
        yield Service("gunicorn", upstream, relay, None, client)
    upstream.check()


@pytest.fixture(scope="module")
def keyed(based: Upstream) -> Iterator[Service]:
    """A service with a key, with headers and a query of its own, and with a small limit for bodies."""
    settings = {
        "RELAY_UPSTREAM_KEY": KEY,
        "RELAY_ALLOW": "*",
        "RELAY_UPSTREAM_HEADERS": '{"anthropic-version": "2023-06-01", "X-Fixed": "caf\u00e9"}',
        "RELAY_UPSTREAM_QUERY": "api-version=2024-10-21&x=%20",
        "RELAY_DROP_HEADERS": "X-Internal-Tenant, user-agent",
        "RELAY_MAX_BODY": str(LIMIT),
    }
    with serving(based, settings) as service:
        yield service


@pytest.fixture(scope="module")
def keyed_by_x_api_key(based: Upstream) -> Iterator[Service]:
    settings = {"RELAY_UPSTREAM_KEY": KEY, "RELAY_UPSTREAM_KEY_HEADER": "x-api-key", "RELAY_ALLOW": "*"}
    with serving(based, settings) as service:
        yield service


@pytest.fixture(scope="module")
def transparent(based: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A transparent service without a key, in an environment full of proxies and passwords."""
    home: Path = tmp_path_factory.mktemp("home")
    netrc = home / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password netrc-password\n")
    netrc.chmod(0o600)
    nobody = "http://somebody:proxy-password@127.0.0.1:9"  # discard: a connect is refused
    environment = {
        name: nobody for proxy in ("http_proxy", "https_proxy", "all_proxy") for name in (proxy, proxy.upper())
    }
    settings = {"RELAY_TRANSPARENT": "on", "HOME": str(home), "NETRC": str(netrc), **environment}
    with serving(based, settings) as service:
        yield service


def call(
    hop: Service,
    method: str = "GET",
    query: str | bytes = b"",
    headers: Headers = (),
    body: bytes | list[bytes] = b"",
    handler: Handler | None = None,
    mount: str = "/v1",
) -> tuple[Exchange, Response]:
    """One request to a path of its own, and its answer, read to the end."""
    path = hop.upstream.serve(handler or (lambda ex: ex.reply(b"" if ex.method == b"HEAD" else b"ok")))
    try:
        target = (mount + path).encode() + (query.encode() if isinstance(query, str) else query)
        response = hop.client.request(method, target, headers, body)
        assert response.finish(30).ended == "clean"
        (ex,) = hop.upstream.seen(path)
        return ex, response
    finally:
        hop.upstream.forget(path)


def answer(hop: Service, headers: list[Header], body: bytes = b"ok", **how: Any) -> Response:
    """The answer to a GET whose upstream replies so."""
    return call(hop, handler=lambda ex: ex.reply(body, headers=headers, **how))[1]


def error_of(response: Response, status: int) -> dict[str, str]:
    """The relay's own error with this status, in its one shape."""
    body = response.finish().data
    assert response.status == status, body
    assert response.header("Content-Type") == b"application/json"
    error: dict[str, str] = json.loads(body)["error"]
    assert sorted(error) == ["code", "message", "request_id", "type"]
    assert error["request_id"].encode() == response.header("X-Request-ID")
    return error


# --- Headers that go upstream


def test_the_relay_adds_its_own_three_headers_and_nothing_of_its_library(hop: Service) -> None:
    """No User-Agent, Accept, Connection or Cookie that the client did not send; Host is the upstream's."""
    ex, response = call(hop)
    request_id = response.header("X-Request-ID") or b""
    assert sorted(ex.headers) == [
        (b"Accept-Encoding", b"identity"),
        (b"Host", b"127.0.0.1:%d" % hop.upstream.port),
        (b"X-Request-ID", request_id),
    ]
    assert (ex.method, ex.version) == (b"GET", b"HTTP/1.1")


def test_a_body_adds_its_length_and_nothing_else(hop: Service) -> None:
    ex, _ = call(hop, "POST", headers={"Content-Type": "application/json"}, body=b"{}")
    names = sorted(name for name, _ in ex.headers)
    assert names == [b"Accept-Encoding", b"Content-Length", b"Content-Type", b"Host", b"X-Request-ID"]
    assert (ex.header("Content-Length"), ex.body) == (b"2", b"{}")


PASSED_ON = [
    ("Accept", b"text/event-stream"),
    ("Accept-Language", b"de, en;q=0.5"),
    ("Anthropic-Beta", b"a, b"),
    ("Authorization", b"Bearer the-clients-own"),
    ("Api-Key", b"the-clients-own"),
    ("X-Api-Key", b"the-clients-own"),
    ("Cache-Control", b"no-cache"),
    ("Content-Encoding", b"gzip"),
    ("Content-Type", b'application/json; charset="utf-8"; x=\xe9'),
    ("Idempotency-Key", b"\xe2\x82\xac"),
    ("If-None-Match", b'"abc", W/"def"'),
    ("Last-Event-ID", "überholt-€-😀".encode()),
    ("Last-Event-ID", b"\xff\xfe latin \xe9"),
    ("OpenAI-Organization", b"org-1"),
    ("Range", b"bytes=0-99"),
    ("Traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ("User-Agent", b'curl/8.0 (with; odd="chars" \\ , and a\ttab)'),
    ("X-Stainless-Retry-Count", b"0"),
    ("X-Empty", b""),
    ("X-Long", b"x" * 8192),
]


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(*pair, id=f"{pair[0]}-{i}") for i, pair in enumerate(PASSED_ON)]
)
def test_a_header_of_the_clients_goes_upstream_with_its_bytes(hop: Service, name: str, value: bytes) -> None:
    ex, _ = call(hop, "POST", headers=[(name, value)], body=b"x")
    assert ex.all(name) == [value]


def test_a_repeated_header_arrives_with_all_its_values(hop: Service) -> None:
    ex, _ = call(hop, headers=[("X-Many", "a"), ("X-Other", "b"), ("X-Many", "c, d")])
    assert [value.strip() for line in ex.all("X-Many") for value in line.split(b",")] == [b"a", b"c", b"d"]


NEVER_UPSTREAM = """
    Keep-Alive Proxy-Connection TE Trailer Upgrade Proxy-Authenticate Proxy-Authorization HTTP2-Settings
    Cookie Cookie2 Referer Sec-Fetch-Mode Sec-CH-UA Sec-WebSocket-Key Sec-Anything
    Proxy-Foo X-Forwarded-For X-Forwarded-Proto X-Forwarded-Host X-Forwarded-Port X-Forwarded-Prefix X-Forwarded-Foo
    Forwarded X-Real-IP Via CF-Connecting-IP CF-Ray CF-Access-Foo CDN-Loop True-Client-IP X-Amzn-Trace-Id
    X-Amzn-Oidc-Foo X-MS-Client-Principal X-MS-Token-Foo X-Goog-IAP-JWT-Assertion X-Goog-IAP-Foo
    X-Auth-Request-User X-Auth-Request-Foo
    Remote-User Remote-Foo X-CSRFToken X-CSRF-Token X-XSRF-TOKEN
""".split()


@pytest.mark.parametrize("spelt", [str, str.lower, str.upper], ids=["as-usual", "lower", "upper"])
@pytest.mark.parametrize("name", NEVER_UPSTREAM)
def test_a_header_that_is_not_the_upstreams_business_stays_here(hop: Service, name: str, spelt: Any) -> None:
    value = "127.0.0.1" if name.startswith(("X-Forwarded", "X-Real")) else "trailers" if name == "TE" else "marker-7f"
    ex, _ = call(hop, headers=[(spelt(name), value), ("X-Beside", "1")])
    assert ex.all(name) == []
    assert ex.all("X-Beside") == [b"1"]
    assert not any(b"marker-7f" in value for _, value in ex.headers)


def test_the_pages_own_origin_is_checked_and_not_passed_on(hop: Service) -> None:
    ex, _ = call(hop, headers={"Origin": f"http://127.0.0.1:{hop.port}", "Sec-Fetch-Site": "same-origin"})
    assert ex.all("Origin") == []


@pytest.mark.parametrize("value", ["gzip, deflate, br, zstd", "*", "identity;q=0", ""])
def test_the_upstream_is_asked_for_identity_whatever_the_client_takes(hop: Service, value: str) -> None:
    ex, _ = call(hop, headers={"Accept-Encoding": value})
    assert ex.all("Accept-Encoding") == [b"identity"]


@pytest.mark.parametrize(
    "connection",
    [
        pytest.param("X-Hop", id="one"),
        pytest.param("keep-alive, x-hop", id="among-others"),
        pytest.param("close ,\tX-HOP", id="with-close"),
    ],
)
def test_a_header_that_the_clients_connection_names_stays_here(service: Service, connection: str) -> None:
    """Not through nginx, which replaces `Connection` before the relay could read it."""
    ex, _ = call(service, headers={"Connection": connection, "X-Hop": "1", "X-Other": "2"})
    assert (ex.all("X-Hop"), ex.all("Connection"), ex.all("X-Other")) == ([], [], [b"2"])


def test_what_connection_names_stays_here_when_it_is_sent_twice(service: Service) -> None:
    headers = [("Connection", "X-One"), ("Connection", "X-Two"), ("X-One", "1"), ("X-Two", "2")]
    ex, _ = call(service, headers=headers)
    assert (ex.all("X-One"), ex.all("X-Two")) == ([], [])


@pytest.mark.parametrize("name", ["X_Forwarded_For", "X_Api_Key", "Remote_User"])
def test_a_name_with_underscores_cannot_pose_as_one_with_dashes(hop: Service, name: str) -> None:
    ex, _ = call(hop, headers={name: "forged"})
    assert not any(b"forged" in value for _, value in ex.headers)


def test_a_request_of_an_upgrade_is_an_ordinary_request(hop: Service) -> None:
    headers = {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c, websocket",
        "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA",
    }
    ex, response = call(hop, headers=headers)
    assert response.status == 200
    assert sorted(name for name, _ in ex.headers) == [b"Accept-Encoding", b"Host", b"X-Request-ID"]


# --- Keys and what the operator adds


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "Api-Key"])
def test_the_relays_key_goes_upstream_and_the_clients_does_not(keyed: Service, name: str) -> None:
    ex, _ = call(keyed, headers={name: "Bearer the-clients-own"})
    assert ex.all("Authorization") == [f"Bearer {KEY}".encode()]
    assert ex.all("X-Api-Key") == ex.all("Api-Key") == []


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "Api-Key"])
def test_a_key_header_of_another_name_carries_the_bare_key(keyed_by_x_api_key: Service, name: str) -> None:
    ex, _ = call(keyed_by_x_api_key, headers={name: "the-clients-own"})
    assert ex.all("X-Api-Key") == [KEY.encode()]
    assert ex.all("Authorization") == ex.all("Api-Key") == []


def test_the_operators_headers_and_query_are_added_to_every_request(keyed: Service) -> None:
    ex, _ = call(keyed, headers={"anthropic-version": "1999-01-01", "x-fixed": "the client's"})
    assert ex.all("anthropic-version") == [b"2023-06-01"]
    assert ex.all("X-Fixed") == [b"caf\xe9"]
    assert ex.target.endswith(b"?api-version=2024-10-21&x=%20")


@pytest.mark.parametrize(
    ("query", "sent"),
    [
        pytest.param("", b"?api-version=2024-10-21&x=%20", id="none"),
        pytest.param("?", b"?api-version=2024-10-21&x=%20", id="empty"),
        pytest.param("?a=&b", b"?a=&b&api-version=2024-10-21&x=%20", id="some"),
        pytest.param("?api-version=1", b"?api-version=2024-10-21&x=%20", id="the-same-name"),
        pytest.param("?Api-Version=1&a", b"?a&api-version=2024-10-21&x=%20", id="in-another-case"),
        pytest.param("?api%2Dversion=1&a", b"?a&api-version=2024-10-21&x=%20", id="encoded"),
    ],
)
def test_the_operators_query_stands_behind_the_clients(keyed: Service, query: str, sent: bytes) -> None:
    ex, _ = call(keyed, query=query)
    assert ex.target == b"/base/v1" + ex.path.removeprefix("/base/v1").encode() + sent


@pytest.mark.parametrize("name", ["X-Internal-Tenant", "x-internal-tenant", "User-Agent"])
def test_a_header_that_the_operator_drops_stays_here(keyed: Service, name: str) -> None:
    ex, _ = call(keyed, headers={name: "marker-7f", "X-Internal": "1"})
    assert (ex.all(name), ex.all("X-Internal")) == ([], [b"1"])


def test_a_transparent_relay_passes_cookies_origin_and_cors_both_ways(transparent: Service) -> None:
    own = f"http://127.0.0.1:{transparent.port}"
    back: list[Header] = [
        ("Set-Cookie", "a=1; Path=/"),
        ("Set-Cookie", "b=2"),
        ("Access-Control-Allow-Origin", own),
        ("Access-Control-Expose-Headers", "X-A"),
    ]
    ex, response = call(
        transparent, headers={"Cookie": "a=1; b=2", "Origin": own}, handler=lambda ex: ex.reply(b"ok", headers=back)
    )
    assert (ex.all("Cookie"), ex.all("Origin")) == ([b"a=1; b=2"], [own.encode()])
    assert response.all("Set-Cookie") == [b"a=1; Path=/", b"b=2"]
    assert response.all("Access-Control-Allow-Origin") == [own.encode()]
    assert response.all("Access-Control-Expose-Headers") == [b"X-A"]


@pytest.mark.parametrize("name", [name for name in NEVER_UPSTREAM if name not in ("Cookie", "Cookie2")])
def test_a_transparent_relay_keeps_everything_else_to_itself(transparent: Service, name: str) -> None:
    ex, _ = call(transparent, headers={name: "127.0.0.1"})
    assert ex.all(name) == []


def test_neither_netrc_nor_the_environments_proxies_are_read(transparent: Service) -> None:
    """The service runs with proxies that refuse and a password for its upstream: it uses neither."""
    ex, response = call(transparent)
    assert response.status == 200
    assert ex.all("Authorization") == ex.all("Proxy-Authorization") == []
    ex, _ = call(transparent, headers={"Authorization": "Bearer the-clients-own"})
    assert ex.all("Authorization") == [b"Bearer the-clients-own"]


@pytest.mark.parametrize("name", ["service", "transparent"])
def test_no_cookie_of_the_upstreams_is_kept_for_the_next_request(request: pytest.FixtureRequest, name: str) -> None:
    which: Service = request.getfixturevalue(name)
    for _ in range(2):
        ex, _ = call(
            which, handler=lambda ex: ex.reply(b"ok", headers=[("Set-Cookie", "session=of-the-first; Path=/")])
        )
        assert ex.all("Cookie") == []


# --- Headers that come back


NEVER_BACK: list[tuple[str, str]] = [
    *((name, "marker-7f") for name in ("Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade")),
    *((name, "marker-7f") for name in ("Proxy-Authenticate", "Proxy-Authorization")),
    ("X-Accel-Redirect", "/hidden/marker-7f"),
    ("X-Accel-Buffering", "yes"),
    ("X-Accel-Charset", "marker-7f"),
    ("X-Accel-Expires", "86400"),
    ("X-Accel-Limit-Rate", "7919"),
    ("X-Accel-Foo", "marker-7f"),
    ("Set-Cookie", "marker-7f=1; Path=/"),
    ("Set-Cookie2", "marker-7f=1"),
    ("Server", "marker-7f"),
    ("Date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("Alt-Svc", 'h3=":443"; ma=86400'),
    ("Strict-Transport-Security", "max-age=31536000"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Credentials", "true"),
    ("Access-Control-Foo", "marker-7f"),
    ("Clear-Site-Data", '"*"'),
    ("Refresh", "0; url=https://evil.example/"),
    ("NEL", '{"report_to": "default"}'),
    ("Report-To", '{"group": "default"}'),
    ("Service-Worker-Allowed", "/marker-7f/"),
]


@pytest.mark.parametrize("content_type", ["application/json", SSE], ids=["json", "events"])
@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in NEVER_BACK])
def test_a_header_that_is_not_the_clients_business_does_not_come_back(
    hop: Service, name: str, value: str, content_type: str
) -> None:
    sent: list[Header] = [("Content-Type", content_type), (name, value), (name.lower(), value), ("X-Beside", "1")]
    response = answer(hop, sent)
    assert value.encode() not in response.all(name)
    assert value.encode() not in response.head.split(b"\r\n", 1)[1]
    assert response.all("X-Beside") == [b"1"]
    assert bytes(response.body) == b"ok"


def test_date_comes_once(hop: Service) -> None:
    assert len(answer(hop, [("Date", "Thu, 01 Jan 1970 00:00:00 GMT")]).all("Date")) == 1


def test_the_upstream_cannot_make_nginx_serve_an_internal_location(service: Service, tmp_path: Path) -> None:
    """Neither by X-Accel-Redirect nor beside an event stream, a HEAD, an error or a redirect."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "page").write_text("the hidden page")
    tmp_path.chmod(0o755)
    location = f'location /hidden/ {{ internal; alias "{hidden}/"; }}'
    with (
        servers.nginx(service.relay.port, service.relay.admin_port, extra=location) as nginx,
        Client(nginx.port) as client,
    ):
        assert client.request("GET", "/hidden/page").finish().data.find(b"the hidden page") < 0
        hop = Service("nginx", service.upstream, service.relay, nginx, client)
        for status in (200, 302, 404, 500):
            for content_type in ("application/json", SSE):
                for target in ("/hidden/page", "hidden/page", "@hidden"):
                    sent: list[Header] = [("Content-Type", content_type), ("X-Accel-Redirect", target)]
                    response = answer(hop, sent, status=status)
                    assert (response.status, bytes(response.body)) == (status, b"ok")


@pytest.mark.parametrize("connection", ["X-Hop", "close, x-hop", "Keep-Alive,X-HOP"])
def test_a_header_that_the_upstreams_connection_names_does_not_come_back(hop: Service, connection: str) -> None:
    response = answer(hop, [("Connection", connection), ("X-Hop", "marker-7f"), ("X-Other", "1")])
    assert (response.all("X-Hop"), response.all("X-Other")) == ([], [b"1"])


def test_connection_cannot_take_away_what_keeps_an_answer_harmless_or_framed(hop: Service) -> None:
    named = "Content-Length, X-Content-Type-Options, Content-Security-Policy, X-Request-ID"
    response = answer(hop, [("Connection", named)])
    assert response.header("X-Content-Type-Options") == b"nosniff"
    assert response.header("Content-Security-Policy")
    assert response.header("X-Request-ID")
    assert bytes(response.body) == b"ok"


REPEATED = [
    ("Link", [b"</a>; rel=preload", b"</b>; rel=next"]),
    ("WWW-Authenticate", [b'Bearer realm="a, b"', b"Bearer", b"DPoP"]),
    ("Vary", [b"Accept", b"Origin"]),
    ("Warning", [b'199 - "x"', b'199 - "x"']),
    ("X-Many", [b"3", b"1", b"2, 4", b""]),
    ("Content-Language", [b"de", b"en"]),
]


@pytest.mark.parametrize(("name", "values"), [pytest.param(*pair, id=pair[0]) for pair in REPEATED])
@pytest.mark.parametrize("content_type", ["application/json", SSE], ids=["json", "events"])
def test_a_repeated_header_comes_back_repeated_and_in_order(
    hop: Service, name: str, values: list[bytes], content_type: str
) -> None:
    sent: list[Header] = [("Content-Type", content_type)]
    for number, value in enumerate(values):
        sent += [(name, value), (f"X-Between-{number}", "1")]
    assert answer(hop, sent).all(name) == values


BACK = [
    ("Content-Type", b'text/event-stream; charset=utf-8; x="\xe9"'),
    ("Content-Type", b"application/octet-stream"),
    ("Content-Disposition", 'attachment; filename="Übergröße €.txt"'.encode()),
    ("ETag", b'W/"a\xe9"'),
    ("Location", b"/relative?x=\xc3\xbc"),
    ("Cache-Control", b"max-age=60"),
    ("Expires", b"0"),
    ("Last-Modified", b"Thu, 01 Jan 1970 00:00:00 GMT"),
    ("Retry-After", b"7"),
    ("X-RateLimit-Remaining-Tokens", b"149984"),
    ("OpenAI-Processing-Ms", b"12"),
    ("X-Latin", b"\xe9\xff\xa0\x80"),
    ("X-Tab", b"a\tb"),
    ("X-Empty", b""),
    ("X-8K", b"x" * 8192),
    ("x-ALL-lower-And-UPPER", b"1"),
]


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=f"{pair[0]}-{i}") for i, pair in enumerate(BACK)])
def test_a_header_of_the_upstreams_comes_back_with_its_bytes_and_its_case(
    hop: Service, name: str, value: bytes
) -> None:
    response = answer(hop, [(name, value)])
    assert (name.encode(), value) in response.headers


def test_no_content_type_is_made_up(hop: Service) -> None:
    assert answer(hop, []).all("Content-Type") == []


KINDS: list[Any] = [
    pytest.param("GET", 200, [("Content-Type", "application/json")], "length", id="json"),
    pytest.param("GET", 200, [("Content-Type", "text/html")], "chunked", id="html"),
    pytest.param("POST", 200, [("Content-Type", SSE)], "chunked", id="events"),
    pytest.param("GET", 200, [("Content-Type", "Text/Event-Stream;charset=utf-8")], "length", id="events-with-length"),
    pytest.param("GET", 200, [], "close", id="no-type"),
    pytest.param("GET", 404, [("Content-Type", "text/html")], "length", id="404"),
    pytest.param("GET", 302, [("Location", "https://elsewhere.example/")], "length", id="302"),
    pytest.param("GET", 304, [("ETag", '"x"')], "none", id="304"),
    pytest.param("DELETE", 204, [], "none", id="204"),
    pytest.param("HEAD", 200, [("Content-Type", "text/html"), ("Content-Length", "2")], "none", id="head"),
]


@pytest.mark.parametrize(("method", "status", "headers", "framing"), KINDS)
def test_every_answer_is_sandboxed_and_cannot_be_sniffed(
    hop: Service, method: str, status: int, headers: list[Header], framing: Framing
) -> None:
    """Whatever policies the upstream sends itself."""
    own: list[Header] = [("Content-Security-Policy", "default-src *"), ("X-Content-Type-Options", "sniff")]
    _, response = call(hop, method, handler=lambda ex: ex.reply(b"ok", status, "So", [*headers, *own], framing))
    assert response.status == status
    assert response.all("X-Content-Type-Options") == [b"nosniff"]
    (policy,) = response.all("Content-Security-Policy")
    assert "sandbox" in [directive.strip() for directive in policy.decode().split(";")]


@pytest.mark.parametrize("content_type", [SSE, "text/event-stream; charset=utf-8", "TEXT/EVENT-STREAM"])
@pytest.mark.parametrize("status", [200, 400])
def test_an_event_stream_must_be_neither_held_nor_stored(hop: Service, content_type: str, status: int) -> None:
    """Whatever the upstream says about caching; a length does not bind a body that comments may be added to."""
    sent: list[Header] = [
        ("Content-Type", content_type),
        ("Cache-Control", "public, max-age=60"),
        ("X-Accel-Buffering", "yes"),
    ]
    response = answer(hop, sent, b"data: x\n\n", status=status)
    assert response.all("Cache-Control") == [b"no-cache, no-store, no-transform"]
    assert response.all("X-Accel-Buffering") == [b"no"]
    assert response.all("Content-Length") == []
    assert response.framing == "chunked"


# --- Targets


TARGETS = [
    pytest.param(b"/", id="slash"),
    pytest.param(b"/models", id="plain"),
    pytest.param(b"/models/", id="trailing-slash"),
    pytest.param(b"//models", id="two-slashes"),
    pytest.param(b"/a//b///c//", id="slashes-within"),
    pytest.param(b"/a;b=c;d/e", id="semicolons"),
    pytest.param(b"/a%2Fb%2fc", id="encoded-slashes"),
    pytest.param(b"/%2F", id="only-an-encoded-slash"),
    pytest.param(b"/%2fv1/x", id="encoded-slash-first"),
    pytest.param(b"/v1/v1/x", id="the-mount-again"),
    pytest.param(b"/a%20b+c", id="space-and-plus"),
    pytest.param(b"/100%25", id="percent"),
    pytest.param(b"/%E2%82%AC/%c3%bc/%FF", id="encoded-bytes"),
    pytest.param(b"/%41%7e%5F", id="encoded-without-need"),
    pytest.param(b"/%0d%0a/%7f", id="encoded-controls"),
    pytest.param(b"/a:b@c!$&'()*+,=~-._", id="sub-delimiters"),
    pytest.param(b"/...", id="three-dots"),
    pytest.param(b"/..a/b../a..b/.c", id="dots-in-names"),
    pytest.param(b'/"a"<b>[c]{d}|e^`\\f', id="what-should-be-encoded"),
    pytest.param(b"/http://elsewhere.example/x", id="a-url-as-path"),
    pytest.param(b"/_relayed", id="almost-its-own"),
    pytest.param(b"/x?", id="empty-query"),
    pytest.param(b"/?", id="slash-and-empty-query"),
    pytest.param(b"/x??", id="two-question-marks"),
    pytest.param(b"/x?a=&b", id="empty-values"),
    pytest.param(b"/x?&&a&", id="ampersands"),
    pytest.param(b"/x?a=1&a=2&A=3", id="repeated"),
    pytest.param(b"/x?a=b=c;d", id="equals-and-semicolon"),
    pytest.param(b"/x?q=a+b%20c%2B", id="plus-and-space"),
    pytest.param(b"/x?100%&%z&%%&%", id="odd-percent-signs-in-the-query"),
    pytest.param(b"/x?../..%2f%2e%2e/", id="dots-in-the-query"),
    pytest.param(b"/x?u=http://a/?b&c", id="a-url-in-the-query"),
    pytest.param(b'/x?{"a":["b"]}|^`\\', id="json-in-the-query"),
    pytest.param(b"/x?" + b"q" * 6144, id="6-KB-query"),
    pytest.param(b"/" + b"p" * 6144, id="6-KB-path"),
]


def sent_target(hop: Service, raw: bytes, expected: bytes) -> None:
    """Ask for a raw target; exactly one request must reach the upstream, for `expected`."""
    path = expected.partition(b"?")[0].decode("latin-1")
    hop.upstream.forget(path)
    hop.upstream.serve(lambda ex: ex.reply(b"ok"), path)
    try:
        response = hop.client.request("GET", raw)
        assert (response.status, response.finish().data) == (200, b"ok")
        (ex,) = hop.upstream.seen(path)
        assert ex.target == hop.upstream.base_path.encode() + expected
    finally:
        hop.upstream.forget(path)


@pytest.mark.parametrize("target", TARGETS)
def test_path_and_query_go_upstream_as_they_came(hop: Service, target: bytes) -> None:
    sent_target(hop, b"/v1" + target, target)


@pytest.mark.parametrize("target", [b"/%", b"/a%2", b"/a%zz/b", b"/%%", b"/100%/x", b"/%00"])
def test_odd_percent_signs_in_a_path_go_upstream_as_they_came(service: Service, target: bytes) -> None:
    """nginx itself refuses these."""
    sent_target(service, b"/v1" + target, target)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("/grüße/€".encode(), id="utf-8-path"),
        pytest.param("/x?q=grüße-€-😀".encode(), id="utf-8-query"),
        pytest.param(b"/\xff\xfe", id="not-utf-8-path"),
        pytest.param(b"/x?\xff\xa0\xad", id="not-utf-8-query"),
    ],
)
def test_raw_bytes_beyond_ascii_go_upstream_as_they_came(hop: Service, target: bytes) -> None:
    """Browsers' and curl's habit when a person types them: RFC 3986 forbids them, servers take them."""
    sent_target(hop, b"/v1" + target, target)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param(b"/v1", b"", id="the-mount-itself"),
        pytest.param(b"/v1/", b"/", id="with-a-slash"),
        pytest.param(b"/v1?a", b"?a", id="with-a-query"),
        pytest.param(b"/v1/?", b"/?", id="with-a-slash-and-an-empty-query"),
        pytest.param(b"/v1//", b"//", id="with-two-slashes"),
        pytest.param(b"/v1/base/v1/x", b"/base/v1/x", id="the-base-again"),
        pytest.param(b"/%76%31/x%2Fy", b"/x%2Fy", id="an-encoded-mount"),
        pytest.param(b"http://127.0.0.1/v1/x?y", b"/x?y", id="absolute-form"),
        pytest.param(b"http://elsewhere.example:80/v1/x", b"/x", id="absolute-form-of-elsewhere"),
    ],
)
def test_what_follows_the_mount_is_appended_to_the_upstreams_url(
    keyed_by_x_api_key: Service, raw: bytes, expected: bytes
) -> None:
    sent_target(keyed_by_x_api_key, raw, expected)


# --- Methods


@pytest.mark.parametrize("body", [b"", b"{}", b"\0\r\n\xff" * 100], ids=["empty", "json", "binary"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_goes_upstream_with_its_body(hop: Service, method: str, body: bytes) -> None:
    ex, response = call(hop, method, body=body)
    assert (ex.method, ex.body) == (method.encode(), body)
    assert response.status == 200
    assert bytes(response.body) == (b"" if method == "HEAD" else b"ok")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_an_empty_body_is_announced_as_empty(hop: Service, method: str) -> None:
    ex, _ = call(hop, method, headers={"Content-Length": "0"})
    assert ex.all("Content-Length") == [b"0"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_where_there_is_no_body_none_is_announced(hop: Service, method: str) -> None:
    ex, _ = call(hop, method)
    assert ex.all("Content-Length") == ex.all("Transfer-Encoding") == []


def test_the_answer_to_options_is_the_upstreams(hop: Service) -> None:
    _, response = call(hop, "OPTIONS", handler=lambda ex: ex.reply(b"mine", headers=[("Allow", "BREW")]))
    assert (response.all("Allow"), bytes(response.body)) == ([b"BREW"], b"mine")


@pytest.mark.parametrize("content_type", ["application/json", SSE], ids=["json", "events"])
def test_a_head_tells_what_a_get_would_and_has_no_body(hop: Service, content_type: str) -> None:
    sent: list[Header] = [("Content-Type", content_type), ("Content-Length", "1234"), ("ETag", '"x"')]
    _, response = call(hop, "HEAD", handler=lambda ex: ex.reply(headers=sent, framing="none"))
    assert (response.status, response.all("ETag")) == (200, [b'"x"'])
    assert response.all("Content-Type") == [content_type.encode()]
    if content_type != SSE:
        assert response.all("Content-Length") == [b"1234"]


# --- Status and reason


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        pytest.param(200, "OK", id="200"),
        pytest.param(201, "Created", id="201"),
        pytest.param(200, "", id="no-reason"),
        pytest.param(200, "All is well, more or less", id="another-reason"),
        pytest.param(206, "Partial Content", id="206"),
        pytest.param(299, "Odd", id="299"),
        pytest.param(400, "Bad Request", id="400"),
        pytest.param(401, "Unauthorized", id="401"),
        pytest.param(402, "Payment Required", id="402"),
        pytest.param(418, "I'm a teapot", id="418"),
        pytest.param(429, "Too Many Requests", id="429"),
        pytest.param(499, "", id="499-no-reason"),
        pytest.param(500, "Internal Server Error", id="500"),
        pytest.param(503, "Gr\u00fc\u00dfe \u00ff", id="latin-1"),
        pytest.param(529, "Overloaded", id="529"),
        pytest.param(599, "Last", id="599"),
    ],
)
def test_status_reason_and_body_are_the_upstreams(hop: Service, status: int, reason: str) -> None:
    body = b'{"error": {"message": "of the upstream"}}'
    sent: list[Header] = [("Content-Type", "application/json"), ("X-A", "b")]
    response = answer(hop, sent, body, status=status, reason=reason)
    assert (response.status, response.reason) == (status, reason.encode("latin-1"))
    assert (bytes(response.body), response.all("X-A")) == (body, [b"b"])
    assert response.all("Content-Length") == [b"%d" % len(body)]


def test_429_and_503_keep_their_retry_after(hop: Service) -> None:
    for status, value in ((429, "17"), (503, "Thu, 01 Jan 2026 00:00:00 GMT")):
        sent: list[Header] = [("Retry-After", value), ("retry-after-ms", "17000"), ("x-should-retry", "true")]
        response = answer(hop, sent, status=status)
        assert response.all("Retry-After") == [value.encode()]
        assert (response.all("Retry-After-Ms"), response.all("X-Should-Retry")) == ([b"17000"], [b"true"])


AWAY = (
    "https://elsewhere.example/x?y#z", "//elsewhere.example/", "http://127.0.0.1:8000/v1/x",
    "HTTP://UPPER.example/%7e/../ä",
)  # fmt: skip
HERE = "/v1/relative", "relative", "?q=1"


@pytest.mark.parametrize(
    ("status", "location"),
    [
        *((status, location) for status in (301, 302, 303) for location in AWAY),
        *((status, location) for status in (301, 302, 303, 307, 308) for location in HERE),
    ],
)
def test_a_redirect_comes_back_unfollowed_with_its_location_unchanged(hop: Service, status: int, location: str) -> None:
    response = answer(hop, [("Location", location)], b"moved", status=status)
    assert (response.status, bytes(response.body)) == (status, b"moved")
    assert response.all("Location") == [location.encode("latin-1")]


def test_a_304_keeps_its_headers_and_has_no_body(hop: Service) -> None:
    sent: list[Header] = [("ETag", '"x"'), ("Cache-Control", "max-age=60"), ("Content-Length", "1234")]
    _, response = call(
        hop, handler=lambda ex: ex.reply(status=304, reason="Not Modified", headers=sent, framing="none")
    )
    assert (response.status, response.framing) == (304, "none")
    assert (response.all("ETag"), response.all("Cache-Control")) == ([b'"x"'], [b"max-age=60"])


def test_a_204_has_neither_body_nor_framing(hop: Service) -> None:
    _, response = call(hop, handler=lambda ex: ex.reply(status=204, reason="No Content", framing="none"))
    assert (response.status, response.framing) == (204, "none")
    assert response.all("Transfer-Encoding") == response.all("Content-Length") == []


@pytest.mark.parametrize(
    "interim",
    [
        pytest.param(b"HTTP/1.1 102 Processing\r\n\r\n", id="102"),
        pytest.param(b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nX-Early: 1\r\n\r\n", id="103"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="100"),
        pytest.param(b"HTTP/1.1 103 A\r\nX-Early: 1\r\n\r\nHTTP/1.1 102 B\r\n\r\nHTTP/1.1 103 C\r\n\r\n", id="several"),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_an_interim_response_is_not_taken_for_the_answer(hop: Service, interim: bytes, step: int) -> None:
    wire = interim + b"HTTP/1.1 201 Made\r\nX-Final: 1\r\nContent-Length: 2\r\n\r\nok"

    def handler(ex: Exchange) -> None:
        for i in range(0, len(wire), step):
            ex.raw(wire[i : i + step])
        ex.finished.set()

    _, response = call(hop, handler=handler)
    assert (response.status, response.reason, bytes(response.body)) == (201, b"Made", b"ok")
    assert (response.all("X-Final"), response.all("X-Early")) == ([b"1"], [])
    assert response.informational == []


# --- Request ids


@pytest.mark.parametrize("request_id", ["a", "01H-x_y.z:/@+=", "x" * 128, "550e8400-e29b-41d4-a716-446655440000"])
def test_a_sane_request_id_goes_in_through_and_out(hop: Service, request_id: str) -> None:
    sent: list[Header] = [("X-Request-ID", "of-the-upstream-42")]
    ex, response = call(hop, headers={"x-request-id": request_id}, handler=lambda ex: ex.reply(b"ok", headers=sent))
    assert ex.all("X-Request-ID") == [request_id.encode()]
    assert response.all("X-Request-ID") == [request_id.encode()]
    assert response.all("X-Upstream-Request-ID") == [b"of-the-upstream-42"]
    hop.relay.wait_log(f'"{request_id}"')
    hop.relay.wait_log('"upstream_request_id": "of-the-upstream-42"')


@pytest.mark.parametrize(
    "request_id", [b"", b"x" * 129, b"a b", b'"', b"<script>", b"a\tb", b"\xe9", b"a,b", b"{}", b"-a", b"a;b", b"%0a"]
)
def test_a_request_id_that_is_not_sane_is_replaced(hop: Service, request_id: bytes) -> None:
    ex, response = call(hop, headers=[("X-Request-ID", request_id)])
    (made,) = response.all("X-Request-ID")
    assert made != request_id
    assert re.fullmatch(rb"[0-9a-f]{32}", made)
    assert ex.all("X-Request-ID") == [made]


def test_each_request_gets_an_id_of_its_own(hop: Service) -> None:
    ids = {call(hop)[1].header("X-Request-ID") for _ in range(20)}
    assert len(ids) == 20


@pytest.mark.parametrize("name", ["x-request-id", "request-id"])
def test_the_upstreams_request_id_comes_back_under_its_own_name(hop: Service, name: str) -> None:
    response = answer(hop, [(name, "req_42"), ("Content-Type", SSE)])
    assert response.all("X-Upstream-Request-ID") == [b"req_42"]
    assert response.header("X-Request-ID") != b"req_42"


def test_no_log_has_a_key_a_cookie_a_prompt_or_a_query(keyed: Service) -> None:
    headers = {
        "Authorization": "Bearer secret-a",
        "Cookie": "secret-b=1",
        "X-Request-ID": "look-here",
        "Referer": "secret-c",
    }
    call(keyed, "POST", "?q=secret-d", headers, b'{"prompt": "secret-e"}', lambda ex: ex.reply(b"secret-f", status=500))
    keyed.relay.wait_log("look-here")
    assert not re.findall(rf"secret-\w|{KEY}|2024-10-21", keyed.relay.log())


# --- Request bodies


def _body(n: int) -> bytes:
    return (bytes(range(256)) * (n // 256 + 1))[:n]


@pytest.mark.parametrize("size", [1, 8192, 65_537, 5 * 2**20], ids=["1", "8K", "64K+1", "5M"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_request_body_goes_upstream_whole_and_with_its_length(hop: Service, size: int, chunked: bool) -> None:
    body = _body(size)
    pieces = [body[i : i + 50_000] for i in range(0, size, 50_000)]
    ex, _ = call(hop, "POST", body=pieces if chunked else body)
    assert ex.body == body
    assert (ex.all("Content-Length"), ex.all("Transfer-Encoding")) == ([b"%d" % size], [])


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"5;a=b;c\r\nhello\r\n0;x\r\n\r\n", id="extensions"),
        pytest.param(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n", id="trailers"),
        pytest.param(b"0005\r\nhello\r\n000\r\n\r\n", id="zeros"),
        pytest.param(b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", id="two"),
        pytest.param(b"0\r\n\r\n", id="none"),
    ],
)
def test_chunk_framing_of_the_client_ends_here(hop: Service, wire: bytes) -> None:
    ex, _ = call(hop, "POST", headers={"Transfer-Encoding": "chunked"}, body=wire)
    assert ex.body == (b"hello" if b"l" in wire else b"")
    assert ex.all("Transfer-Encoding") == ex.all("X-Sum") == []


def test_a_body_that_comes_slowly_goes_upstream_whole(hop: Service) -> None:
    """And not before it is whole."""
    path = hop.upstream.serve(lambda ex: ex.reply(ex.body))
    connection = hop.client.connection()
    connection.send("POST", "/v1" + path, {"Content-Length": "6"}, b"")
    for piece in (b"a", b"bc", b"d", b"e"):
        connection.raw(piece)
        assert hop.upstream.seen(path) == []
    connection.raw(b"f")
    assert connection.read_head().finish().data == b"abcdef"
    hop.upstream.forget(path)


def test_a_client_that_expects_100_is_told_to_go_on(hop: Service) -> None:
    path = hop.upstream.serve(lambda ex: ex.reply(ex.body))
    connection = hop.client.connection()
    connection.send("POST", "/v1" + path, {"Content-Length": "5", "Expect": "100-continue"}, b"")
    with pytest.raises(AssertionError, match="not within"):  # an interim response is no final one
        connection.read_head(0.3)
    connection.raw(b"hello")
    response = connection.read_head()
    assert response.finish().data == b"hello"
    (ex,) = hop.upstream.seen(path)
    assert ex.all("Expect") == []
    hop.upstream.forget(path)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    "size", [LIMIT - 1, LIMIT, LIMIT + 1, 3 * LIMIT], ids=["below", "exactly", "one-over", "far-over"]
)
def test_a_body_may_be_as_long_as_the_limit_and_no_longer(keyed: Service, size: int, chunked: bool) -> None:
    path = keyed.upstream.serve(lambda ex: ex.reply(b"%d" % len(ex.body)))
    body = _body(size)
    with Connection(keyed.port) as connection:
        response = connection.request("POST", "/v1" + path, body=[body] if chunked else body)
        if size <= LIMIT:
            assert (response.status, response.finish().data) == (200, b"%d" % size)
        else:
            assert error_of(response, 413)["code"] == "body_too_large"
            assert keyed.upstream.seen(path) == []
            in_step(connection, keyed, response)
    keyed.upstream.forget(path)


def in_step(connection: Connection, hop: Service, after: Response) -> None:
    """The connection serves another request, or has been closed: it never takes the rest of a body for a request."""
    if not after.leaves_open:
        connection.wait_closed()
        return
    path = hop.upstream.serve(lambda ex: ex.reply(b"next"))
    try:
        response = connection.request("GET", "/v1" + path)
        assert (response.status, response.finish().data) == (200, b"next")
    except ConnectionError:
        pass  # it was closed before the request was sent
    except NoResponse as closed:
        assert closed.args[0].endswith("after b''")  # noqa: PT017 - either end is right, half an answer is not
    finally:
        hop.upstream.forget(path)


SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        pytest.param("/v1/../x", {}, 400, id="400"),
        pytest.param("/v1/x", {"Origin": "https://evil.example"}, 403, id="403"),
        pytest.param("/elsewhere", {}, 404, id="404"),
    ],
)
def test_the_body_of_a_refused_request_is_never_taken_for_the_next_one(
    service: Service, target: str, headers: dict[str, str], status: int
) -> None:
    with Connection(service.port) as connection:
        response = connection.request("POST", target, headers, SMUGGLED * 3)
        error_of(response, status)
        in_step(connection, service, response)
    assert service.upstream.seen("/smuggled") == []


@pytest.mark.parametrize(
    ("headers", "sent"),
    [
        pytest.param({"Content-Length": "10"}, b"", id="length-nothing"),
        pytest.param({"Content-Length": "10"}, b"123456789", id="length-one-short"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"", id="chunked-nothing"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"5\r\nhel", id="inside-a-chunk"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"5\r\nhello", id="after-a-chunks-data"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"5\r\nhello\r\n", id="between-chunks"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"5\r\nhello\r\n0", id="inside-the-last-chunk"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"5\r\nhello\r\n0\r\n", id="before-the-last-line"),
        pytest.param({"Transfer-Encoding": "chunked"}, b"5\r\nhello\r\n0\r\nX-A: b\r\n", id="inside-the-trailer"),
    ],
)
def test_a_truncated_body_is_a_400_and_nothing_reaches_the_upstream(
    service: Service, headers: dict[str, str], sent: bytes
) -> None:
    path = service.upstream.serve(lambda ex: ex.reply(b"ok"))
    with Connection(service.port) as connection:
        connection.send("POST", "/v1" + path, headers, b"")
        connection.raw(sent)
        connection.half_close()
        assert error_of(connection.read_head(), 400)["code"] == "truncated_body"
        connection.wait_closed()
    assert service.upstream.seen(path) == []
    service.upstream.forget(path)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"zz\r\nhello\r\n0\r\n\r\n", id="no-size"),
        pytest.param(b"-5\r\nhello\r\n0\r\n\r\n", id="negative-size"),
        pytest.param(b"\r\nhello\r\n0\r\n\r\n", id="empty-size"),
        pytest.param(b"3\r\nhello\r\n0\r\n\r\n", id="longer-than-it-says"),
        pytest.param(b'5;"\r\nhello\r\n0\r\n\r\n', id="bad-extension"),
        pytest.param(b"5\r\nhello\r\n0\r\nHost: evil\r\n\r\n", id="forbidden-trailer"),
        pytest.param(b"5\r\nhello\r\n0\r\nno colon\r\n\r\n", id="bad-trailer"),
    ],
)
def test_a_body_with_broken_framing_is_a_400_and_nothing_reaches_the_upstream(service: Service, sent: bytes) -> None:
    path = service.upstream.serve(lambda ex: ex.reply(b"ok"))
    with Connection(service.port) as connection:
        connection.send("POST", "/v1" + path, {"Transfer-Encoding": "chunked"}, b"")
        connection.raw(sent)
        response = connection.read_head()
        assert error_of(response, 400)["type"] == "invalid_request_error"
        in_step(connection, service, response)
    assert service.upstream.seen(path) == []
    service.upstream.forget(path)


def test_of_a_truncated_body_nothing_reaches_the_upstream_through_nginx(behind_nginx: Service) -> None:
    path = behind_nginx.upstream.serve(lambda ex: ex.reply(b"ok"))
    for headers, sent in (({"Content-Length": "10"}, b"1234"), ({"Transfer-Encoding": "chunked"}, b"5\r\nhel")):
        with Connection(behind_nginx.port) as connection:
            connection.send("POST", "/v1" + path, {**headers, "X-Request-ID": "cut-short"}, b"")
            connection.raw(sent)
            connection.half_close()
            connection.wait_closed()
    assert call(behind_nginx)[1].status == 200  # what came before it has been dealt with
    assert behind_nginx.upstream.seen(path) == []
    behind_nginx.upstream.forget(path)


# --- Response bodies, and the client's connection after them


def test_a_gzipped_event_stream_passes_untouched(hop: Service) -> None:
    """Nothing is unpacked on the way and nothing added; each piece arrives when it was sent."""
    packed = gzip.compress(b"data: one\n\ndata: two\n\n" * 50)
    path = hop.upstream.by_hand()
    connection = hop.client.connection()
    connection.send("GET", "/v1" + path, {"Accept-Encoding": "gzip"})
    ex = hop.upstream.next(path)
    ex.head(headers=[("Content-Type", SSE), ("Content-Encoding", "gzip")])
    response = connection.read_head()
    assert response.all("Content-Encoding") == [b"gzip"]
    for piece in (packed[:10], packed[10:11], packed[11:]):
        ex.send(piece)
        assert response.read_exactly(len(piece)) == piece
    ex.end()
    assert response.finish()[:2] == (packed, "clean")
    hop.upstream.forget(path)


AFTER: list[Any] = [
    pytest.param("GET", 200, "application/json", "length", b'{"a": 1}', id="json"),
    pytest.param("GET", 200, "application/json", "length", b"", id="empty"),
    pytest.param("GET", 200, "application/json", "chunked", b'{"a": 1}', id="chunked"),
    pytest.param("GET", 200, "application/json", "chunked", b"", id="chunked-empty"),
    pytest.param("POST", 200, SSE, "chunked", b"data: x\n\n", id="events"),
    pytest.param("POST", 200, SSE, "chunked", b"", id="events-none"),
    pytest.param("GET", 200, SSE, "length", b"data: x\n\n", id="events-with-length"),
    pytest.param("GET", 200, SSE, "close", b"data: x\n\n", id="events-until-close"),
    pytest.param("GET", 200, "application/octet-stream", "length", _body(300_000), id="binary"),
    pytest.param("GET", 200, "application/octet-stream", "close", _body(300_000), id="binary-until-close"),
    pytest.param("GET", 500, "text/html", "length", b"<html>", id="500"),
    pytest.param("GET", 204, "", "none", b"", id="204"),
    pytest.param("GET", 304, "", "none", b"", id="304"),
    pytest.param("HEAD", 200, "application/json", "none", b"", id="head"),
    pytest.param("HEAD", 200, SSE, "none", b"", id="head-of-events"),
]


@pytest.mark.parametrize(("method", "status", "content_type", "framing", "body"), AFTER)
def test_the_body_is_the_upstreams_and_the_clients_connection_goes_on(
    hop: Service, method: str, status: int, content_type: str, framing: Framing, body: bytes
) -> None:
    headers: list[Header] = [("Content-Type", content_type)] if content_type else []
    path = hop.upstream.serve(lambda ex: ex.reply(body, status, "So", headers, framing))
    with Connection(hop.port) as connection:
        for _ in range(3):
            response = connection.request(method, "/v1" + path, body=b"{}" if method == "POST" else b"")
            assert response.status == status
            assert response.finish()[:2] == (body, "clean")
            assert response.leaves_open
        assert len(hop.upstream.seen(path)) == 3
    hop.upstream.forget(path)


def test_requests_sent_without_waiting_are_answered_in_their_order(hop: Service) -> None:
    paths = [hop.upstream.serve(lambda ex, n=n: ex.reply(b"%d" % n)) for n in range(4)]  # type: ignore[misc]
    with Connection(hop.port) as connection:
        for path in paths:
            connection.send("GET", "/v1" + path)
        for n in range(4):
            response = connection.read_head()
            assert response.status == 200
            assert response.read_exactly(1) == b"%d" % n
    for path in paths:
        hop.upstream.forget(path)


@pytest.mark.parametrize(("method", "status", "content_type", "framing", "body"), AFTER)
def test_an_http_1_0_client_gets_the_same_without_chunks(
    hop: Service, method: str, status: int, content_type: str, framing: Framing, body: bytes
) -> None:
    headers: list[Header] = [("Content-Type", content_type)] if content_type else []
    path = hop.upstream.serve(lambda ex: ex.reply(body, status, "So", headers, framing))
    with Connection(hop.port) as connection:
        response = connection.request(method, "/v1" + path, body=b"{}" if method == "POST" else b"", version="HTTP/1.0")
        assert (response.status, response.all("Transfer-Encoding")) == (status, [])
        assert response.finish()[:2] == (body, "clean")
        connection.wait_closed()
    hop.upstream.forget(path)


def test_an_http_1_0_client_may_keep_its_connection_where_the_length_is_known(service: Service) -> None:
    path = service.upstream.serve(lambda ex: ex.reply(b"ok"))
    with Connection(service.port) as connection:
        for _ in range(2):
            response = connection.request("GET", "/v1" + path, {"Connection": "keep-alive"}, version="HTTP/1.0")
            assert response.finish()[:2] == (b"ok", "clean")
    service.upstream.forget(path)


def test_an_http_1_1_client_that_asks_for_it_gets_its_connection_closed(hop: Service) -> None:
    for body_kind in (SSE, "application/json"):
        sent: list[Header] = [("Content-Type", body_kind)]
        path = hop.upstream.serve(lambda ex, sent=sent: ex.reply(b"ok", headers=sent, framing="chunked"))  # type: ignore[misc]
        with Connection(hop.port) as connection:
            response = connection.request("GET", "/v1" + path, {"Connection": "close"})
            assert response.finish()[:2] == (b"ok", "clean")
            connection.wait_closed()
        hop.upstream.forget(path)
