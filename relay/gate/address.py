"""The client's address, as its connection and trusted proxies tell it. Decides by a WSGI environ alone."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.settings import Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def client_address(environ: Mapping[str, Any], settings: Settings) -> str:
    """The client's address: the peer's, or what trusted proxies say of it in `X-Forwarded-For`.

    Read from the right, since each proxy adds on that side: the first address that is no trusted proxy's is the
    client's, and what stands left of it anybody may have written. `unix` is the peer of a unix socket, `unknown` a
    client whom a trusted proxy does not name: nobody may take it for the proxy itself.
    """
    peer = str(environ.get("REMOTE_ADDR") or "")
    address = parse_address(peer)
    if peer and address is None:
        return peer
    forwarded = environ.get("HTTP_X_FORWARDED_FOR")
    hops = str(forwarded).split(",") if forwarded else []
    while hops and _trusted(address, settings):
        hop = hops.pop().strip()
        if hop:
            address = parse_address(_without_port(hop))
            if address is None:
                return "unknown"
    return "unix" if address is None else str(address)


def over_tls(environ: Mapping[str, Any], settings: Settings) -> bool:
    """Whether the client uses https: on this connection or, as a trusted proxy's `X-Forwarded-Proto` says, to it."""
    if environ.get("wsgi.url_scheme") == "https":
        return True
    peer = parse_address(str(environ.get("REMOTE_ADDR") or ""))
    said = str(environ.get("HTTP_X_FORWARDED_PROTO", "")).rpartition(",")[2].strip().lower()
    return said == "https" and _trusted(peer, settings)


def _trusted(peer: Address | None, settings: Settings) -> bool:
    """Whether what this peer says of others counts. None is one on a unix socket."""
    return peer is None or any(peer in network for network in settings.trusted_proxies)


def payer(address: str) -> str:
    """Whose budget a client at this address uses up: its own, or with IPv6 that of its /64.

    A /64 is the least that a network hands out (RFC 6177), and each of its 2**64 addresses is its holder's.
    """
    if ":" not in address:
        return address
    ip = parse_address(address)
    return address if ip is None else f"{ipaddress.IPv6Address(int(ip) >> 64 << 64)}/64"


@lru_cache(maxsize=4096)
def parse_address(text: str) -> Address | None:
    """An address; of an IPv4 address that a socket of both kinds shows as `::ffff:127.0.0.1`, the IPv4 one."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _without_port(hop: str) -> str:
    """A hop as some proxies write it, with a port: `203.0.113.7:1234`, `[2001:db8::1]:1234`."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
