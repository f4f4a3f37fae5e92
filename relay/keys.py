"""Client keys: who may call. Compared in constant time; neither a key nor a part of one is ever shown."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from typing import Any

from relay import errors


class ClientKeys:
    """The keys that clients may call with. Without any, everybody may."""

    def __init__(self, keys: Iterable[str]) -> None:
        # Digests have one length, so that comparing them tells nothing of the keys'.
        self._digests = [_digest(key) for key in keys]

    def check(self, environ: Mapping[str, Any]) -> str | None:
        """Who the client is by its key: a short name for limits and logs, from which the key cannot be had.

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
        raise errors.Unauthorized(
            "a client key is needed, in `Authorization: Bearer`, `x-api-key` or `api-key`, and none that is known came"
        )


def _candidates(environ: Mapping[str, Any]) -> list[str]:
    scheme, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    found = [token.strip()] if scheme.lower() == "bearer" else []
    found += [str(environ.get(name, "")) for name in ("HTTP_X_API_KEY", "HTTP_API_KEY")]
    return [key for key in found if key]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
