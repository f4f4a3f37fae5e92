"""Client keys: who may call. Compared in constant time; neither a key nor a part of one is ever shown."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from typing import Any

from itsdangerous import BadData, URLSafeTimedSerializer

from relay import errors

#: Seconds that a ticket is good for: enough for a page to open its EventSource, too little to be passed around.
TICKET_SECONDS = 60


class ClientKeys:
    """The keys that clients may call with. Without any, everybody may."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so that comparing them tells nothing of the keys'.
        self._digests = [_digest(key) for key in keys]
        # Signed with the keys themselves, so that every worker and host that has them can check a ticket, and none is
        # good any more when the keys have changed.
        self._tickets = URLSafeTimedSerializer(b"".join(sorted(self._digests)), salt="relay-ticket")

    def __bool__(self) -> bool:
        return bool(self._digests)

    def ticket(self, name: str) -> str:
        """A ticket for the client of this name, for `?ticket=`: EventSource cannot send headers."""
        return str(self._tickets.dumps(name))

    def take_ticket(self, query: str | None) -> tuple[str | None, str | None]:
        """The name of the client whose ticket is in a raw query, and the query without it.

        No name: there is none. Raises Unauthorized for one that is not good, or no longer.
        """
        if not self or query is None or "ticket=" not in query:
            return None, query
        parts = query.split("&")
        tickets = [part for part in parts if part.startswith("ticket=")]
        if not tickets:
            return None, query
        try:
            name = self._tickets.loads(tickets[0].partition("=")[2], max_age=TICKET_SECONDS)
        except BadData:
            raise _unauthorized("the ticket is not good, or no longer; POST /ticket gives another") from None
        return str(name), "&".join(part for part in parts if part not in tickets) or None

    def check(self, environ: Mapping[str, Any]) -> str | None:
        """Who the client is by the key in its headers: a short name for limits, from which the key cannot be had.

        The key is taken from `Authorization: Bearer`, `x-api-key` or `api-key`. None: no keys are set. Raises
        Unauthorized if none of ours came.
        """
        if not self._digests:
            return None
        for candidate in _candidates(environ):
            given = _digest(candidate)
            # All are compared, whichever fits.
            known = False
            for digest in self._digests:
                known |= hmac.compare_digest(given, digest)
            if known:
                return f"key:{given.hex()[:12]}"
        raise _unauthorized(
            "a client key is needed, in `Authorization: Bearer`, `x-api-key` or `api-key`, and none that is known came"
        )


def _unauthorized(message: str) -> errors.Unauthorized:
    error = errors.Unauthorized(message)
    error.fields = [("WWW-Authenticate", "Bearer")]  # a 401 must name a scheme (RFC 9110 section 15.5.2)
    return error


def _candidates(environ: Mapping[str, Any]) -> list[str]:
    scheme, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    found = [token.strip()] if scheme.lower() == "bearer" else []
    found += [str(environ.get(name, "")) for name in ("HTTP_X_API_KEY", "HTTP_API_KEY")]
    return [key for key in found if key]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
