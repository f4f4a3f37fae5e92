"""A stream as text: reads an upstream's event stream and gives the server events of plain text in its place.

It stands between a `Stream` and the server, as a WSGI iterable around another. Admission, clocks, drain, the upstream
and the client's going are the stream's; here is what its bytes say, and when that is sent. Heartbeats are this view's
too: an upstream that sends nothing but comments or reasoning is silent to whoever reads text.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

from relay import errors, sse
from relay.answer import Answer, failure_in_body
from relay.drain import drain
from relay.eventsource import Parser, TooLarge
from relay.headers import SANDBOX, UNBUFFERED

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.presence import Presence
    from relay.prompts import Pace
    from relay.settings import Settings
    from relay.stream import Headers, Stream

monotonic = time.monotonic
_NEVER = float("inf")

#: Bytes of an upstream's error that are read.
_MOST_OF_AN_ERROR = 64 * 1024
#: Characters that are gathered at most, if only a time was named.
_MOST_GATHERED = 100_000
#: Seconds that the upstream has to end its body after its end mark, so that its connection can be used again.
_LAST_WORD = 1.0
#: What goes on of the head of an upstream's answer beside its status: the rest describes bytes that do not.
_KEPT = ("x-upstream-request-id", "retry-after", "x-should-retry")
_KEPT_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-", "openai-")


def event(name: str, data: str) -> bytes:
    """One event. A carriage return cannot stand in one and must be gone (`_lines`)."""
    lines = "".join([f"data: {line}\n" for line in data.split("\n")])
    return f"event: {name}\n{lines}\n".encode()


def json_event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


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


class TextView:
    """The text of one stream as a WSGI iterable; `close` ends both."""

    def __init__(
        self,
        stream: Stream,
        head: Head,
        settings: Settings,
        pace: Pace,
        start_response: Callable[..., Any],
        *,
        complete: Callable[[Headers], Headers],
        event_source: bool,
        presence: Presence | None,
    ) -> None:
        """`stream` has been given `head` as its start_response, and settings without heartbeats. `complete` adds what
        each response has. `event_source`: for a GET of a browser's EventSource, which reads no status but 200 and
        connects again after each end. `presence`: of a client that may report in; it is closed with the view."""
        self._stream = stream
        self._head = head
        self._settings = settings
        self._pace = pace
        self._start_response = start_response
        self._complete = complete
        self._event_source = event_source
        self._presence = presence
        self._comment = sse.HEARTBEAT_AFTER_ID if event_source else sse.HEARTBEAT
        self._parser = Parser()
        self._answer = Answer()
        self._after_cr = False  # the text so far has ended in a carriage return, to which a newline may still belong
        self._heard = False  # the head of the upstream's answer
        self._refusal: bytearray | None = None  # the body of an answer that is no event stream
        self._gathered: list[str] = []
        self._gathered_size = 0
        self._texts: deque[bytes] = deque()  # events of text that wait for their turn
        self._last: bytes | None = None  # what is said after them
        self._then: Callable[[TextView], bytes] = TextView._read
        self._after_last: Callable[[TextView], bytes] = TextView._stop
        self._fault: errors.RelayError | None = None  # what it tells of, if not of an answer that is complete
        self._begun = False
        # Clocks, in monotonic seconds.
        now = monotonic()
        # As a stream's own hold; one that tells its id does so at once.
        hold_at = now + settings.hold if settings.hold and settings.heartbeat else _NEVER
        self._begin_at = now if presence is not None else hold_at
        self._beat_at = _NEVER
        self._flush_at = _NEVER
        self._slot_at = now  # when the next event of text may be sent
        self._interval = 1 / pace.events_per_second if pace.events_per_second else 0.0
        self._silent_since = now  # no text since then
        self._spoke = False  # the server has been given something

    def __iter__(self) -> TextView:
        return self

    def __next__(self) -> bytes:
        if self._spoke:
            self._spoke = False
            self._beat_at = monotonic() + (self._settings.heartbeat or _NEVER)
        data = self._then(self)
        self._spoke = True
        return data

    # While the answer goes on.

    def _read(self) -> bytes:
        """The next bytes for the client: text, a heartbeat, or the end."""
        while True:
            said = self._say()
            if said:
                self._silent_since = monotonic()
                return said
            if self._texts:
                beat = self._rest()
            else:
                beat = self._hear()
            if beat is not None:
                return beat

    def _say(self) -> bytes:
        """What may be sent now: all text that there is, with a pace one event of it, and the end after it."""
        texts = self._texts
        if texts and self._interval:
            now = monotonic()
            if now < min(self._slot_at, drain.at):
                return b""
            self._slot_at = now + self._interval
            return texts.popleft()
        said = b"".join(texts)
        texts.clear()
        if self._last is not None:
            said += self._last
            self._then = self._after_last
        return said

    def _rest(self) -> bytes | None:
        """Wait for the next turn; meanwhile nothing is read upstream, so that TCP slows it."""
        presence_at = _NEVER if self._presence is None else self._presence.look_at
        self._stream.rest(min(self._slot_at, self._beat_at, presence_at))
        return self._look(monotonic())

    def _hear(self) -> bytes | None:
        """Read on. None: nothing of it can be sent yet. Raises StreamCut when the client has gone."""
        stream = self._stream
        presence_at = _NEVER if self._presence is None else self._presence.look_at
        stream.look_again(min(self._begin_at, self._beat_at, self._flush_at, presence_at))
        try:
            data = next(stream)
        except StopIteration:
            return self._ended()
        except errors.StreamCut:
            if stream.failure is None:
                raise
            return self._failed(stream.failure)
        if stream.failure is not None:
            return self._refused(data) if not stream.record.admitted else self._failed(stream.failure)
        if self._refusal is not None and data:
            return self._hear_refusal(self._refusal, data)
        if not self._heard and self._head.status:
            return self._answered(data)
        if data:
            self._take(data)
            if self._texts or self._last is not None:
                return None
        return self._look(monotonic())

    def _look(self, now: float) -> bytes | None:
        """See what the clocks call for."""
        if now >= self._begin_at:
            self._begin_at = _NEVER
            return self._begin()
        if now >= self._flush_at:
            self._flush()
            return None
        if self._presence is not None and self._presence.missed():
            error = errors.HeartbeatMissed("no POST to stream/heartbeat came in time: the client seems to have gone")
            self._stream.finish(error)  # the upstream is let go at once
            self._interval = 0.0
            return self._failed(error)
        if now >= self._beat_at:
            self._stream.record.heartbeats += 1
            if self._presence is None:
                return self._comment
            silent = round(now - self._silent_since, 1)
            return json_event("ping", {"stream_id": self._presence.id, "silent_s": silent})
        return None

    # The head.

    def _begin(self, error: errors.RelayError | None = None) -> bytes:
        """Send the head, of this error or of a stream, and what stands before all text."""
        self._begun = True
        self._begin_at = _NEVER
        status, headers = self._head.status or "200 OK", self._head.headers
        if error is None:
            status = "200 OK"
        elif self._head.code < 400:  # an answer that should have been an event stream
            status, headers = "502 Bad Gateway", error.headers()
        kept = [
            (name, value) for name, value in headers if name.lower() in _KEPT or name.lower().startswith(_KEPT_PREFIXES)
        ]
        headers = [("Content-Type", f"{sse.MEDIA_TYPE}; charset=utf-8"), *SANDBOX, *UNBUFFERED, *kept]
        self._start_response(status, self._complete(headers))
        if self._presence is not None:
            return event("stream_id", self._presence.id)
        if self._event_source:
            # An EventSource that has seen an id sends it when it connects again, and is told to stop by it. A block
            # without data sets it and is no event (WHATWG HTML section 9.2.6, "dispatch the event", step 2).
            return f"id: {self._stream.record.request_id}\n\n".encode()
        return b""

    def _answered(self, data: bytes) -> bytes | None:
        """The upstream's head is there, and perhaps the first bytes."""
        self._heard = True
        head = self._head
        plain = head.field("content-encoding").strip().lower() in ("", "identity")
        if head.code != 200 or not plain or not sse.is_event_stream(head.field("content-type")):
            self._refusal = bytearray()
            return self._hear_refusal(self._refusal, data)
        begun = None if self._begun else self._begin()
        if data:
            self._take(data)
        # The head goes out at once, with the text that has come along.
        return begun if begun is None else begun + self._say()

    def _refused(self, body: bytes) -> bytes:
        """The relay has refused the request before it was sent: that is plain JSON with its status."""
        self._then = TextView._stop
        self._start_response(self._head.status, self._complete(self._head.headers))
        return body

    def _hear_refusal(self, refusal: bytearray, data: bytes) -> bytes | None:
        """An answer that is no event stream of status 200: its beginning says why."""
        refusal += data
        return self._refusal_heard(refusal) if len(refusal) >= _MOST_OF_AN_ERROR else None

    def _refusal_heard(self, refusal: bytearray) -> bytes | None:
        body = bytes(refusal[:_MOST_OF_AN_ERROR])
        return self._failed(failure_in_body(body, self._head.code, self._head.field("content-type")))

    # The text.

    def _take(self, data: bytes) -> None:
        """Read what has come from upstream."""
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
            fault = error
        if self._pace.batches:
            self._gather("".join(pieces))
        else:
            self._texts.extend([event("message", text) for piece in pieces if (text := self._lines(piece))])
        if fault is not None:
            self._failed(fault)
        elif answer.ended and answer.strange:
            self._failed(_strange())
        elif answer.ended:
            self._last = self._done()
            self._after_last = TextView._linger

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
            self._flush_at = monotonic() + self._pace.batch_seconds
        self._gathered.append(text)
        self._gathered_size += len(text)
        if self._gathered_size >= (self._pace.batch_size or _MOST_GATHERED):
            self._flush()

    def _flush(self) -> None:
        """What was gathered may go out."""
        self._flush_at = _NEVER
        text = self._take_gathered()
        if text:
            self._texts.append(json_event("batch", {"content": text}))

    def _take_gathered(self) -> str:
        text = "".join(self._gathered)
        self._gathered, self._gathered_size = [], 0
        return text

    # The end.

    def _ended(self) -> bytes | None:
        """The upstream's body has ended cleanly. Whether the answer has, is another matter."""
        if self._refusal is not None:
            return self._refusal_heard(self._refusal)
        if self._answer.finished:
            self._last = self._done()
            return None
        if self._answer.strange:
            return self._failed(_strange())
        return self._failed(errors.UpstreamCut("the upstream's answer ended before it was complete"))

    def _done(self) -> bytes:
        """The words of a complete answer, after its text."""
        self._flush_at = _NEVER
        left = self._answer.end()
        done = json_event("done", self._answer.summary())
        if self._pace.batches:
            return json_event("final", {"content": self._take_gathered() + left}) + done
        if left:
            self._texts.append(event("message", self._lines(left)))
        return done

    def _error(self, error: errors.RelayError) -> bytes:
        """The words of one that is not, after what there is of it."""
        self._flush_at = _NEVER
        left = self._answer.end()
        said = sse.error_frame(error.json(self._stream.record.request_id))
        if self._pace.batches:
            self._gather(left)
            self._flush()
        elif left:
            self._texts.append(event("message", self._lines(left)))
        return said

    def _failed(self, error: errors.RelayError) -> bytes | None:
        """Have it told, and the head sent if it was not."""
        self._fault = error.detached()
        begun = None
        if self._begun:
            # What the upstream has said to its end is a whole answer; all else is cut off.
            self._after_last = TextView._stop if isinstance(error, errors.UpstreamSaid) else TextView._cut
        elif self._event_source:
            begun = self._begin()
        else:
            begun = self._begin(error)
        self._last = self._error(error)
        return begun

    def _linger(self) -> bytes:
        """All has been said; let the upstream end its body, but not for long."""
        stream, until = self._stream, monotonic() + _LAST_WORD
        stream.look_again(until)
        try:
            while monotonic() < until and stream.failure is None:
                next(stream)
        except (StopIteration, errors.StreamCut):
            pass
        return self._stop()

    def _stop(self) -> NoReturn:
        self._stream.finish(self._fault)
        raise StopIteration

    def _cut(self) -> NoReturn:
        self._stream.finish(self._fault)
        self._stream.cut()

    def close(self) -> None:
        """The server is done with this response, for whatever reason."""
        self._stream.close()
        if self._presence is not None:
            self._presence.close()


def _strange() -> errors.RelayError:
    return errors.UpstreamFailed("the upstream's events are of no API whose text is known here")
