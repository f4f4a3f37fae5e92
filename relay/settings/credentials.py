"""Kinds of value that decide who may call what, and with which credentials.

Most of these values are secret, so no sentence here repeats a word of them, except a
header's name out of a fixed list. Nothing here compares a client's key: that happens
per request, elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from relay.settings.addresses import reason
from relay.settings.values import TOKEN, FaultError, Kind, as_items, as_text, required
from relay.wire.headers import OF_THE_CONNECTION, never_kept
from relay.wire.target import AllowRule, parse_allow

# Visible latin-1 (RFC 9110 §5.5, obs-text included): a key with a space or newline
# inside is a slip of the clipboard, and a header of its own at worst.
_KEY = re.compile(r"[\x21-\x7e\xa1-\xff]+")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t\xa0-\xff]*")

# What signs tickets must not be guessed from one.
_SHORTEST_SECRET = 16

# Where a provider's key may stand when it is not in RELAY_UPSTREAM_KEY.
_KEY_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"})
_KEY_FIELDS = frozenset({"key", "api_key", "api-key", "apikey", "access_token", "token", "code"})


def carries_key(key: str | None, headers: tuple[tuple[str, str], ...], query: str) -> bool:
    """Whether requests go upstream with a key of the relay's.

    That is the upstream key, or one that stands among the fixed headers or in the fixed query instead.
    """
    names = (name.lower() for name, _ in headers)
    fields = (part.partition("=")[0].lower() for part in query.split("&"))
    return key is not None or not (_KEY_HEADERS.isdisjoint(names) and _KEY_FIELDS.isdisjoint(fields))


def _allow(value: object) -> tuple[AllowRule, ...] | None:
    """Return the compiled rules, or None for the default, which depends on the key."""
    patterns = as_items(value)
    if not patterns:
        return None
    try:
        return parse_allow(",".join(patterns))
    except ValueError as error:
        raise FaultError(str(error)) from None


def _key(value: object) -> str | None:
    # Not stripped: a newline that came with the key is better mended at its source.
    if not isinstance(value, str):
        raise FaultError
    if value.lower().startswith("bearer "):
        raise FaultError("is the bare key, without the word Bearer")
    if value and _KEY.fullmatch(value) is None:
        raise FaultError("must not contain spaces, newlines or characters beyond latin-1")
    return value or None


def _ticket_secret(value: object) -> str | None:
    if not isinstance(value, str):
        raise FaultError
    if value and len(value) < _SHORTEST_SECRET:
        raise FaultError(f"has fewer than {_SHORTEST_SECRET} characters; make one with `openssl rand -hex 32`")
    return value or None


def _client_keys(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and value.strip().startswith("@"):
        keys = _keys_in_file(value.strip()[1:])
    else:
        keys = as_items(value)
        if any(key.startswith("@") for key in keys):
            raise FaultError("@file must stand alone, not in a list")
    for number, key in enumerate(keys, 1):
        if _KEY.fullmatch(key) is None or not key.isascii():
            raise FaultError(f"key {number} has a space or a character beyond ASCII in it")
    return keys


def _keys_in_file(path: str) -> tuple[str, ...]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise FaultError(f"the file after @ cannot be read: {reason(error)}") from None
    lines = (line.strip() for line in text.splitlines())
    keys = dict.fromkeys(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise FaultError("the file after @ holds no key; write one on each line")
    return tuple(keys)


def _key_header(value: object) -> str:
    try:
        text = required(value)
    except FaultError as fault:
        raise FaultError(fault.sentence, show=False) from None
    if TOKEN.fullmatch(text) is None or text.lower() in OF_THE_CONNECTION:
        raise FaultError(show=False)
    return text


def _headers(value: object) -> tuple[tuple[str, str], ...]:
    if isinstance(value, str):
        value = _json_pairs(value)
    elif isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        raise FaultError
    seen: set[str] = set()
    headers: list[tuple[str, str]] = []
    for number, pair in enumerate(value, 1):
        name, content = _header(number, pair)
        if name.lower() in seen:
            raise FaultError(f"header {number} repeats a name")
        seen.add(name.lower())
        headers.append((name, content))
    return tuple(headers)


def _json_pairs(text: str) -> object:
    """Return the pairs of a JSON object; an empty text has none."""
    if not text.strip():
        return []
    if text.strip()[0] in "'\"":
        raise FaultError("is a JSON object, and the quotes around it came with it: remove")
    try:
        # Every object becomes a tuple of pairs, so that a list can be told from it.
        pairs: object = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        raise FaultError from None
    if not isinstance(pairs, tuple):
        raise FaultError
    return pairs


def _header(number: int, pair: object) -> tuple[str, str]:
    match pair:
        case (name, content):
            pass
        case _:
            raise FaultError
    if not isinstance(name, str) or TOKEN.fullmatch(name) is None:
        raise FaultError(f"header {number} has a name that is not a header's name")
    if name.lower() in OF_THE_CONNECTION:
        raise FaultError(f"may not contain {name}, which the connection sets itself")
    if not isinstance(content, str):
        raise FaultError(f"header {number} must have a text as its value")
    if _HEADER_VALUE.fullmatch(content) is None or content != content.strip():
        raise FaultError(
            f"header {number} has control characters, outer spaces or characters beyond latin-1 in its value"
        )
    return name, content


def _query(value: object) -> str:
    text = as_text(value)
    if text.startswith("?"):
        raise FaultError("is written without the question mark")
    if not text.isascii() or not text.isprintable() or " " in text or "#" in text:
        raise FaultError
    return text


def _header_names(value: object) -> frozenset[str]:
    names = as_items(value)
    for name in names:
        if TOKEN.fullmatch(name) is None:
            raise FaultError(f"{name!r} is not a header's name")
        if "*" in name:
            raise FaultError(f"{name!r} must be a whole name; there are no wildcards here")
    return frozenset(name.lower() for name in names)


def _kept_header_names(value: object) -> frozenset[str]:
    names = _header_names(value)
    for name in sorted(names):
        if never_kept(name):
            raise FaultError(
                f"may not contain {name}: credentials, cookies and what frames or redirects a request never pass"
            )
    return names


ALLOW = Kind("METHOD path patterns separated by commas, or *", _allow)
KEY = Kind("a key, as text", _key)
TICKET_SECRET = Kind("a secret of 16 characters or more, the same on every host", _ticket_secret)
CLIENT_KEYS = Kind("keys separated by commas, or @file with one a line", _client_keys)
KEY_HEADER = Kind("a header's name, such as x-api-key", _key_header)
HEADERS = Kind('a JSON object of texts, such as {"x-version": "1"}', _headers)
QUERY = Kind("a query such as api-version=2024-10-21, percent-encoded", _query)
HEADER_NAMES = Kind("header names separated by commas", _header_names)
KEPT_HEADER_NAMES = Kind("header names separated by commas", _kept_header_names)
