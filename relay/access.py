"""Who may call: the client's address, its origin and its host. Decides by a WSGI environ alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay import errors

if TYPE_CHECKING:
    from relay.settings import Settings

_DEFAULT_PORTS = {"http": 80, "https": 443}


def client_address(environ: Mapping[str, Any], settings: Settings) -> str:
    """The client's address: the peer's, or what trusted proxies say of it in `X-Forwarded-For`.

    Read from the right, since each proxy adds on that side: the first address that is no trusted proxy's is the
    client's, and what stands left of it anybody may have written.
    """
    address = str(environ.get("REMOTE_ADDR") or "")
    hops = [hop.strip() for hop in str(environ.get("HTTP_X_FORWARDED_FOR", "")).split(",")]
    while hops and _trusted(address, settings):
        hop = _without_port(hops.pop())
        if not hop:
            break
        address = hop
    return address or "unix"


def _trusted(address: str, settings: Settings) -> bool:
    if not address:
        return True  # a unix socket's peer
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return any((mapped or ip) in network for network in settings.trusted_proxies)


def _without_port(hop: str) -> str:
    """An address as some proxies write it, with a port: `203.0.113.7:1234`, `[2001:db8::1]:1234`; empty: none."""
    if hop.startswith("["):
        hop = hop[1:].partition("]")[0]
    elif hop.count(":") == 1:
        hop = hop.partition(":")[0]
    try:
        return str(ipaddress.ip_address(hop))
    except ValueError:
        return ""


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
    try:
        if ipaddress.ip_address(address).is_loopback:
            return
    except ValueError:
        pass
    raise errors.Forbidden(
        "without RELAY_CLIENT_KEYS the upstream key serves only this machine; set keys, or RELAY_ALLOW_ANONYMOUS to "
        "let anyone in who can connect",
        code="address_not_allowed",
    )


def _same_host(origin: str, host: str) -> bool:
    # The scheme is left out: behind a proxy that ends TLS the relay may not know its own.
    parts = urlsplit(origin)
    try:
        named = parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return False
    name, port = _split_host(host)
    return bool(name) and named == (name, port or _DEFAULT_PORTS.get(parts.scheme))


def _split_host(host: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _loopback_name(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
