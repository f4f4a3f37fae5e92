"""Client keys: who may call. Compared in constant time; neither a key nor a part of one is ever shown."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, unquote_plus

from relay import errors
from relay.gate.tickets import Tickets

#: Shorter keys can be guessed: 16 random characters of 62 have 95 bits.
SHORT = 16

#: Where Google's APIs take a key in the query (cloud.google.com/docs/authentication/api-keys; the OAuth 2.0 standard
#: query parameters of its discovery documents).
_GOOGLE_PARAMETERS = frozenset(["key", "access_token", "oauth_token"])
_GOOGLE_HOST = re.compile(r"(?:.+\.)?googleapis\.com(?::\d+)?", re.IGNORECASE)
#: Headers whose whole value is a key.
_KEY_HEADERS = ("HTTP_X_API_KEY", "HTTP_API_KEY", "HTTP_X_GOOG_API_KEY")
#: What separates a key from what stands beside it in a header's value: a scheme, other cookies, quotes.
_WORDS = re.compile(r"[^\s,;=\"']+")

Headers = list[tuple[str, str]]


def is_google(host: str) -> bool:
    """Whether an upstream of this host (and port) takes its key in the query, too."""
    return _GOOGLE_HOST.fullmatch(host) is not None


def shows_key_beside_authorization(environ: Mapping[str, Any]) -> bool:
    """Whether a request has a key in a header that clients take along to another host: of `Authorization` they know
    better (Fetch standard, "HTTP-redirect fetch")."""
    return any(name in environ for name in _KEY_HEADERS)


class ClientKeys:
    """The keys that clients may call with. Without any, everybody may."""

    def __init__(self, keys: Iterable[str], *, ticket_secret: str | None = None, google: bool = False) -> None:
        """`ticket_secret`: RELAY_TICKET_SECRET. `google`: the upstream takes its key in the query, too."""
        keys = tuple(keys)
        # Digests have one length, so that comparing them tells nothing of the keys'.
        self._digests = [_digest(key) for key in keys]
        self._lengths = frozenset(map(len, keys))
        self._google = google
        self.tickets = Tickets(self._digests, ticket_secret)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def take_ticket(self, query: str | None) -> tuple[str | None, str | None]:
        """Return the client whose ticket is in a raw query, and the query without it.

        The client is None if the query has no ticket. Raises Unauthorized if the ticket is forged or expired, or its
        key is gone.
        """
        if not self or query is None or "ticket=" not in query:
            return None, query
        parts = query.split("&")
        tickets = [part for part in parts if part.startswith("ticket=")]
        if not tickets:
            return None, query
        digest = self.tickets.digest(tickets[0].partition("=")[2])
        if digest is None:
            raise _unauthorized("the ticket is invalid or has expired; POST /ticket returns a new one")
        return client_name(digest), "&".join(part for part in parts if part not in tickets) or None

    def check(self, environ: Mapping[str, Any], query: str | None = None) -> bytes | None:
        """Return the digest of the client key that a request shows.

        The key is taken from `Authorization: Bearer`, `x-api-key`, `api-key` or `x-goog-api-key` and, in front of
        Google's APIs, from the raw query's `key`, `access_token` or `oauth_token`. None: no keys are set. Raises
        Unauthorized if no known key is shown.
        """
        if not self._digests:
            return None
        candidates = _in_headers(environ)
        if self._google and query:
            fields = map(_field, query.split("&"))
            candidates += [value for name, value in fields if name in _GOOGLE_PARAMETERS]
        for candidate in candidates:
            given = _digest(candidate)
            # All are compared, whichever fits.
            known = False
            for digest in self._digests:
                known |= hmac.compare_digest(given, digest)
            if known:
                return given
        raise _unauthorized(
            "missing or unknown client key; send it in Authorization: Bearer, x-api-key, api-key or x-goog-api-key"
        )

    # What must not go upstream.

    def without_keys(self, headers: Headers) -> Headers:
        """The headers but for those with a client key in their value, wherever in it."""
        if not self._digests:
            return headers
        return [pair for pair in headers if not self._holds_key(pair[1])]

    def query_without_keys(self, query: str | None, *, own_credentials: bool) -> str | None:
        """A raw query without what is a client key; None if nothing is left.

        A parameter goes if its value is a client key: `?key=room1` is an ordinary name on other APIs than Google's.
        There the credentials' parameters go whatever they hold, if the relay or its clients have keys of their own
        (`own_credentials`).
        """
        if not query or not (self._digests or (self._google and own_credentials)):
            return query
        kept = []
        for part in query.split("&"):
            name, value = _field(part)
            if own_credentials and self._google and name in _GOOGLE_PARAMETERS:
                continue
            if self._is_key(value) or self._is_key(unquote(part.partition("=")[2], "latin-1")):
                continue
            kept.append(part)
        return "&".join(kept) or None

    def _holds_key(self, value: str) -> bool:
        if self._is_key(value):
            return True
        return any(len(word) in self._lengths and self._is_key(word) for word in _WORDS.findall(value))

    def _is_key(self, text: str) -> bool:
        # The length first: almost nothing has it, and a digest is dear for each parameter of each request.
        return len(text) in self._lengths and _digest(text) in self._digests


def client_name(digest: bytes) -> str:
    """What limits call the client with a key of this digest; the key cannot be had from it."""
    return f"key:{digest.hex()[:12]}"


def short_keys(keys: Sequence[str]) -> str:
    """A sentence for the log if there are keys that can be guessed, else an empty one. It names none."""
    short = sum(len(key) < SHORT for key in keys)
    if not short:
        return ""
    return (
        f"RELAY_CLIENT_KEYS: {short} of {len(keys)} keys {'has' if short == 1 else 'have'} fewer than {SHORT} "
        "characters and can be guessed; make long ones with `openssl rand -hex 24`"
    )


def _unauthorized(message: str) -> errors.Unauthorized:
    error = errors.Unauthorized(message)
    error.fields = [("WWW-Authenticate", "Bearer")]  # a 401 must name a scheme (RFC 9110 section 15.5.2)
    return error


def _in_headers(environ: Mapping[str, Any]) -> list[str]:
    scheme, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    found = [token.strip()] if scheme.lower() == "bearer" else []
    found += [str(environ.get(name, "")) for name in _KEY_HEADERS]
    return [key for key in found if key]


def _field(part: str) -> tuple[str, str]:
    """A parameter's name, lower case, and its value, both decoded as a form's: what any upstream may read there."""
    name, _, value = part.partition("=")
    return unquote_plus(name, "latin-1").lower(), unquote_plus(value, "latin-1")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
