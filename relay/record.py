"""What is known of one relayed request; complete once it has ended. For the log, the metrics and `on_end`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.llm.usage import Usage


#: Why a stream can have ended.
REASONS = (
    "done", "client_gone", "upstream_error", "upstream_cut", "connect_timeout", "send_timeout", "first_byte_timeout",
    "idle_timeout", "write_timeout", "drained", "relay_error",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Record:
    """Times are seconds."""

    request_id: str
    method: str
    route: str
    client: str
    owner: str  # whom limits for one client count it for: its key, by a name of it, or its address
    mount: str
    asks_for_events: bool = False
    dialect: str = ""  # how the API of its path tells of errors (relay.errors.dialect_of)
    own_key: bool = True  # it goes upstream with the relay's key, if there is one, and not with one of the shop's hook
    admitted: bool = False  # it got a lease: from then on it is a stream, and its end has one of the known reasons
    status: int = 0
    reason: str = ""
    upstream_request_id: str = ""
    upstream_host: str = ""
    model: str | None = None  # as the request's body named it
    tenant: str | None = None  # whom the request is for, as the shop has said in `flask.g.relay_tenant`; for `on_end`
    usage: Usage | None = None  # as the answer reported it
    first_byte: float | None = None  # from the request to the upstream's head
    seconds: float = 0.0
    bytes: int = 0
    events: int = 0
    heartbeats: int = 0
    longest_gap: float = 0.0  # the longest time between two arrivals
