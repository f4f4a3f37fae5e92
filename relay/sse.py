"""Server-Sent Events as bytes: where an event ends, and the two things that a relay may add there.

No input or output, no Flask, no requests. Line ends and fields follow the WHATWG HTML standard, "Server-sent
events", section 9.2.6 (https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream): a
line ends with CRLF, LF or CR, a blank line dispatches the event, a line that begins with a colon is a comment.
"""

from __future__ import annotations

import re

MEDIA_TYPE = "text/event-stream"

#: A comment line and the blank line after it.
HEARTBEAT = b": keep-alive\n\n"
#: The same without the blank line. Once an `id` field was seen, openai-python takes each blank line for the end of
#: an event, finds it empty and fails on its JSON; a comment line alone disturbs no parser.
HEARTBEAT_AFTER_ID = b": keep-alive\n"

#: A byte that can stand before the first field of a line: a line end, or the last byte of a byte order mark (a text
#: byte 0xBF before a false `id:` costs nothing but the blank line of a heartbeat).
_ID_FIELD = re.compile(rb"[\r\n\xbf]id[:\r\n]")
#: The end of a line with something on it, and a blank line.
_EVENT_END = re.compile(rb"[^\r\n](?:\r\n|\n|\r(?!\n)){2}")


def is_event_stream(content_type: str) -> bool:
    """Whether a Content-Type field value names an event stream, whatever its parameters and case."""
    return content_type.partition(";")[0].strip().lower() == MEDIA_TYPE


def error_frame(error_json: str) -> bytes:
    """An event that OpenAI's and Anthropic's SDKs raise. `error_json` is one line, ASCII or UTF-8 text."""
    return b"event: error\ndata: " + error_json.encode() + b"\n\n"


class Tracker:
    """Knows where the last byte of an event stream stands, whatever pieces the bytes came in."""

    __slots__ = ("_tail", "events", "id_seen")

    def __init__(self) -> None:
        # The last three bytes: enough to tell every mix of two line ends, and an `id` field, across pieces. A stream
        # starts as if after a blank line.
        self._tail = b"\n\n"
        #: The stream has carried an `id` field.
        self.id_seen = False
        #: Blocks of lines that a blank line has ended.
        self.events = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        seen = self._tail + data
        if not self.id_seen and (b"id:" in seen or b"id\n" in seen or b"id\r" in seen):
            self.id_seen = _ID_FIELD.search(seen) is not None
        if b"\r" in seen or b"\n\n\n" in seen:
            self.events += len(_EVENT_END.findall(seen)) - len(_EVENT_END.findall(self._tail))
        else:
            self.events += seen.count(b"\n\n") - self._tail.count(b"\n\n")
        self._tail = seen[-3:]

    @property
    def at_boundary(self) -> bool:
        """Whether the stream stands at its start or after a blank line, in whatever mix of CRLF, LF and CR."""
        tail = self._tail
        if tail.endswith((b"\n\n", b"\r\r", b"\n\r")):
            return True
        return tail.endswith(b"\r\n") and tail[-3:-2] in (b"\r", b"\n")

    @property
    def heartbeat(self) -> bytes:
        """The comment that may be added where the stream stands now; empty: none.

        After `\\n\\r` a LF may follow that belongs to this CR. A comment between the two is harmless (the LF becomes
        one more blank line) unless the stream carries `id` fields, where a blank line is not.
        """
        if not self.at_boundary:
            return b""
        if not self.id_seen:
            return HEARTBEAT
        return b"" if self._tail.endswith(b"\n\r") else HEARTBEAT_AFTER_ID
