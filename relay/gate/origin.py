"""Whose pages and which names may call: origin, host and peer. Decides by a WSGI environ alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay import errors
from relay.gate.address import over_tls, parse_address

if TYPE_CHECKING:
    from relay.settings import Settings

#: Headers that make a browser ask first (a preflight) before it sends them for a page of another origin.
_NOT_SAFELISTED = ("HTTP_X_REQUESTED_WITH", "HTTP_X_API_KEY", "HTTP_API_KEY", "HTTP_X_GOOG_API_KEY")

_DEFAULT_PORTS = {"http": 80, "https": 443}


def check_origin(environ: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a page of a stranger. Raises Forbidden.

    Browsers name the page's origin (Fetch standard, "Origin header") or mark the request cross-site (W3C Fetch
    Metadata); programs do neither and pass.
    """
    origin = environ.get("HTTP_ORIGIN")
    allowed = settings.cors_origins
    if origin is not None:
        if "*" in allowed or origin in allowed or _same_host(str(origin), str(environ.get("HTTP_HOST", ""))):
            return
        raise errors.Forbidden(
            "pages of this origin may not call the relay; its operator can add the origin to RELAY_CORS_ORIGINS",
            code="origin_not_allowed",
        )
    if environ.get("HTTP_SEC_FETCH_SITE") == "cross-site" and "*" not in allowed:
        raise errors.Forbidden("pages of other sites may not call the relay", code="origin_not_allowed")


def check_paid_get(environ: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a GET that costs money unless a foreign page cannot have made it. Raises Forbidden.

    An image, a link or a script of any page makes GETs. Browsers mark them with `Sec-Fetch-Site` (W3C Fetch Metadata),
    but only on their way to https and to loopback names. On plain http the request must say something that such a page
    cannot: a header that is not CORS-safelisted (Fetch standard), or a `Referer` of the relay's own host. `Accept` is
    no such thing: any page may set it. Comes after `check_origin`, which has let the request pass.
    """
    if "HTTP_ORIGIN" in environ or "*" in settings.cors_origins:
        return
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        if site in ("same-origin", "none"):  # the second: typed by a person, or a bookmark
            return
        raise _foreign_get("a page of another site, or of another port, made it")
    host = str(environ.get("HTTP_HOST", ""))
    name = _split_host(host)[0]
    if not host or _loopback_name(name) or over_tls(environ, settings):
        return  # a browser would have marked it, so this is a program
    # Browsers send Basic by themselves, for an image too.
    bearer = str(environ.get("HTTP_AUTHORIZATION", "")).lower().startswith("bearer ")
    if bearer or any(word in environ for word in _NOT_SAFELISTED):
        return
    if not _same_host(str(environ.get("HTTP_REFERER", "")), host):
        raise _foreign_get("on plain http it cannot be told from one that a foreign page made")


def _foreign_get(why: str) -> errors.Forbidden:
    return errors.Forbidden(
        f"this GET costs money, and {why}; send the header X-Requested-With, or use POST or https",
        code="origin_not_allowed",
    )


def check_admin(environ: Mapping[str, Any], settings: Settings) -> None:
    """Refuse pages, and names that somebody else made point here, on the admin address. Raises Forbidden.

    It asks nobody for a key, so that a page in a browser of somebody who can connect could read it (DNS rebinding).
    Probes and Prometheus send an IP address or no name at all.
    """
    host = str(environ.get("HTTP_HOST", ""))
    name = _split_host(host)[0].removesuffix(".")
    known = not host or _loopback_name(name) or parse_address(name) is not None or name in settings.admin_hosts
    if not known:
        raise errors.Forbidden(
            "the admin address answers to localhost, IP addresses and the names in RELAY_ADMIN_HOSTS; add this one to "
            "it if it is yours",
            code="host_not_allowed",
        )
    origin = environ.get("HTTP_ORIGIN")
    foreign = origin is not None and not _same_host(str(origin), host)
    if foreign or environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("same-origin", "none"):
        raise errors.Forbidden("pages of other origins may not call the admin address", code="origin_not_allowed")


def check_redirect(
    status: int, headers: Iterable[tuple[str, str]], *, method: str, host: str, key_beside: bool
) -> None:
    """Refuse an upstream's redirect that would take a client's request or key to another host. Raises UpstreamFailed.

    `host`: the relay's, as the client called it. `key_beside`: the client showed a key in another header than
    `Authorization`. 307 and 308 repeat the request with its body (RFC 9110 section 15.4); the others become a GET, such
    as a signed download, for which clients leave `Authorization` out, and no other header.
    """
    location = next((value for name, value in headers if name.lower() == "location"), None)
    if location is None or not _leads_away(location, host):
        return
    if status in (301, 302, 303) and method in ("GET", "HEAD") and not key_beside:
        return
    raise errors.UpstreamFailed(
        f"the upstream redirects to another host ({status}), which would get the request or the client's key; "
        "call that host itself, or ask the operator for the right RELAY_UPSTREAM_URL",
        code="upstream_redirect",
    )


def _leads_away(location: str, host: str) -> bool:
    """Whether a client that follows `location` from `host` comes to another host (WHATWG URL: backslashes are slashes,
    controls and spaces around it do not count)."""
    location = re.sub(r"[\t\n\r]", "", location).strip("\x00\x20").replace("\\", "/")
    try:
        parts = urlsplit(location)
    except ValueError:
        return True
    if not parts.scheme and not location.startswith("//"):
        return False
    scheme = parts.scheme or "http"
    # `http:path` has no authority, and browsers make one of it.
    return not parts.netloc or not _same_host(f"{scheme}://{parts.netloc}", host)


def check_host(environ: Mapping[str, Any], settings: Settings) -> None:
    """Refuse a name that somebody else made point here (DNS rebinding). Raises Forbidden.

    Without client keys anyone who can connect may call, so a page could call in the name of its own host. Only for
    the service: a mounted relay is as open as its shop.
    """
    if settings.client_keys or settings.allow_anonymous:
        return
    host = str(environ.get("HTTP_HOST", ""))
    if not _loopback_name(_split_host(host)[0]):
        raise errors.Forbidden(
            "without RELAY_CLIENT_KEYS the relay answers only to loopback names such as localhost; set keys, or "
            "RELAY_ALLOW_ANONYMOUS to let anyone in who can connect",
            code="host_not_allowed",
        )


def check_peer(address: str, settings: Settings) -> None:
    """With a key to spend and no client keys: refuse a client that a proxy reports from elsewhere. Raises Forbidden."""
    if not settings.adds_key or settings.client_keys or settings.allow_anonymous or address == "unix":
        return
    ip = parse_address(address)
    if ip is not None and ip.is_loopback:
        return
    raise errors.Forbidden(
        "without RELAY_CLIENT_KEYS the upstream key serves only this machine; set keys, or RELAY_ALLOW_ANONYMOUS to "
        "let anyone in who can connect",
        code="address_not_allowed",
    )


def _same_host(origin: str, host: str) -> bool:
    # Which of the two schemes is left out: behind a proxy that ends TLS the relay may not know its own.
    try:
        parts = urlsplit(origin)
        default = _DEFAULT_PORTS.get(parts.scheme)
        named = parts.hostname, parts.port or default
    except ValueError:
        return False
    name, port = _split_host(host)
    return bool(name) and default is not None and named == (name, port or default)


def _split_host(host: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _loopback_name(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    ip = parse_address(name)
    return ip is not None and ip.is_loopback
