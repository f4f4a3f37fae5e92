"""Tickets: what an EventSource shows in place of a client key, since it can send no header. Good for a minute.

A ticket names its client by a MAC of the key's digest, so that whoever holds one learns nothing by which a key could be
guessed, and a ticket whose key is gone fits no client any more.
"""

from __future__ import annotations

import contextlib
import hmac
import os
from collections.abc import Iterable
from functools import cached_property

from itsdangerous import BadData, URLSafeTimedSerializer

from relay.observe import log
from relay.shared import reports

#: Seconds that a ticket is good for: enough for a page to open its EventSource, too little to be passed around.
TICKET_SECONDS = 60

#: Beside the workers' reports: the secret of a service that was given none.
_FILE = "ticket-secret"
_BYTES = 32


class Tickets:
    """Makes and reads the tickets of the clients with these keys."""

    def __init__(self, digests: Iterable[bytes], secret: str | None) -> None:
        """`digests`: of the client keys. `secret`: to sign with; None: one that the workers of this host share."""
        self._digests = tuple(digests)
        self._given = secret

    def make(self, digest: bytes) -> str:
        """A ticket for the client whose key has this digest."""
        return str(self._serializer.dumps(self._name(digest)))

    def digest(self, ticket: str) -> bytes | None:
        """The digest of its holder's key; None: the ticket is forged or expired, or its key is gone."""
        try:
            name = self._serializer.loads(ticket, max_age=TICKET_SECONDS)
        except BadData:
            return None
        return self._holders.get(name) if isinstance(name, str) else None

    @cached_property
    def _secret(self) -> bytes:
        return self._given.encode() if self._given else _shared_secret()

    @cached_property
    def _serializer(self) -> URLSafeTimedSerializer:
        return URLSafeTimedSerializer(self._secret, salt="relay-ticket")

    @cached_property
    def _holders(self) -> dict[str, bytes]:
        return {self._name(digest): digest for digest in self._digests}

    def _name(self, digest: bytes) -> str:
        return hmac.digest(self._secret, b"relay-ticket-holder" + digest, "sha256")[:16].hex()


def _shared_secret() -> bytes:
    """A random secret that all workers of this host find in their common folder; without one, this process' own."""
    fresh = os.urandom(_BYTES)
    try:
        path = reports.folder() / _FILE
        # Written whole before it has its name: of several workers that begin together one wins, and all read its.
        unnamed = path.with_name(f".{_FILE}-{os.getpid()}")
        with contextlib.suppress(FileExistsError):
            if not path.exists():
                unnamed.write_bytes(b"")
                unnamed.chmod(0o600)
                unnamed.write_bytes(fresh)
                os.link(unnamed, path)
        unnamed.unlink(missing_ok=True)
        secret = path.read_bytes()
        if len(secret) == _BYTES:
            return secret
        raise OSError(f"{path} is not whole")
    except OSError as error:
        log.logger.warning(
            "tickets hold in this worker only, since its folder cannot be used (%s); set RELAY_TICKET_SECRET", error
        )
        return fresh
