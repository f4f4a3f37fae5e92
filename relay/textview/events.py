"""What a text view says: bytes of an upstream's event stream in, events of plain text out, one by one or gathered.

No input or output, and nothing of when an event is sent. Of time it knows only when what it gathers is due.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from relay import errors
from relay.llm.answer import Answer
from relay.wire.sse_parser import Parser, TooLarge

if TYPE_CHECKING:
    from relay.llm.prompt import Pace

monotonic = time.monotonic
_NEVER = float("inf")

#: Characters that are gathered at most, if only a time was named.
_MOST_GATHERED = 100_000


def event(name: str, data: str) -> bytes:
    """One event. A carriage return cannot stand in one and must be gone (`TextEvents._lines`)."""
    lines = "".join([f"data: {line}\n" for line in data.split("\n")])
    return f"event: {name}\n{lines}\n".encode()


def json_event(name: str, data: Any) -> bytes:
    """One event whose data is JSON."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


class TextEvents:
    """The events of one answer's text.

    `ready`: those that may be sent, for the view to take. `flush_at`: when `flush` is due for what is gathered, in
    monotonic seconds. `fault`: what the answer has ended with, if it was not a complete one.
    """

    __slots__ = (
        "_after_cr",
        "_answer",
        "_gathered",
        "_gathered_size",
        "_pace",
        "_parser",
        "fault",
        "flush_at",
        "ready",
    )

    def __init__(self, pace: Pace) -> None:
        self.ready: deque[bytes] = deque()
        self.flush_at = _NEVER
        self.fault: errors.RelayError | None = None
        self._pace = pace
        self._parser = Parser()
        self._answer = Answer()
        self._after_cr = False  # the text so far has ended in a carriage return, to which a newline may still belong
        self._gathered: list[str] = []
        self._gathered_size = 0

    def feed(self, data: bytes) -> bool:
        """Read what has come from upstream; whether the answer has ended with it, as it should or with a `fault`."""
        answer = self._answer
        pieces: list[str] = []
        fault: errors.RelayError | None = None
        try:
            for each in self._parser.feed(data):
                pieces.append(answer.read(each))
                if answer.ended:
                    break
        except TooLarge as error:
            fault = errors.UpstreamFailed(f"the upstream's answer has {error}")
        except errors.RelayError as error:
            fault = error.detached()
        if self._pace.batches:
            self._gather("".join(pieces))
        else:
            self.ready.extend([event("message", text) for piece in pieces if (text := self._lines(piece))])
        if fault is None and answer.ended and answer.strange:
            fault = _strange()
        self.fault = fault
        return answer.ended or fault is not None

    def flush(self) -> None:
        """What was gathered may go out."""
        self.flush_at = _NEVER
        text = self._take_gathered()
        if text:
            self.ready.append(json_event("batch", {"content": text}))

    @property
    def finished(self) -> bool:
        """Whether the model has said why it stopped: what there is of the answer is whole, mark or none."""
        return self._answer.finished

    def without_mark(self) -> errors.RelayError | None:
        """The upstream's body has ended cleanly, without an end mark. None: the answer was complete all the same."""
        if self._answer.finished:
            return None
        if self._answer.strange:
            return _strange()
        return errors.UpstreamCut("the upstream's answer ended before it was complete")

    def done(self) -> bytes:
        """The words of a complete answer, after its text."""
        self.flush_at = _NEVER
        left = self._answer.end()
        done = json_event("done", self._answer.summary())
        if self._pace.batches:
            return json_event("final", {"content": self._take_gathered() + left}) + done
        if left:
            self.ready.append(event("message", self._lines(left)))
        return done

    def broken_off(self) -> None:
        """The answer goes no further: what there is of its text may go out."""
        left = self._answer.end()
        if self._pace.batches:
            self._gather(left)
            self.flush()
        elif left:
            self.ready.append(event("message", self._lines(left)))

    def _lines(self, text: str) -> str:
        """The text with a newline for each CRLF and CR, as SSE cannot carry these."""
        if self._after_cr and text:
            self._after_cr = False
            text = text.removeprefix("\n")
        if "\r" in text:
            self._after_cr = text.endswith("\r")
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return text

    def _gather(self, text: str) -> None:
        if not text:
            return
        if not self._gathered and self._pace.batch_seconds:
            self.flush_at = monotonic() + self._pace.batch_seconds
        self._gathered.append(text)
        self._gathered_size += len(text)
        if self._gathered_size >= (self._pace.batch_size or _MOST_GATHERED):
            self.flush()

    def _take_gathered(self) -> str:
        text = "".join(self._gathered)
        self._gathered, self._gathered_size = [], 0
        return text


def _strange() -> errors.RelayError:
    return errors.UpstreamFailed("the upstream's events are of no API whose text is known here")
