"""The relay's log: one line for each relayed request, when it has ended. Never a prompt, key, cookie or query."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.errors import RelayError
    from relay.stream import Record

logger = logging.getLogger("relay")


def refused(error: RelayError, request_id: str, method: str) -> None:
    """Write the line of a request that the relay answered itself, before it would have become a stream."""
    line = {
        "event": "refused",
        "request_id": request_id,
        "method": method,
        "status": error.status,
        "reason": error.code,
    }
    logger.info("%s", json.dumps(line))


def ended(record: Record) -> None:
    """Write the line of a request that has ended."""
    if not logger.isEnabledFor(logging.INFO):
        return
    line = {
        "event": "request",
        "request_id": record.request_id,
        "client": record.client,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "reason": record.reason,
        "first_byte_ms": None if record.first_byte is None else round(record.first_byte * 1000, 1),
        "total_ms": round(record.seconds * 1000, 1),
        "bytes": record.bytes,
        "events": record.events,
        "heartbeats": record.heartbeats,
        "longest_gap_ms": round(record.longest_gap * 1000, 1),
        "upstream_request_id": record.upstream_request_id,
        "worker": os.getpid(),
    }
    logger.info("%s", json.dumps(line))
