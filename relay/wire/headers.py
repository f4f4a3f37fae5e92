"""Which headers pass which way, and what the relay adds. No input or output.

The lists are those of the README's section on headers. Hop-by-hop fields follow RFC 9110 section 7.6.1: they and
the fields that `Connection` names belong to one connection and are never passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from relay import errors
from relay.wire import fronts, sse

_HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-connection te trailer trailers transfer-encoding upgrade proxy-authenticate "
    "proxy-authorization proxy-authentication-info http2-settings".split()
)

#: What the connection sets itself: no setting and no hook may.
OF_THE_CONNECTION = _HOP_BY_HOP | {"host", "content-length", "expect"}
# Framing is written anew; `Expect` was answered by the server in front. WSGI has the type elsewhere: among the `HTTP_`
# names it is a client's `Content_Type`, which some servers take for the same.
_REWRITTEN = frozenset("host content-length content-type accept-encoding expect x-request-id".split())
_OF_THE_BROWSER = frozenset("cookie origin".split())
CREDENTIALS = frozenset("authorization x-api-key api-key x-goog-api-key".split())
# Other headers in which clients show who they are. With a key of the operator's they are nobody's business upstream.
_TOKENS = frozenset(
    "x-auth-token x-auth-key x-api-token x-access-token x-id-token x-refresh-token x-session-id x-session-token "
    "x-session x-token x-amz-security-token x-goog-iam-authorization-token".split()
)
# To some servers the path, method or host is what these say (IIS, Symfony; Rails, Express; Zend; Next.js; WebDAV;
# Linkerd; LLM gateways such as Helicone and Portkey): a key of the operator's would open others than those it was meant
# for.
_OTHER_TARGETS = frozenset(
    "x-original-url x-original-uri x-original-path x-original-method x-rewrite-url x-rewrite-uri x-override-url "
    "x-override-uri x-http-method-override x-http-method x-method-override x-method x-http-path-override "
    "x-http-host-override x-http-destinationurl x-host x-proxy-url x-target-url x-upstream-url x-base-url base-url "
    "request-uri x-script-name x-path-info helicone-target-url helicone-openai-api-base x-portkey-custom-host "
    "x-matched-path x-invoke-path x-middleware-subrequest x-middleware-rewrite x-request-uri x-request-url x-real-url "
    "x-rewrite x-tunnel-method x-backend x-backend-host x-proxy-host x-destination destination".split()
)
# What fronts say of the target, and an app's own data beside a trace: never the client's to say.
_NEVER_KEPT = frozenset(
    "x-forwarded-host x-forwarded-prefix x-forwarded-path x-forwarded-uri x-forwarded-method x-original-host "
    "x-ms-original-url baggage".split()
)
_PREFIXES_NEVER_KEPT = ("sec-", "proxy-", "x-amzn-oidc-", "x-ms-client-principal", "x-ms-token-")
# What fronts say of the client and of the way here. Model providers' networks refuse requests that seem to come through
# another network, and the rest names people.
_ADDED, _PREFIXES_ADDED = fronts.split(fronts.ADDED)
_OF_PROXIES = _ADDED | {"referer", "cookie2"}
_PREFIXES_OF_PROXIES = ("sec-", "proxy-", "x-relay-", *_PREFIXES_ADDED)

_NEVER_BACK = frozenset(
    "server date alt-svc strict-transport-security clear-site-data refresh nel report-to service-worker-allowed "
    # As the ones before them, policies of a whole origin.
    "reporting-endpoints accept-ch accept-ch-lifetime critical-ch expect-ct public-key-pins "
    "public-key-pins-report-only set-login origin-trial sec-session-registration sec-session-challenge "
    "use-as-dictionary activate-storage-access speculation-rules supports-loading-mode "
    "content-length x-request-id x-content-type-options content-security-policy content-security-policy-report-only "
    "sourcemap x-sourcemap".split()
)
_OF_THE_ORIGIN = frozenset(["set-cookie", "set-cookie2"])
#: What does not come back, by whether the answer is an event stream and whether the relay is transparent.
_DROPPED = {
    (event_stream, transparent): _HOP_BY_HOP
    | _NEVER_BACK
    | ({"cache-control"} if event_stream else set())
    | (set() if transparent else _OF_THE_ORIGIN)
    for event_stream in (False, True)
    for transparent in (False, True)
}
_ORDERS, _PREFIXES_OF_ORDERS = fronts.split(fronts.ORDERS)
# What caches on the way go by before `Cache-Control` (RFC 9213, and Surrogate-Control before it).
_TARGETED_CACHE_CONTROL = ("cdn-cache-control", "surrogate-control")

#: On every relayed response: it must not run as a page, a script or a frame on the origin that serves it.
SANDBOX = [("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "default-src 'none'; sandbox")]
#: On every event stream: nobody on the way may hold, store or change it. The second line is nginx's.
UNBUFFERED = [("Cache-Control", "no-cache, no-store, no-transform"), ("X-Accel-Buffering", "no")]

#: Characters of an upstream's request id that are passed on; the longest known has 36.
_MOST_ID = 128
#: Schemes for which browsers have a dialog of their own, or a login of the machine's.
_LOGINS = frozenset("basic digest ntlm negotiate kerberos".split())
# The members of a list, with commas inside quotes left alone.
_LIST = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
# A member that begins a challenge: a scheme alone or before its first parameter, and not `name=value`.
_SCHEME = re.compile(r"[ \t]*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)(?:[ \t]+|[ \t]*\Z)(?!=)")

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# Some WSGI servers leave the line break of a folded field in its value (RFC 9112 section 5.2).
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NO_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]|[^\x00-\xff]")  # beyond latin-1 no byte stands for it
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,127}")


def sane_request_id(value: str | None) -> str | None:
    """The caller's request id if it may stand in headers and logs as it is, else None."""
    return value if value and _SANE_REQUEST_ID.fullmatch(value) else None


class RequestHeaders:
    """Chooses the client's headers that go upstream. Built once for a relay; the answers per name are remembered.

    `drop` and `keep`: further names that do not pass, and names that do although a front may have added them, both in
    lower case. `own_credentials`: the relay or its clients have keys of their own, so the client's must not go on.
    `hook`: a hook of the app's may add a key. `transparent`: cookies and the origin go through too (an upstream of
    one's own).
    """

    #: Client-chosen names are remembered up to this many, so that nobody can fill the memory with them.
    _REMEMBERED = 1024

    def __init__(
        self,
        *,
        drop: Iterable[str] = (),
        keep: Iterable[str] = (),
        own_credentials: bool,
        hook: bool = False,
        transparent: bool = False,
    ) -> None:
        further = frozenset(drop)
        self._keep = frozenset(keep)
        self._content_type = "content-type" not in further
        self._drop = further | _HOP_BY_HOP | _REWRITTEN | _OF_PROXIES
        if own_credentials:
            self._drop |= CREDENTIALS | _TOKENS
        if own_credentials or hook:
            self._drop |= _OTHER_TARGETS
        if not transparent:
            self._drop |= _OF_THE_BROWSER
        self._names: dict[str, str | None] = {}

    def select(self, environ: Mapping[str, object]) -> list[tuple[str, str]]:
        """The pairs of name and value (latin-1 text, a character a byte) out of a WSGI environ.

        Raises BadRequest for a value that would not stay on its line.
        """
        names = self._names
        headers: list[tuple[str, str]] = []
        named = environ.get("HTTP_CONNECTION")
        for key, value in environ.items():
            if key.startswith("HTTP_"):
                try:
                    name = names[key]
                except KeyError:
                    name = self._remember(key)
                if name is not None:
                    headers.append((name, str(value)))
        content_type = environ.get("CONTENT_TYPE")
        if content_type and self._content_type:
            headers.append(("Content-Type", str(content_type)))
        if named:
            hop = connection_tokens(str(named))
            headers = [(name, value) for name, value in headers if name.lower() not in hop]
        if _CONTROL.search("".join([value for _, value in headers])):
            raise errors.BadRequest("a header of the request has a line break or a control character in its value")
        return headers

    def _remember(self, key: str) -> str | None:
        # WSGI names have lost their case; fields are case-insensitive (RFC 9110 section 5.1).
        name: str | None = key[5:].replace("_", "-").title()
        lower = str(name).lower()
        if (lower in self._drop or lower.startswith(_PREFIXES_OF_PROXIES)) and lower not in self._keep:
            name = None
        if len(self._names) < self._REMEMBERED:
            self._names[key] = name
        return name


def check_field(name: str, value: str) -> None:
    """Raises ValueError for a field that would not stay on its line of the request, or that frames the request."""
    if not _NAME.fullmatch(name) or _NO_VALUE.search(value):
        raise ValueError(f"the header {name!r} has a character in its name or value that cannot be sent")
    if name.lower() in OF_THE_CONNECTION:
        raise ValueError(f"the header {name!r} belongs to the connection and cannot be set")


def never_kept(name: str) -> bool:
    """Whether RELAY_PASS_HEADERS may not name this header: it is a credential, or belongs to the connection, or makes
    another target or method of the request."""
    lower = name.lower()
    fixed = OF_THE_CONNECTION | _REWRITTEN | CREDENTIALS | _TOKENS | _OTHER_TARGETS | _OF_THE_BROWSER | _NEVER_KEPT
    # Keys of API gateways pass as they are, and must not be taken for something that this setting opens.
    keys = {"cookie2", "x-portkey-api-key", "ocp-apim-subscription-key"}
    return lower in fixed or lower in keys or lower.startswith(_PREFIXES_NEVER_KEPT)


def connection_tokens(value: str) -> set[str]:
    """The field names, lower case, that a `Connection` value declares to be hop-by-hop."""
    return {token.strip().lower() for token in value.split(",")}


def response_headers(
    upstream: Iterable[tuple[str, str]], fields: Mapping[str, str], *, has_body: bool, transparent: bool = False
) -> list[tuple[str, str]]:
    """The headers of a relayed response: the upstream's that may come back, and the relay's own.

    `upstream` are the pairs as they came, `fields` the same by lower-case name. `has_body` False: the framing fields
    describe a body that is not sent (an answer to HEAD, a 304) and stay. Repeated headers stay repeated.
    """
    event_stream = sse.is_event_stream(fields.get("content-type", ""))
    drop = _DROPPED[event_stream, transparent]
    if "connection" in fields:
        drop |= connection_tokens(fields["connection"])
    headers = []
    for name, value in upstream:
        lower = name.lower()
        if lower in drop or _is_order(lower):
            continue
        if lower == "www-authenticate" and not transparent:
            if challenges := _without_logins(value):
                headers.append((name, challenges))
            continue
        if lower.startswith("access-control-") and not transparent:
            continue
        headers.append((name, value))
    # An event stream is framed anew, because comments may be added to it.
    if "content-length" in fields and not event_stream:
        headers.append(("Content-Length", fields["content-length"].partition(",")[0].strip()))
    headers += SANDBOX
    if event_stream:
        headers += UNBUFFERED
    elif has_body and "content-length" not in fields:
        headers.append(UNBUFFERED[1])  # a body of unknown length comes as it is made
    if upstream_id := upstream_request_id(fields):
        headers.append(("X-Upstream-Request-ID", upstream_id))
    return headers


def _is_order(lower: str) -> bool:
    return lower in _ORDERS or lower.startswith(_PREFIXES_OF_ORDERS) or lower.endswith(_TARGETED_CACHE_CONTROL)


def upstream_request_id(fields: Mapping[str, str]) -> str:
    """The upstream's id of the request, cut to what a log line and a header bear; empty if it names none."""
    told = fields.get("x-request-id") or fields.get("request-id") or ""  # OpenAI's name, Anthropic's
    return _CONTROL.sub("", told[:_MOST_ID])


def _without_logins(value: str) -> str:
    """The challenges of a `WWW-Authenticate` but for those at which a browser asks for a password of this origin.

    Bearer and other schemes pass: MCP's OAuth begins with one (RFC 9110 section 11.6.1 has the grammar).
    """
    kept, keeps = [], True
    for part in _LIST.findall(value):
        scheme = _SCHEME.match(part)
        if scheme is not None:
            keeps = scheme[1].lower() not in _LOGINS
        if keeps:
            kept.append(part.strip())
    return ", ".join(part for part in kept if part)
