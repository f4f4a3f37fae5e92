"""The life of a text view: when it reads its stream, when it sends what that says, and how it ends.

It stands between a `Stream` and the server, as a WSGI iterable around another. Admission, the upstream's clocks, drain
and the client's going are the stream's; what is sent is made in `events` and `head`. Heartbeats are this view's too:
an upstream that sends nothing but comments or reasoning is silent to whoever reads text.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from relay import errors
from relay.llm.answer import failure_in_body
from relay.observe import log
from relay.stream.drain import drain
from relay.textview.events import TextEvents, event, json_event
from relay.wire import sse

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.llm.prompt import Pace
    from relay.settings import Settings
    from relay.shared.reports import Presence
    from relay.stream.relayed import Headers, Stream
    from relay.textview.head import Head

monotonic = time.monotonic
_NEVER = float("inf")

#: Bytes of an upstream's error that are read.
_MOST_OF_AN_ERROR = 64 * 1024
#: Seconds that the upstream has to end its body after its end mark, so that its connection can be used again.
_LAST_WORD = 1.0
#: Seconds that an answer whose model has said why it stopped has for its end mark, and for its usage.
_LAST_MARK = 2.0


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
        self._start_response = start_response
        self._complete = complete
        self._event_source = event_source
        self._presence = presence
        self._comment = sse.HEARTBEAT_AFTER_ID if event_source else sse.HEARTBEAT
        self._events = TextEvents(pace)
        self._heard = False  # the head of the upstream's answer
        self._refusal: bytearray | None = None  # the body of an answer that is no event stream
        self._last: bytes | None = None  # what is said after all text
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
        self._whole_at = _NEVER  # when it is done without an end mark
        self._slot_at = now  # when the next event of text may be sent
        self._interval = 1 / pace.events_per_second if pace.events_per_second else 0.0
        self._silent_since = now  # no text since then
        self._spoke = False  # the server has been given something

    def set_pace(self, pace: Pace) -> None:
        """For a pace that is known only once the request's body was read; before any text has come."""
        self._events = TextEvents(pace)
        self._interval = 1 / pace.events_per_second if pace.events_per_second else 0.0

    def __iter__(self) -> TextView:
        return self

    def __next__(self) -> bytes:
        if self._spoke:
            self._spoke = False
            self._beat_at = monotonic() + (self._settings.heartbeat or _NEVER)
        try:
            data = self._then(self)
        except (StopIteration, errors.StreamCut):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach the server (relay.stream.relayed)
            log.fault(error, "making text of a stream", self._stream.record.request_id)
            data = self._tell_fault()
        self._spoke = True
        return data

    def _tell_fault(self) -> bytes:
        """Have a fault of the relay's own told, if its head can be made, and cut."""
        fault = errors.Fault("the relay has met a fault of its own; its log says which")
        self._stream.finish(fault)
        try:
            return (self._failed(fault) or b"") + self._say()
        except Exception as error:  # noqa: BLE001
            log.fault(error, "telling of a fault", self._stream.record.request_id)
            raise errors.StreamCut from None

    # While the answer goes on.

    def _read(self) -> bytes:
        """The next bytes for the client: text, a heartbeat, or the end."""
        while True:
            said = self._say()
            if said:
                self._silent_since = monotonic()
                return said
            if self._events.ready:
                beat = self._rest()
            else:
                beat = self._hear()
            if beat is not None:
                return beat

    def _say(self) -> bytes:
        """What may be sent now: all text that there is, with a pace one event of it, and the end after it."""
        texts = self._events.ready
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
        stream.look_again(min(self._begin_at, self._beat_at, self._events.flush_at, self._whole_at, presence_at))
        try:
            data = next(stream)
        except StopIteration:
            return self._body_ended()
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
            self._feed(data)
            if self._events.ready or self._last is not None:
                return None
        return self._look(monotonic())

    def _feed(self, data: bytes) -> None:
        """Read what has come, and see whether the answer is whole with it, or soon."""
        if self._events.feed(data):
            self._answer_ended()
        elif self._events.finished and self._whole_at == _NEVER:
            self._whole_at = monotonic() + _LAST_MARK

    def _look(self, now: float) -> bytes | None:
        """See what the clocks call for."""
        if now >= self._begin_at:
            self._begin_at = _NEVER
            return self._begin()
        if now >= self._events.flush_at:
            self._events.flush()
            return None
        if now >= self._whole_at:
            self._whole_at = _NEVER
            return self._body_ended()
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
        self._begin_at = _NEVER
        status, headers = self._head.of_text(error)
        self._start_response(status, self._complete(headers))
        self._begun = True
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
        if not self._head.is_of_events:
            self._refusal = bytearray()
            return self._hear_refusal(self._refusal, data)
        begun = None if self._begun else self._begin()
        if data:
            self._feed(data)
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

    # The end.

    def _answer_ended(self) -> None:
        """The answer has come to its end mark, or to what it failed with."""
        if self._events.fault is not None:
            self._failed(self._events.fault)
        else:
            self._last = self._events.done()
            self._after_last = TextView._linger

    def _body_ended(self) -> bytes | None:
        """The upstream's body has ended cleanly. Whether the answer has, is another matter."""
        fault = None if self._refusal is not None else self._events.without_mark()
        self._stream.finish(fault)
        if self._refusal is not None:
            return self._refusal_heard(self._refusal)
        if fault is not None:
            return self._failed(fault)
        self._last = self._events.done()
        return None

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
        self._events.broken_off()
        self._last = sse.error_frame(error.json(self._stream.record.request_id))
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
