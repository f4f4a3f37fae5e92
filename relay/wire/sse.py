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

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LF, _CR, _I = b"\n\ri"
# With every line end a LF: a field called id, and what makes counting blank lines need care.
_ID_FIELD = re.compile(rb"\nid[:\n]")
_ID_FIELD_OR_BLANK_LINES = re.compile(rb"\n(?:id[:\n]|\n\n)")
_BLANK_LINES = re.compile(rb"\n\n\n")
_EVENT_END = re.compile(rb"\n\n+")
_BLANK_LINE = re.compile(rb"\n\n")


def is_event_stream(content_type: str) -> bool:
    """Whether a Content-Type field value names an event stream, whatever its parameters and case."""
    return content_type.partition(";")[0].strip(" \t").lower() == MEDIA_TYPE


def error_frame(error_json: str) -> bytes:
    """An event that OpenAI's and Anthropic's SDKs raise. `error_json` is one line, ASCII or UTF-8 text."""
    return b"event: error\ndata: " + error_json.encode() + b"\n\n"


#: The id of an answer that failed for good. An EventSource connects again after whatever end and sends it back; that
#: request gets 204, which stops it (WHATWG HTML section 9.2.3). No upstream has it.
GAVE_UP = "relay-gave-up"
#: Goes before an error frame's event: come back in a day, and with that id.
FOR_GOOD = b"retry: 86400000\nid: relay-gave-up\n"


class Tracker:
    """Knows where the last byte of an event stream stands, whatever pieces the bytes came in."""

    __slots__ = (
        "_after_cr",
        "_begun",
        "_comment",
        "_crlf_seen",
        "_tail",
        "_unusual",
        "_whole_events",
        "at_boundary",
        "events",
        "id_seen",
    )

    def __init__(self, comment: bytes = HEARTBEAT) -> None:
        """`comment`: the heartbeat where nothing forbids it (HEARTBEAT or HEARTBEAT_AFTER_ID)."""
        self._comment = comment
        #: Whether the stream stands at its start or after a blank line, in whatever mix of CRLF, LF and CR.
        self.at_boundary = True
        #: The stream has carried an `id` field.
        self.id_seen = False
        #: Blocks of lines that a blank line has ended.
        self.events = 0
        # The last three bytes, each line end as one LF: enough to tell blank lines, and an `id` field, across pieces. A
        # stream starts as if after a blank line.
        self._tail = b"\n\n"
        self._crlf_seen = False
        self._after_cr = False  # the last byte was a CR, to which a LF may still belong
        self._begun: bytes | None = b""  # what may be the beginning of a byte order mark; None: past it
        self._unusual = _ID_FIELD_OR_BLANK_LINES
        # Pieces that are whole events, as most are: the state after them is that before.
        self._whole_events = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        if self._whole_events and data[-1:] == b"\n":
            end = data.find(b"\n")
            after = len(data) - end
            if after == 3:
                if data[-4:] == b"\r\n\r\n" and data.find(b"\r") == end - 1 and data[0] not in b"i\r":
                    self.events += 1
                    return
            elif _CR not in data and data[0] != _LF and (data[0] != _I or self.id_seen):
                if after == 2:
                    self.events += 1
                    return
                if data[-2] == _LF and self._unusual.search(data) is None:
                    self.events += len(_BLANK_LINE.findall(data))  # twice as fast as count()
                    return
        if self._begun is not None:
            data = self._begin(data)
        if self._after_cr or _CR in data:
            data = self._with_lf(data)
        if not data:
            return
        tail = self._tail
        seen = tail + data
        if self._unusual.search(seen) is None:
            self.events += data.count(b"\n\n") + (data[0] == _LF == tail[-1])
        else:
            self.events += len(_EVENT_END.findall(seen)) - len(_EVENT_END.findall(tail))
            if not self.id_seen and _ID_FIELD.search(seen) is not None:
                self.id_seen = True
                self._unusual = _BLANK_LINES
        self._tail = seen[-3:]
        self.at_boundary = seen.endswith(b"\n\n")
        self._whole_events = self.at_boundary and not self._after_cr and self._begun is None

    def _begin(self, data: bytes) -> bytes:
        """Leave out a byte order mark, which is no part of the first line."""
        data = (self._begun or b"") + data
        if len(data) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(data):
            self._begun = data
            self.at_boundary = not data
            return b""
        self._begun = None
        data = data.removeprefix(_BYTE_ORDER_MARK)
        self.at_boundary = False  # behind the mark it is no longer the start, and no line has ended yet
        return data

    def _with_lf(self, data: bytes) -> bytes:
        """The same lines, each ended with LF. The LF of a CRLF in two pieces is left out."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
            self._crlf_seen = True
        if data:
            self._after_cr = data[-1] == _CR
            self._crlf_seen = self._crlf_seen or b"\r\n" in data
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    @property
    def heartbeat(self) -> bytes:
        """The comment that may be added where the stream stands now; empty: none.

        After a CR a LF may follow that belongs to it, if the stream has CRLFs at all. A comment between the two is
        harmless (the LF becomes one more blank line) unless the stream carries `id` fields, where a blank line is not.
        """
        if not self.at_boundary:
            return b""
        if not self.id_seen:
            return self._comment
        return b"" if self._after_cr and self._crlf_seen else HEARTBEAT_AFTER_ID
