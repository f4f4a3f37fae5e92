"""The head of a text view's response: what the stream beneath would have answered, and what goes on of that.

No input or output: the view sends it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.wire import sse
from relay.wire.headers import SANDBOX, UNBUFFERED

if TYPE_CHECKING:
    from relay.errors import RelayError
    from relay.stream.relayed import Headers

#: What goes on of the head of an upstream's answer beside its status: the rest describes bytes that do not.
_KEPT = ("x-upstream-request-id", "retry-after", "x-should-retry")
_KEPT_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-", "openai-")


class Head:
    """Takes the place of the server's start_response for the stream beneath: notes what it would have answered."""

    def __init__(self) -> None:
        self.status = ""  # empty: nothing yet
        self.headers: Headers = []

    def __call__(self, status: str, headers: Headers) -> None:
        self.status, self.headers = status, headers

    @property
    def code(self) -> int:
        return int(self.status[:3] or 0)

    def field(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def is_of_events(self) -> bool:
        """Whether it is that of an event stream which can be read, of status 200."""
        plain = self.field("content-encoding").strip().lower() in ("", "identity")
        return self.code == 200 and plain and sse.is_event_stream(self.field("content-type"))

    def of_text(self, error: RelayError | None) -> tuple[str, Headers]:
        """Status and headers of the text that is sent instead, or of this error in its place."""
        if error is None:
            status, headers = "200 OK", self.headers
        elif self.code < 400:  # an answer that should have been an event stream
            status, headers = "502 Bad Gateway", error.headers()
        else:
            status, headers = self.status, self.headers
        kept = [
            (name, value) for name, value in headers if name.lower() in _KEPT or name.lower().startswith(_KEPT_PREFIXES)
        ]
        return status, [("Content-Type", f"{sse.MEDIA_TYPE}; charset=utf-8"), *SANDBOX, *UNBUFFERED, *kept]
