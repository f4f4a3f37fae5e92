"""What must hold between settings, each of them sound on its own.

A rule is asked only if all settings that it reads were sound: a fault in RELAY_CLIENT_KEYS must not also be told as
"there are no client keys".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from relay.settings.addresses import DEMO, clash, loopback
from relay.settings.credentials import carries_key

Values: TypeAlias = Mapping[str, Any]


def broken_rules(values: Values, *, service: bool) -> list[str]:
    """Return a sentence for each rule that `values`, the sound ones by attribute, break."""
    rules = _ALWAYS + (_IN_SERVICE if service else _MOUNTED)
    sentences = (rule(values) for reads, rule in rules if all(attribute in values for attribute in reads))
    return [sentence for sentence in sentences if sentence]


def adds_key(values: Values) -> bool:
    """Whether requests would go upstream with a key of the relay's."""
    return carries_key(values["upstream_key"], values["upstream_headers"], values["upstream_query"])


def _one_key_header(values: Values) -> str:
    header = values["upstream_key_header"].lower()
    names = {name.lower() for name, _ in values["upstream_headers"]}
    if values["upstream_key"] is None or header not in names:
        return ""
    return (
        "RELAY_UPSTREAM_HEADERS = (not shown): sets the header that RELAY_UPSTREAM_KEY goes into; keep one of the two"
    )


def _mounted_upstream(values: Values) -> str:
    if values["upstream_url"] is not None:
        return ""
    return (
        "RELAY_UPSTREAM_URL is not set: set it to the upstream's base URL, such as https://api.openai.com/v1"
        " (or to demo, for the embedded demo upstream: only the service falls back on it by itself)"
    )


def _demo_on_loopback(values: Values) -> str:
    if values["upstream_url"] not in (None, DEMO) or loopback(values["bind"]):
        return ""
    return (
        "RELAY_UPSTREAM_URL is not set: set it, or bind to 127.0.0.1; the demo that serves without it is for this"
        f" machine only, and RELAY_BIND is {values['bind']!r}"
    )


def _key_not_for_strangers(values: Values) -> str:
    guarded = values["client_keys"] or values["allow_anonymous"]
    if not adds_key(values) or guarded or loopback(values["bind"]):
        return ""
    return (
        f"RELAY_BIND = {values['bind']!r}: whoever can connect could spend the upstream key; set RELAY_CLIENT_KEYS,"
        " or bind to 127.0.0.1, or say RELAY_ALLOW_ANONYMOUS=on if that is meant"
    )


def _two_addresses(values: Values) -> str:
    bind, admin = values["bind"], values["admin_bind"]
    if admin is None or not clash(bind, admin):
        return ""
    return f"RELAY_ADMIN_BIND = {admin!r}: must differ from RELAY_BIND, which is {bind!r}"


def _rates_can_be_counted(values: Values) -> str:
    if values["rate_limit"] is None or _installed("limits"):
        return ""
    return f"RELAY_RATE_LIMIT = {values['rate_limit']!r}: needs the package limits; pip install limits"


def _other_origins_can_be_answered(values: Values) -> str:
    if not values["cors_origins"] or _installed("flask_cors"):
        return ""
    return "RELAY_CORS_ORIGINS is set: needs the package flask-cors; pip install flask-cors"


def _redis_can_be_asked(values: Values) -> str:
    used = values["rate_limit"] is not None or values["max_streams_per_client"]
    if not used or values["limits_url"].startswith("memory:") or _installed("redis"):
        return ""
    return "RELAY_LIMITS_URL = (not shown): needs the package redis; pip install 'redis<8'"


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _changed_or_not(values: Values) -> str:
    if not (values["transparent"] and values["include_usage"]):
        return ""
    return "RELAY_INCLUDE_USAGE = on: changes requests, which RELAY_TRANSPARENT leaves as they are; keep one of the two"


def _kept_or_dropped(values: Values) -> str:
    both = sorted(values["drop_headers"] & values["pass_headers"])
    return (
        f"RELAY_PASS_HEADERS: {', '.join(both)} stands in RELAY_DROP_HEADERS too; keep one of the two" if both else ""
    )


_Rule: TypeAlias = tuple[tuple[str, ...], Callable[[Values], str]]
_KEY = ("upstream_key", "upstream_headers", "upstream_query")

# What a rule reads, and the rule.
_ALWAYS: tuple[_Rule, ...] = (
    (("upstream_key", "upstream_key_header", "upstream_headers"), _one_key_header),
    (("rate_limit",), _rates_can_be_counted),
    (("drop_headers", "pass_headers"), _kept_or_dropped),
    (("transparent", "include_usage"), _changed_or_not),
    (("cors_origins",), _other_origins_can_be_answered),
    (("rate_limit", "max_streams_per_client", "limits_url"), _redis_can_be_asked),
)
_MOUNTED: tuple[_Rule, ...] = ((("upstream_url",), _mounted_upstream),)
_IN_SERVICE: tuple[_Rule, ...] = (
    (("upstream_url", "bind"), _demo_on_loopback),
    ((*_KEY, "client_keys", "allow_anonymous", "bind"), _key_not_for_strangers),
    (("bind", "admin_bind"), _two_addresses),
)
