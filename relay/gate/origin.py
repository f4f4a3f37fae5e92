"""Whose pages and which names may call: origin, host and peer. Decides by a WSGI environ alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay import errors
from relay.gate.address import parse_address

if TYPE_CHECKING:
    from relay.settings import Settings

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
