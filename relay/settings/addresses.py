"""Kinds of value that name a place: URLs, addresses, origins, networks, files, paths.

Everything is checked by its form; files are opened and read once, and nothing is
resolved or connected to.
"""

from __future__ import annotations

import ipaddress
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from relay.settings.values import FaultError, Kind, as_items, as_text, required
from relay.wire.target import bad_target

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Underscores are no hostname's (RFC 952), but Docker Compose services have them.
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_NUMERIC_HOST = re.compile(r"[0-9.]+")
_BIND = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):(?P<port>[0-9]{1,5})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]+")
PORTS = range(1, 65536)
_LONGEST_HOST = 253  # RFC 1035 §2.3.4, without the root's dot
_DEFAULT_PORTS = {"http": 80, "https": 443}

# What the library `limits` names them by, with two s for TLS as in redis-py.
_ONE_REDIS = frozenset({"redis", "rediss", "redis+unix"})
_SENTINELS = frozenset({"redis+sentinel", "rediss+sentinel"})
_CLUSTERS = frozenset({"redis+cluster", "rediss+cluster"})

# What the relay itself answers (README.md, "What it answers"). A mount on or above
# one of these would hide it.
_OWN_ROUTES = (
    *("/health", "/metrics", "/ticket", "/streams"),
    *("/api/stream-chat", "/chat/stream", "/stream/aware", "/stream/heartbeat"),
    *("/relay-client.js", "/use-streaming-chat.js"),
)


class Bind(NamedTuple):
    """An address to listen on: a host and port, or a unix socket's path."""

    host: str
    port: int
    path: str = ""


@lru_cache(maxsize=16)  # every request to the service asks which of its two addresses it came in at
def split_bind(bind: str) -> Bind:
    """Take `host:port`, `[v6]:port` or `unix:/path` apart; anything else is a FaultError."""
    if bind.startswith("unix:"):
        path = bind.removeprefix("unix:")
        if not path.startswith("/") or not path.isprintable():
            raise FaultError("a unix socket is written unix:/path/to/it")
        return Bind("", 0, path)
    found = _BIND.fullmatch(bind)
    if found is None or int(found["port"]) not in PORTS:
        raise FaultError
    host = found["host"].strip("[]").lower()
    if not _is_host(host):
        raise FaultError
    return Bind(host, int(found["port"]))


def loopback(bind: str) -> bool:
    """Whether only this machine can connect to `bind`; a unix socket counts as that.

    A name other than `localhost` is not looked up and counts as reachable from afar.
    """
    host, _, path = split_bind(bind)
    if path or host.rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def clash(one: str, other: str) -> bool:
    """Whether two valid binds cannot be listened on together."""
    first, second = split_bind(one), split_bind(other)
    if first == second:
        return True
    everywhere = {"0.0.0.0", "::"}  # noqa: S104 -- compared, not bound
    one_machine = {"127.0.0.1", "localhost"}
    return bool(first.port) and (
        first.port == second.port
        and (not everywhere.isdisjoint((first.host, second.host)) or {first.host, second.host} <= one_machine)
    )


def _is_host(host: str) -> bool:
    if ":" in host or _NUMERIC_HOST.fullmatch(host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True
    return len(host) <= _LONGEST_HOST and _HOST_NAME.fullmatch(host) is not None


def _split_url(text: str) -> SplitResult | None:
    """Return the parts of an absolute URL with a sound host and port, else None."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    host = parts.hostname
    if not text.isascii() or " " in text or not text.isprintable():
        return None
    if "[" in parts.netloc and ":" not in (host or ""):
        return None  # before 3.11.4 urlsplit takes any word for an IPv6 address
    return parts if host and port != 0 and _is_host(host) else None


def _host_and_port(parts: SplitResult) -> str:
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port}" if parts.port else f"{host}"


#: In place of a URL: the embedded demo upstream, for an app's own tests.
DEMO = "demo"


def _upstream_url(value: object) -> str | None:
    text = as_text(value)
    if not text:
        return None
    if text.lower() == DEMO:
        return DEMO
    if "@" in text:
        sentence = "takes no credentials; the key belongs in RELAY_UPSTREAM_KEY"
        raise FaultError(sentence, show=False)
    if "?" in text or "#" in text:
        sentence = "takes no query or fragment; a query belongs in RELAY_UPSTREAM_QUERY"
        raise FaultError(sentence, show=False)
    if "://" not in text:
        raise FaultError(_with_scheme(text))
    parts = _split_url(text)
    if parts is None or parts.scheme not in _DEFAULT_PORTS:
        raise FaultError
    path = parts.path.rstrip("/")
    if bad_target(path, None) is not None:
        raise FaultError("must have a path without . or .. segments and without spaces")
    return f"{parts.scheme}://{_host_and_port(parts)}{path}"


def _with_scheme(text: str) -> str:
    """Return the question that suggests the URL meant by `api.openai.com/v1`."""
    host = text.partition("/")[0].partition(":")[0]
    here = host == "localhost" or _NUMERIC_HOST.fullmatch(host)
    suggestion = f"{'http' if here else 'https'}://{text}"
    if _split_url(suggestion) is None or not (here or "." in host):
        return ""
    return f"lacks http:// or https://; did you mean {suggestion}?"


def _proxy(value: object) -> str | None:
    text = as_text(value)
    if not text:
        return None
    parts = _split_url(text)
    if parts is None or parts.scheme not in _DEFAULT_PORTS:
        raise FaultError
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise FaultError
    return text.rstrip("/")


def _limits_url(value: object) -> str:
    text = required(value)
    scheme, mark, rest = text.partition("://")
    if mark and scheme == "memory" and not rest:
        return text
    if not mark or scheme not in _ONE_REDIS | _SENTINELS | _CLUSTERS or not rest:
        raise FaultError
    try:
        name, _, database = urlsplit(text).path.strip("/").partition("/")
        if scheme not in _ONE_REDIS:
            limits_hosts(text)
        elif scheme != "redis+unix":
            _ = urlsplit(text).port
    except ValueError:
        raise FaultError from None
    if scheme in _SENTINELS and not name:
        raise FaultError("lacks the name of the master that the Sentinels watch: redis+sentinel://host:port/name")
    if scheme in _SENTINELS and database and not database.isdecimal():
        raise FaultError("has a database that is no number; it comes last: redis+sentinel://host:port/name/0")
    if scheme in _CLUSTERS and name not in ("", "0"):
        raise FaultError("names a database; a cluster has none but 0")
    return text


def limits_hosts(url: str) -> list[tuple[str, int]]:
    """Return the hosts and ports of a RELAY_LIMITS_URL that names several. Raises ValueError."""
    parts = urlsplit(url)
    hosts = []
    for item in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{item}")
        if not one.hostname or not _is_host(one.hostname):
            raise ValueError
        hosts.append((one.hostname, one.port or (26379 if parts.scheme in _SENTINELS else 6379)))
    return hosts


def _bind(value: object) -> str:
    text = required(value)
    split_bind(text)
    return text


def _bind_or_off(value: object) -> str | None:
    return _bind(value) if as_text(value) else None


def _networks(value: object) -> tuple[Network, ...]:
    networks: list[Network] = []
    for item in as_items(value):
        try:
            network = ipaddress.ip_network(item, strict=False)
        except ValueError:
            raise FaultError from None
        if "/" in item and ipaddress.ip_address(item.split("/")[0]) != network[0]:
            raise FaultError(f"{item!r} has bits beyond its mask; did you mean {network}?")
        networks.append(network)
    return tuple(networks)


def _origins(value: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_origin(item) for item in as_items(value)))


def _origin(item: str) -> str:
    """Return an origin as browsers send it: lower case, no default port."""
    if item == "*":
        return item
    parts = _split_url(item)
    if parts is None or not parts.scheme or "@" in parts.netloc:
        raise FaultError(f"{item!r} is no origin, such as https://shop.example")
    origin = f"{parts.scheme}://{_host_and_port(parts)}"
    if parts.path or parts.query or parts.fragment:
        raise FaultError(f"{item!r} is more than an origin; did you mean {origin}?")
    if parts.port == _DEFAULT_PORTS.get(parts.scheme, 0):
        return f"{parts.scheme}://{_host_and_port(parts).rpartition(':')[0]}"
    return origin


def _hosts(value: object) -> frozenset[str]:
    hosts = set()
    for item in as_items(value):
        parts = _split_url(f"http://{item}")
        if parts is None or not parts.hostname or parts.netloc != item:
            raise FaultError(f"{item!r} is not a host name, such as relay.internal")
        if parts.port is not None:
            raise FaultError(f"{item!r} has a port, which does not count; did you mean {parts.hostname}?")
        hosts.add(parts.hostname.removesuffix("."))
    return frozenset(hosts)


def _mount(value: object) -> str:
    text = required(value)
    if not text.startswith("/"):
        raise FaultError(f"must begin with a slash; did you mean /{text}?")
    mount = text.removesuffix("/")
    for segment in mount.split("/")[1:]:
        if segment in (".", "..") or _UNRESERVED.fullmatch(segment) is None:
            raise FaultError
    for route in _OWN_ROUTES if mount else ():
        if f"{route}/".startswith(f"{mount}/") or mount.startswith(f"{route}/"):
            raise FaultError(f"collides with the relay's own {route}; choose another prefix")
    return mount


def _health_path(value: object) -> str:
    text = as_text(value).removeprefix("/")
    path, mark, query = text.partition("?")
    if "://" in path or not text.isascii():
        raise FaultError
    if bad_target(path, query if mark else None) is not None:
        raise FaultError
    return text


def _pem_key_file(value: object) -> str | None:
    path = _pem_file(value)
    if path is not None:
        content = Path(path).read_bytes()
        if b"-----BEGIN CERTIFICATE-----" not in content or b"PRIVATE KEY-----" not in content:
            raise FaultError("must hold both a certificate and its private key, in PEM")
    return path


def _pem_file(value: object) -> str | None:
    path = as_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not path:
        return None
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise FaultError(f"cannot be read: {reason(error)}") from None
    if b"-----BEGIN " not in content:
        raise FaultError("holds no PEM certificate (-----BEGIN CERTIFICATE-----)")
    return path


def reason(error: OSError | ValueError) -> str:
    """Say why a file could not be read, without naming it."""
    said = error.strerror if isinstance(error, OSError) else None
    return said or "not a usable file name or not UTF-8"


_ADDRESS = "host:port, [IPv6]:port or unix:/path"

UPSTREAM_URL = Kind(
    "an http:// or https:// URL with a host, such as https://api.openai.com/v1, or demo",
    _upstream_url,
)
PROXY = Kind("an http:// or https:// URL without a path", _proxy)
LIMITS_URL = Kind(
    "memory://, redis://host:port (rediss:// for TLS), redis+sentinel://host:port,host:port/name"
    " or redis+cluster://host:port,host:port",
    _limits_url,
)
BIND = Kind(_ADDRESS, _bind)
BIND_OR_OFF = Kind(f"{_ADDRESS}; empty turns it off", _bind_or_off)
NETWORKS = Kind("addresses or networks (10.0.0.0/8), separated by commas", _networks)
HOSTS = Kind("host names separated by commas", _hosts)
ORIGINS = Kind("origins (https://shop.example) separated by commas, or *", _origins)
MOUNT = Kind("/ or a path such as /v1, of letters, digits and . _ ~ - only", _mount)
HEALTH_PATH = Kind("a path below the upstream URL, such as models", _health_path)
PEM_KEY_FILE = Kind("a readable PEM file of a certificate and its key", _pem_key_file)
PEM_FILE = Kind("a readable file of PEM certificates", _pem_file)
