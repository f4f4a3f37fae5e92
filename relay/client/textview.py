"""What the relay's own text view says (`/chat/stream`, `/stream/aware`): text as it is, and how the answer ends.

The same to read from as relay.llm.answer.Answer, which reads what APIs say.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from relay.llm.answer import failure

if TYPE_CHECKING:
    from relay.wire.sse_parser import Event

PATHS = ("chat/stream", "stream/aware")


class TextView:
    """One answer, read event by event. `ended`: its `done` has come; no other end is one."""

    finished = False

    def __init__(self) -> None:
        self.ended = False

    def read(self, event: Event) -> str:
        """The text of the next event. Raises UpstreamSaid if it tells of a failure."""
        if event.name == "message":
            return event.data
        if event.name in ("batch", "final"):
            return str(_object(event.data).get("content") or "")
        if event.name == "error":
            raise failure(_object(event.data) or None, event.data)
        self.ended = self.ended or event.name == "done"
        return ""

    def end(self) -> str:
        """Nothing: the view keeps no half characters back."""
        return ""


def _object(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
