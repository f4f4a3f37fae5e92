"""Who stands on the way, as far as the headers of an answer give it away, and how each is told to let a stream pass.

A table; no I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Headers = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Hop:
    """`cure`: how this program is told not to hold a stream back. `timeout`: what ends a silent connection there."""

    name: str
    cure: str
    timeout: str


_NGINX = Hop(
    "nginx",
    "in nginx `proxy_buffering off;` for this location, and no `proxy_ignore_headers X-Accel-Buffering` without it "
    "(nginx/snippets/relay-stream.conf has all of it)",
    "`proxy_read_timeout`, in nginx 60 s unless it is set",
)
_VARNISH = Hop(
    "Varnish", "in Varnish `return (pipe);` for these paths", "`between_bytes_timeout` and `pipe_timeout` in Varnish"
)
_CLOUDFLARE = Hop(
    "Cloudflare",
    "at Cloudflare no transforming feature (such as Rocket Loader or response body buffering) for these paths",
    "Cloudflare's limit of 100 s",
)
_CLOUDFRONT = Hop(
    "CloudFront",
    "at CloudFront the cache policy CachingDisabled without compression for these paths",
    "the origin's response timeout at CloudFront, 30 s unless it is set",
)
_APACHE = Hop(
    "Apache", "in Apache `flushpackets=on` at the ProxyPass, and no mod_deflate there", "`ProxyTimeout` in Apache"
)

# Header, what its value must hold (a pattern, any case), and who sends it.
_SIGNS: tuple[tuple[str, str, Hop], ...] = (
    ("cf-ray", "", _CLOUDFLARE),
    ("server", "cloudflare", _CLOUDFLARE),
    ("x-amz-cf-id", "", _CLOUDFRONT),
    ("via", "cloudfront", _CLOUDFRONT),
    ("server", "nginx|openresty|tengine", _NGINX),
    ("server", "apache", _APACHE),
    ("x-varnish", "", _VARNISH),
    ("via", "varnish", _VARNISH),
    (
        "x-fastly-request-id",
        "",
        Hop("Fastly", "at Fastly `set beresp.do_stream = true;` and pass", "`between_bytes_timeout` at Fastly"),
    ),
    (
        "server",
        "awselb",
        Hop("an AWS load balancer", "nothing is to be set there: it does not buffer", "its idle timeout, 60 s"),
    ),
    (
        "x-envoy-upstream-service-time",
        "",
        Hop("Envoy", "in Envoy no buffer filter for this route", "`stream_idle_timeout` and the route's `timeout`"),
    ),
    (
        "server",
        "caddy",
        Hop("Caddy", "in Caddy `flush_interval -1` in reverse_proxy", "`read_timeout` of Caddy's transport"),
    ),
    (
        "server",
        "microsoft-iis",
        Hop("IIS", "in IIS `responseBufferLimit=0` for Application Request Routing", "ARR's proxy timeout, 120 s"),
    ),
    (
        "x-azure-ref",
        "",
        Hop("Azure Front Door", "at Azure Front Door no caching and compression", "its origin response timeout"),
    ),
    (
        "server",
        "google frontend|gws|gfe",
        Hop("Google's front end", "at Google no Cloud CDN for this backend", "the backend service's timeout, 30 s"),
    ),
    ("via", "google", Hop("Google's load balancer", "there no Cloud CDN", "the backend service's timeout, 30 s")),
    ("server", "squid", Hop("Squid", "in Squid no cache for these paths", "`read_timeout` in Squid")),
    ("via", "squid", Hop("Squid", "in Squid no cache for these paths", "`read_timeout` in Squid")),
)

_HIT = re.compile(r"\b(?:hit|stale|updating)\b", re.IGNORECASE)
_CACHE_HEADERS = ("age", "x-cache", "x-cache-status", "cf-cache-status", "x-proxy-cache", "x-cache-hits")
_TOLD_BY = ("server", "via", "cf-ray", "x-amz-cf-id", "x-varnish", "x-served-by", *_CACHE_HEADERS)


def known(headers: Headers) -> list[Hop]:
    """The programs that the headers of an answer name, each once."""
    found: list[Hop] = []
    for name, value in headers:
        for sign, pattern, hop in _SIGNS:
            if name.lower() == sign and re.search(pattern, value, re.IGNORECASE) and hop not in found:
                found.append(hop)
    return found


def signs(headers: Headers) -> list[str]:
    """The headers that tell of a hop, as they came."""
    return [
        f"{name}: {''.join(c for c in value if c.isprintable())[:80]}"
        for name, value in headers
        if name.lower() in _TOLD_BY
    ]


def given_away(headers: Headers) -> str:
    """The same in brackets, for the end of a clause; empty if there are none."""
    found = signs(headers)
    return f" (its headers: {', '.join(found)})" if found else ""


def of_a_cache(headers: Headers) -> list[str]:
    """The headers by which a cache says that it had the answer already."""
    found = []
    for name, value in headers:
        lower = name.lower()
        if lower == "age":
            hit = value.strip().isdecimal() and int(value) > 0
        else:
            hit = lower in _CACHE_HEADERS and _HIT.search(value) is not None
        if hit:
            found.append(f"{name}: {value[:80]}")
    return found
