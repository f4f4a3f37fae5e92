"""Which headers pass which way: each of the lists, a row for each of its entries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import errors
from relay.wire.headers import (
    SANDBOX,
    UNBUFFERED,
    RequestHeaders,
    check_field,
    connection_tokens,
    response_headers,
    sane_request_id,
)

OPEN = RequestHeaders(own_credentials=False)
WITH_KEY = RequestHeaders(own_credentials=True)
TRANSPARENT = RequestHeaders(own_credentials=False, transparent=True)


def environ(*headers: tuple[str, str]) -> dict[str, object]:
    """A WSGI environ with these headers, as a server makes it."""
    made: dict[str, object] = {"REQUEST_METHOD": "POST", "wsgi.version": (1, 0), "SERVER_NAME": "x", "REMOTE_USER": "u"}
    for name, value in headers:
        key = name.upper().replace("-", "_")
        made[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
    return made


def upstream_of(headers: RequestHeaders, *given: tuple[str, str]) -> dict[str, str]:
    """What goes upstream, by lower-case name."""
    selected = headers.select(environ(*given))
    lower = {name.lower(): value for name, value in selected}
    assert len(lower) == len(selected)
    return lower


def back(*upstream: tuple[str, str], has_body: bool = True, transparent: bool = False) -> list[tuple[str, str]]:
    fields: dict[str, str] = {}
    for name, value in upstream:
        key = name.lower()
        fields[key] = f"{fields[key]}, {value}" if key in fields else value
    return response_headers(list(upstream), fields, has_body=has_body, transparent=transparent)


# --- never upstream -----------------------------------------------------------------------------------------------

NEVER_UPSTREAM = {
    # hop-by-hop
    *("Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade"),
    *("Proxy-Authenticate", "Proxy-Authorization", "HTTP2-Settings"),
    # the relay's own to say
    *("Host", "Content-Length", "Accept-Encoding", "Expect", "X-Request-ID"),
    # the client's identity
    *("Cookie2", "Referer", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-CH-UA", "Sec-GPC", "Sec-WebSocket-Key"),
    # what stands between
    *("Proxy-Anything", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Client-Cert"),
    *("Forwarded", "X-Real-IP", "Via", "CF-Ray", "CF-Connecting-IP", "CF-Access-Jwt-Assertion", "CDN-Loop"),
    *("True-Client-IP", "X-Amzn-Trace-Id", "X-Amzn-Oidc-Data", "X-MS-Client-Principal", "X-Goog-IAP-JWT-Assertion"),
    *("X-Auth-Request-User", "X-Auth-Request-Access-Token", "Remote-User", "Remote-Groups"),
    *("X-CSRF-Token", "X-CSRFToken", "X-XSRF-Token", "CSRF-Token", "RequestVerificationToken"),
    *("baggage", "ot-baggage-user", "uberctx-tenant", "sentry-trace", "X-Client-IP", "X-Cluster-Client-IP"),
    *("x-amzn-mtls-clientcert", "X-Amz-Cf-Id", "CloudFront-Viewer-Country", "x-ms-token-aad-id-token"),
    *("x-ms-client-principal-name", "X-ARR-ClientCert", "X-Azure-FDID", "X-Goog-Authenticated-User-Email"),
    *("x-serverless-authorization", "X-Apigee-Org", "X-Endpoint-API-UserInfo", "Fastly-Client-IP"),
    *("X-Vercel-OIDC-Token", "X-Vercel-IP-City", "x-nf-client-connection-ip", "Fly-Client-IP", "DO-Connecting-IP"),
    *("x-envoy-external-address", "l5d-client-id", "X-Consumer-Username", "X-Credential-Identifier", "X-Userinfo"),
    *("X-Pomerium-Jwt-Assertion", "X-Pomerium-Claim-Email", "X-authentik-username", "Gap-Auth", "X-Vouch-User"),
    *("X-Auth-Subject", "X-Auth-Username", "X-User", "X-User-Email", "teleport-jwt-assertion", "X-WebAuth-User"),
    *("Tailscale-User-Login", "ngrok-auth-user-email", "X-Token-User-Email", "OIDC-Claim-Sub", "MELLON-NAME-ID"),
    *("Shib-Session-ID", "eppn", "SM-User", "iv-user", "OAM-Remote-User", "X-JWT-Assertion", "X-Hasura-Role"),
    *("WL-Proxy-Client-IP", "SMSERVERSESSIONID", "KC-Access", "NSC-TMAS", "Citrix-User", "X-APM-Session-Id"),
    *("Render-Proxy-TTL", "x-apigateway-event", "x-zitadel-orgid", "X-WS-User", "X-Edge-Location"),
}
OF_THE_BROWSER = ("Cookie", "Origin")
CREDENTIALS = ("Authorization", "x-api-key", "api-key", "x-goog-api-key", "X-Auth-Token", "X-Session-Id", "X-Token")
OTHER_TARGETS = (
    "X-Original-URI",
    "X-Override-URL",
    "Base-URL",
    "Request-URI",
    "X-HTTP-DestinationURL",
    "X-Host",
    "Helicone-Target-URL",
    "X-Portkey-Custom-Host",
    "X-Original-URL",
    "X-Rewrite-URL",
    "X-HTTP-Method-Override",
    "X-HTTP-Method",
    "X-Method-Override",
    *("X-Matched-Path", "X-Invoke-Path", "X-Middleware-Subrequest", "X-Middleware-Rewrite", "X-Request-Uri"),
    *("X-Request-Url", "X-Real-Url", "X-Rewrite", "X-Tunnel-Method", "X-Backend", "X-Backend-Host", "X-Proxy-Host"),
    *("X-Destination", "Destination"),
)


@pytest.mark.parametrize("name", sorted(NEVER_UPSTREAM))
@pytest.mark.parametrize(
    "headers",
    [pytest.param(OPEN, id="open"), pytest.param(WITH_KEY, id="with-key"), pytest.param(TRANSPARENT, id="transparent")],
)
def test_never_upstream(name: str, headers: RequestHeaders) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert upstream_of(headers, (spelling, "x"), ("Accept", "a")) == {"accept": "a"}


@pytest.mark.parametrize("name", OF_THE_BROWSER)
def test_only_a_transparent_relay_passes_on_what_is_the_browsers(name: str) -> None:
    assert upstream_of(OPEN, (name, "x")) == {}
    assert upstream_of(WITH_KEY, (name, "x")) == {}
    assert upstream_of(TRANSPARENT, (name, "x")) == {name.lower(): "x"}


@pytest.mark.parametrize("name", [*CREDENTIALS, *OTHER_TARGETS])
def test_with_keys_of_its_own_it_keeps_back_what_could_spend_them_otherwise(name: str) -> None:
    assert upstream_of(WITH_KEY, (name, "x")) == {}
    assert upstream_of(RequestHeaders(own_credentials=True, transparent=True), (name, "x")) == {}
    assert upstream_of(OPEN, (name, "x")) == {name.lower(): "x"}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Accept",
            "User-Agent",
            "Accept-Language",
            "Range",
            "If-None-Match",
            "Cache-Control",
            "Last-Event-ID",
            "Pragma",
        ),
        *(
            "OpenAI-Organization",
            "OpenAI-Beta",
            "OpenAI-Project",
            "anthropic-version",
            "anthropic-beta",
        ),
        *("Idempotency-Key", "X-Stainless-Lang", "X-Stainless-Retry-Count", "traceparent", "tracestate", "b3"),
        *(
            "X-Title",
            "HTTP-Referer",
            "X-Amz-Date",
            "X-Client-Request-Id",
            "Content-Encoding",
            "Content-Type",
            "Priority",
        ),
        *("X-Forwarder", "Remote", "Second", "Viable", "Securely", "CFX", "X-MSG", "Hosts", "Cookies", "Origins"),
        # what APIs take although proxies share the prefix
        *("X-Amzn-Bedrock-GuardrailIdentifier", "X-Amzn-Bedrock-GuardrailVersion", "X-Amzn-Bedrock-Trace"),
        *("X-Amzn-Bedrock-PerformanceConfig-Latency", "X-Amzn-Bedrock-Service-Tier", "X-Amz-Content-Sha256"),
        *("x-ms-oai-image-generation-deployment", "x-ms-client-request-id", "x-ms-version", "x-ms-useragent"),
        *("x-ms-enable-preview", "x-ms-oai-assistant-testenv", "x-goog-user-project", "x-goog-api-client"),
        *("x-goog-request-params", "x-vertex-ai-llm-request-type", "cf-aig-authorization", "cf-aig-cache-ttl"),
        *("cf-aig-metadata", "Helicone-Auth", "Helicone-Property-Session", "x-portkey-api-key", "x-portkey-config"),
        *("Mcp-Session-Id", "Mcp-Protocol-Version", "Last-Event-ID", "X-Request-Timeout", "X-LiteLLM-Tags"),
        *("OpenAI-Organization", "anthropic-dangerous-direct-browser-access", "x-mistral-session", "X-Client-Name"),
        *("x-vercel-ai-ui-message-stream", "x-groq-region", "ai-gateway-model-id", "X-Prompt-Cache-Key"),
    ],
)
def test_any_other_goes_upstream_with_its_bytes(name: str) -> None:
    value = ' a, b;q="\xff\t"=;, '
    for headers in (OPEN, WITH_KEY, TRANSPARENT):
        assert upstream_of(headers, (name, value)) == {name.lower(): value}


def test_a_named_header_passes_although_a_front_may_have_added_it() -> None:
    headers = RequestHeaders(own_credentials=True, keep=["x-user-id", "cf-ray"])
    assert upstream_of(headers, ("X-User-Id", "7"), ("CF-Ray", "1"), ("X-User", "me")) == {
        "x-user-id": "7",
        "cf-ray": "1",
    }


@pytest.mark.parametrize("name", OTHER_TARGETS)
def test_a_key_of_the_apps_hook_is_guarded_as_the_relays_is(name: str) -> None:
    assert upstream_of(RequestHeaders(own_credentials=False, hook=True), (name, "x"), ("Authorization", "a")) == {
        "authorization": "a"
    }


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        pytest.param('Basic realm="a"', None, id="basic"),
        pytest.param("bAsIc", None, id="any-case"),
        pytest.param("NTLM", None, id="ntlm"),
        pytest.param("Negotiate YII=", None, id="negotiate-with-a-token"),
        pytest.param('Digest realm="a, b", nonce="c", qop="auth"', None, id="digest"),
        pytest.param(
            'Bearer resource_metadata="https://x/a, Basic"',
            'Bearer resource_metadata="https://x/a, Basic"',
            id="bearer",
        ),
        pytest.param('Basic realm="a, b", Bearer realm="c", Digest nonce="q"', 'Bearer realm="c"', id="between-others"),
        pytest.param('Bearer error="x\\", Basic", scope=y, Basic', 'Bearer error="x\\", Basic", scope=y', id="quoted"),
        pytest.param("DPoP algs=ES256, Negotiate", "DPoP algs=ES256", id="another-scheme"),
        pytest.param('Basic realm = "a", charset = "UTF-8", Bearer', "Bearer", id="spaces-around-the-equals-sign"),
    ],
)
def test_no_browser_is_asked_for_a_password_of_the_origin(value: str, kept: str | None) -> None:
    told = [each for name, each in back(("WWW-Authenticate", value)) if name == "WWW-Authenticate"]
    assert told == ([] if kept is None else [kept])
    assert ("WWW-Authenticate", value) in back(("WWW-Authenticate", value), transparent=True)


@pytest.mark.parametrize(
    "name",
    [
        *("X-Envoy-Immediate-Health-Check-Fail", "X-Envoy-Overloaded", "x-envoy-degraded", "l5d-success-class"),
        *("X-AppEngine-BlobKey", "X-Middleware-Rewrite", "x-middleware-next", "X-Middleware-Set-Cookie"),
        *("Surrogate-Key", "Cache-Tag", "Edge-Control", "Edge-Cache-Tag", "xkey", "X-LiteSpeed-Purge", "PageSpeed"),
        *("X-Sendfile-Type", "X-Lighttpd-Send-Tempfile", "X-Reproxy-URL", "x-amzn-remapped-content-length"),
        *("Reporting-Endpoints", "Critical-CH", "Origin-Trial", "Sec-Session-Registration", "Speculation-Rules"),
        *("Surrogate-Control", "X-Varnish", "X-Purge", "X-ESI", "Varnish-TTL", "X-Cache-Invalidate", "X-Magento-Tags"),
        *("X-Drupal-Cache-Tags", "X-Rewrite-URL", "SourceMap", "X-SourceMap", "Content-Security-Policy-Report-Only"),
        *("X-Forwarded-Host", "X-Forwarded-User", "CDN-Cache-Control", "Cloudflare-CDN-Cache-Control"),
    ],
)
def test_no_order_to_a_front_and_no_policy_of_the_origin_comes_back(name: str) -> None:
    for spelling in (name, name.lower(), name.upper()):
        assert spelling not in dict(back((spelling, "x"), ("X-Mine", "1")))
        assert spelling not in dict(back((spelling, "x"), ("Content-Type", "text/event-stream"), transparent=True))


def test_an_upstreams_request_id_is_cut_to_what_a_log_line_bears() -> None:
    headers = dict(back(("X-Request-ID", "a\x1b[31m" + "b" * 240_000)))
    assert headers["X-Upstream-Request-ID"] == ("a[31m" + "b" * 122)


def test_further_headers_can_be_kept_back() -> None:
    headers = RequestHeaders(own_credentials=False, drop=["x-tenant", "content-type", "accept"])
    given = (("X-Tenant", "1"), ("Content-Type", "text/plain"), ("Accept", "*/*"), ("X-Tenant-Other", "2"))
    assert upstream_of(headers, *given) == {"x-tenant-other": "2"}


@pytest.mark.parametrize(
    ("connection", "kept"),
    [
        pytest.param("close", {"x-hop", "x-other", "content-type"}, id="close"),
        pytest.param("X-Hop", {"x-other", "content-type"}, id="named"),
        pytest.param("keep-alive, x-HOP ,\tx-other", {"content-type"}, id="a-list-any-case"),
        pytest.param("Content-Type", {"x-hop", "x-other"}, id="content-type"),
        pytest.param(",,", {"x-hop", "x-other", "content-type"}, id="empty-items"),
        pytest.param("x_hop", {"x-hop", "x-other", "content-type"}, id="an-underscore-is-another-name"),
    ],
)
def test_what_connection_names_goes_no_further(connection: str, kept: set[str]) -> None:
    given = (("Connection", connection), ("X-Hop", "1"), ("X-Other", "2"), ("Content-Type", "a/b"))
    assert upstream_of(OPEN, *given).keys() == kept


def test_a_header_with_an_underscore_does_not_double_the_content_type() -> None:
    made = environ(("Content-Type", "application/json"))
    made["HTTP_CONTENT_TYPE"] = "text/html"  # Content_Type, from a server that lets it through
    made["HTTP_CONTENT_LENGTH"] = "5"
    made["HTTP_TRANSFER_ENCODING"] = "chunked"
    assert OPEN.select(made) == [("Content-Type", "application/json")]


def test_only_headers_go_upstream() -> None:
    assert OPEN.select(environ()) == []
    assert OPEN.select({**environ(), "HTTPS": "on", "CONTENT_TYPE": ""}) == []


@pytest.mark.parametrize("value", ["a\r\nEvil: b", "a\nb", "a\rb", "a\n b", "a\0b", "a\x1bb", "\x7f"])
@pytest.mark.parametrize("name", ["X-Any", "Content-Type"])
def test_a_value_that_would_not_stay_on_its_line_is_refused(name: str, value: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        OPEN.select(environ((name, value)))
    assert "Evil" not in caught.value.message


def test_a_value_that_is_not_passed_on_may_hold_anything() -> None:
    assert OPEN.select(environ(("Cookie", "a\x01"), ("Connection", "x-hop"), ("X-Hop", "\x01"))) == []


def test_names_that_clients_make_up_do_not_fill_the_memory() -> None:
    headers = RequestHeaders(own_credentials=False)
    for number in range(5000):
        assert upstream_of(headers, (f"X-{number}", "x"), ("X-Forwarded-For", "y")) == {f"x-{number}": "x"}
    assert len(headers._names) <= headers._REMEMBERED


@pytest.mark.parametrize(
    ("name", "value", "sound"),
    [
        pytest.param("X-Tenant", "a b\t\xff", True, id="any"),
        pytest.param("Authorization", "Bearer x", True, id="a-key"),
        pytest.param("X-Tenant", "", True, id="empty"),
        pytest.param("X-Tenant", "a\r\nEvil: b", False, id="line-break-in-the-value"),
        pytest.param("X-Tenant", "a\0", False, id="nul-in-the-value"),
        pytest.param("X-Tenant: a\r\nEvil", "b", False, id="line-break-in-the-name"),
        pytest.param("X-Tenant\n", "b", False, id="newline-after-the-name"),
        pytest.param("X Tenant", "b", False, id="space-in-the-name"),
        pytest.param("", "b", False, id="no-name"),
        pytest.param("content-length", "5", False, id="length"),
        pytest.param("Transfer-Encoding", "chunked", False, id="transfer-encoding"),
        pytest.param("Connection", "close", False, id="connection"),
        pytest.param("HOST", "elsewhere", False, id="host"),
    ],
)
def test_what_a_hook_may_set(name: str, value: str, sound: bool) -> None:
    if sound:
        check_field(name, value)
    else:
        with pytest.raises(ValueError, match="header") as caught:
            check_field(name, value)
        assert "Evil: b" not in str(caught.value)


# --- never back ---------------------------------------------------------------------------------------------------

NEVER_BACK = {
    *("Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Transfer-Encoding", "Upgrade"),
    *("Proxy-Authenticate", "Proxy-Authorization", "HTTP2-Settings"),
    *("X-Accel-Redirect", "X-Accel-Buffering", "X-Accel-Expires", "X-Accel-Limit-Rate", "X-Accel-Charset"),
    *("X-Sendfile", "X-Sendfile2", "X-Sendfile-Temporary", "X-LIGHTTPD-send-file", "X-LiteSpeed-Location"),
    *("X-LiteSpeed-Cache-Control", "X-Reproxy-URL"),
    *("Server", "Date", "Alt-Svc", "Strict-Transport-Security", "Clear-Site-Data", "Refresh", "NEL", "Report-To"),
    *("Service-Worker-Allowed", "Accept-CH", "Expect-CT", "Public-Key-Pins", "Set-Login"),
}
OF_THE_ORIGIN = (
    *("Set-Cookie", "Set-Cookie2", "Access-Control-Allow-Origin", "Access-Control-Allow-Credentials"),
    *("Access-Control-Expose-Headers", "Access-Control-Max-Age", "Access-Control-Allow-Private-Network"),
)
JSON = ("Content-Type", "application/json")
EVENTS = ("Content-Type", "text/event-stream; charset=utf-8")


@pytest.mark.parametrize("name", sorted(NEVER_BACK))
@pytest.mark.parametrize("kind", [pytest.param(JSON, id="json"), pytest.param(EVENTS, id="events")])
@pytest.mark.parametrize("transparent", [False, True])
def test_never_back(name: str, kind: tuple[str, str], transparent: bool) -> None:
    plain = back(kind, ("ETag", '"1"'), transparent=transparent)
    for spelling in (name, name.lower(), name.upper()):
        assert back(kind, (spelling, "evil"), ("ETag", '"1"'), transparent=transparent) == plain


@pytest.mark.parametrize("name", OF_THE_ORIGIN)
def test_only_a_transparent_relay_brings_back_what_is_the_origins(name: str) -> None:
    assert back(JSON, (name, "x")) == back(JSON)
    assert (name, "x") in back(JSON, (name, "x"), transparent=True)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "Retry-After",
            "WWW-Authenticate",
            "Location",
            "ETag",
            "Vary",
            "Content-Encoding",
            "Content-Disposition",
            "Link",
        ),
        *("Content-Language", "Accept-Ranges", "Content-Range", "Last-Modified", "x-should-retry", "openai-version"),
        *("openai-processing-ms", "x-ratelimit-remaining-requests", "anthropic-ratelimit-tokens-reset", "request-id"),
        *("CF-Ray", "Via", "X-Acceleration", "Dated", "Serverless", "Retry-After-Ms", "Access-Controlled", "Warning"),
    ],
)
def test_any_other_comes_back_as_it_is(name: str) -> None:
    value = 'W/"\xff\xa0 ,;=\t"'
    for kind in (JSON, EVENTS):
        assert (name, value) in back(kind, (name, value))


def test_repeated_headers_stay_repeated_and_in_order() -> None:
    given = [JSON, ("Link", "<a>"), ("X-A", "1"), ("link", "<b>, <c>"), ("X-A", "1"), ("Link", "")]
    assert back(*given)[: len(given)] == given


@pytest.mark.parametrize(
    ("connection", "gone"),
    [
        pytest.param([("Connection", "close")], set(), id="close"),
        pytest.param([("Connection", "X-Hop")], {"X-Hop"}, id="named"),
        pytest.param([("connection", "x-other"), ("Connection", "keep-alive,X-HOP")], {"X-Hop", "X-Other"}, id="twice"),
        pytest.param([("Connection", "content-type")], {"Content-Type"}, id="content-type"),
        pytest.param([("Connection", "x-content-type-options, content-security-policy")], set(), id="the-relays-own"),
    ],
)
def test_what_the_upstreams_connection_names_comes_no_further(
    connection: list[tuple[str, str]], gone: set[str]
) -> None:
    given = [JSON, ("X-Hop", "1"), ("X-Other", "2")]
    assert back(*connection, *given) == [pair for pair in given if pair[0] not in gone] + SANDBOX + [UNBUFFERED[1]]


# --- always back --------------------------------------------------------------------------------------------------


def value_of(headers: list[tuple[str, str]], name: str) -> str | None:
    """The one value of a header; None: there is none."""
    values = [value for other, value in headers if other.lower() == name.lower()]
    assert len(values) < 2
    return values[0] if values else None


@pytest.mark.parametrize("name", ["X-Content-Type-Options", "Content-Security-Policy", "CONTENT-SECURITY-POLICY"])
@pytest.mark.parametrize("kind", [[], [JSON], [EVENTS], [("Content-Type", "text/html")]])
@pytest.mark.parametrize("transparent", [False, True])
def test_nothing_that_is_relayed_can_run_as_a_page(name: str, kind: list[tuple[str, str]], transparent: bool) -> None:
    headers = back(*kind, (name, "default-src *"), transparent=transparent)
    assert value_of(headers, "X-Content-Type-Options") == "nosniff"
    assert value_of(headers, "Content-Security-Policy") == "default-src 'none'; sandbox"


@pytest.mark.parametrize(
    "name",
    [
        *("Cache-Control", "cache-control", "X-Accel-Buffering"),
        *("CDN-Cache-Control", "Cloudflare-CDN-Cache-Control", "Surrogate-Control"),
    ],
)
@pytest.mark.parametrize("kind", ["text/event-stream", "TEXT/Event-Stream ;x"])
def test_nobody_on_the_way_holds_or_keeps_an_event_stream(name: str, kind: str) -> None:
    headers = back(("Content-Type", kind), (name, "public, max-age=3600"))
    assert headers == [("Content-Type", kind), *SANDBOX, *UNBUFFERED]
    assert value_of(headers, "X-Accel-Buffering") == "no"
    assert value_of(headers, "Cache-Control") == "no-cache, no-store, no-transform"


def test_the_caching_of_anything_else_is_the_upstreams() -> None:
    given = [JSON, ("Cache-Control", "max-age=5"), ("Content-Length", "5")]
    assert back(*given) == [*given, *SANDBOX]


@pytest.mark.parametrize(
    ("given", "has_body", "length", "buffering"),
    [
        pytest.param([JSON, ("Content-Length", "5")], True, "5", None, id="length"),
        pytest.param([JSON, ("content-length", "5, 5")], True, "5", None, id="length-in-a-list"),
        pytest.param([JSON, ("Content-Length", "5"), ("Content-Length", "5")], True, "5", None, id="length-twice"),
        pytest.param([JSON], True, None, "no", id="unknown-length"),
        pytest.param([EVENTS, ("Content-Length", "5")], True, None, "no", id="events"),
        pytest.param(
            [EVENTS, ("Content-Encoding", "gzip"), ("Content-Length", "5")], True, None, "no", id="gzip-events"
        ),
        pytest.param([JSON, ("Content-Length", "5")], False, "5", None, id="head-or-304"),
        pytest.param([JSON], False, None, None, id="head-of-unknown-length"),
        pytest.param([EVENTS, ("Content-Length", "5")], False, None, "no", id="head-of-events"),
        pytest.param([], True, None, "no", id="nothing"),
    ],
)
def test_framing(given: list[tuple[str, str]], has_body: bool, length: str | None, buffering: str | None) -> None:
    headers = back(*given, has_body=has_body)
    assert value_of(headers, "Content-Length") == length
    assert value_of(headers, "X-Accel-Buffering") == buffering
    assert value_of(headers, "Transfer-Encoding") is None


@pytest.mark.parametrize(
    ("given", "known"),
    [
        pytest.param([("X-Request-ID", "req_1")], "req_1", id="openai"),
        pytest.param([("request-id", "req_2")], "req_2", id="anthropic"),
        pytest.param([("request-id", "req_2"), ("x-request-id", "req_1")], "req_1", id="both"),
        pytest.param([("x-request-id", "")], None, id="empty"),
        pytest.param([], None, id="none"),
    ],
)
def test_the_upstreams_request_id_has_a_name_of_its_own(given: list[tuple[str, str]], known: str | None) -> None:
    headers = back(*given)
    assert value_of(headers, "X-Upstream-Request-ID") == known
    assert value_of(headers, "X-Request-ID") is None


def test_the_lists_of_the_module_are_not_changed_by_a_response() -> None:
    for _ in range(2):
        back(EVENTS).append(("X-Evil", "1"))
    assert len(SANDBOX) == 2
    assert len(UNBUFFERED) == 2


NAMES = st.text(st.sampled_from("abcdeinorstxlACDX-"), min_size=1, max_size=12) | st.sampled_from(
    [*sorted(NEVER_BACK), *OF_THE_ORIGIN, *sorted(NEVER_UPSTREAM), "Content-Length", "Content-Type", "Cache-Control"]
)
VALUES = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=10) | st.sampled_from(
    ["text/event-stream", "close, x-a", "etag"]
)
OWN = {*(name for name, _ in SANDBOX + UNBUFFERED), "Content-Length", "X-Upstream-Request-ID"}


@given(st.lists(st.tuples(NAMES, VALUES), max_size=12), st.booleans(), st.booleans())
def test_whatever_comes_back_is_the_upstreams_in_order_or_the_relays(
    given: list[tuple[str, str]], has_body: bool, transparent: bool
) -> None:
    headers = back(*given, has_body=has_body, transparent=transparent)
    rest = iter(given)
    ours = min(headers.index(SANDBOX[0]), *(i for i, (name, _) in enumerate(headers) if name == "Content-Length"), 99)
    assert all(pair in rest for pair in headers[:ours]), "not the upstream's, or not in its order"
    assert {name for name, _ in headers[ours:]} <= OWN
    forbidden = {name.lower() for name in NEVER_BACK} | (set() if transparent else {n.lower() for n in OF_THE_ORIGIN})
    assert not forbidden & {name.lower() for name, _ in headers[:ours]}


# --- request ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sane"),
    [
        pytest.param("a", True, id="one-character"),
        pytest.param("4bf92f3577b34da6a3ce929d0e0e4736", True, id="hex"),
        pytest.param("req_01:a.b@c/d+e=f-g", True, id="every-sign"),
        pytest.param("a" * 128, True, id="128"),
        pytest.param("a" * 129, False, id="129"),
        pytest.param("", False, id="empty"),
        pytest.param(None, False, id="none"),
        pytest.param("-a", False, id="begins-with-a-sign"),
        pytest.param("a b", False, id="space"),
        pytest.param("a\n", False, id="newline"),
        pytest.param('a"b', False, id="quote"),
        pytest.param("a{b}", False, id="brace"),
        pytest.param("a,b", False, id="two-of-them"),
        pytest.param("é", False, id="latin-1"),
        pytest.param("\u0661", False, id="other-digit"),
    ],
)
def test_a_sane_request_id_is_kept(value: str | None, sane: bool) -> None:
    assert sane_request_id(value) == (value if sane else None)


def test_connection_tokens() -> None:
    assert connection_tokens("Close, X-A ,\tx-b,,") == {"close", "x-a", "x-b", ""}
