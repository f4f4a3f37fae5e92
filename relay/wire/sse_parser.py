"""Server-Sent Events read: bytes in, events out. The view that shows text needs it; the relay itself never does.

No input or output. It follows the WHATWG HTML standard, "Server-sent events", sections 9.2.5 and 9.2.6
(https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation), whatever pieces the bytes
come in. An event that no blank line has ended is never given out.
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: Bytes of one event, comments and unknown fields aside. The longest seen from an LLM are images of 1 to 3 MiB.
MOST_BYTES = 8 * 1024 * 1024

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")


class TooLarge(ValueError):
    """An event, or a line of one, is longer than anybody should keep."""


class Event(NamedTuple):
    """`name` is its type, `message` if it names none; `data` without the last line end; `id` the last that came."""

    name: str
    data: str
    id: str = ""


class Parser:
    """Feed it bytes; it gives the events that are complete with them.

    `last_id` is the last event id that came (it stays across events), `retry` the last reconnection time in
    milliseconds, or None.
    """

    __slots__ = ("_after_cr", "_begun", "_data", "_held", "_held_size", "_most", "_name", "_size", "last_id", "retry")

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.last_id = ""
        self.retry: int | None = None
        self._most = most
        self._begun: bytes | None = b""  # what may be the beginning of a byte order mark; None: past it
        self._after_cr = False  # the last byte was a CR, to whose line end a LF may still belong
        self._held: list[bytes] = []  # a line that has not ended
        self._held_size = 0
        self._name = ""
        self._data: list[str] = []
        self._size = 0  # of what is kept of the event that has not ended

    def feed(self, data: bytes) -> list[Event]:
        """The next bytes. Raises TooLarge."""
        if self._begun is not None:
            data = self._begun + data
            if len(data) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(data):
                self._begun = data
                return []
            self._begun = None
            data = data.removeprefix(_BYTE_ORDER_MARK)
        if self._after_cr and data:
            self._after_cr = False
            if data[0] == 0x0A:
                data = data[1:]
        if not data:
            return []
        if b"\r" in data:
            lines = _LINE_END.split(data)
            self._after_cr = data[-1] == 0x0D
        else:
            lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self._held:
            lines[0] = b"".join([*self._held, lines[0]])
            self._held, self._held_size = [], 0
        events: list[Event] = []
        for line in lines:
            self._line(line, events)
        if rest:
            self._held.append(rest)
            self._held_size += len(rest)
        if self._held_size + self._size > self._most:
            raise TooLarge(f"an event of more than {self._most} bytes")
        return events

    def _line(self, line: bytes, events: list[Event]) -> None:
        if not line:
            # An event without data is none; its name is forgotten all the same.
            if self._data:
                events.append(Event(self._name or "message", "\n".join(self._data), self.last_id))
                self._data = []
            self._name = ""
            self._size = 0
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        # Each line by itself: no line end is part of a longer UTF-8 sequence, and an ill one ends with its line.
        if name == b"data":
            self._size += len(value) + 1
            if self._size > self._most:
                raise TooLarge(f"an event of more than {self._most} bytes")
            self._data.append(value.decode("utf-8", "replace"))
        elif name == b"event":
            self._name = value.decode("utf-8", "replace")
        elif name == b"id":
            if b"\0" not in value:
                self.last_id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) < 16:
            self.retry = int(value)
