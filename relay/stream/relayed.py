"""The life of one stream, from the request that is about to go upstream to its one end. The hot path.

A `Stream` is the WSGI iterable that the blueprint's response hands to the server after Flask's contexts are gone. The
server calls `__next__`, writes what it gets, and calls again: so a slow client slows the upstream by itself, since
nothing is read upstream while the server writes. The story from top to bottom: open, hold, answer, relay, end.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable
from http.client import responses
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from relay import errors
from relay.llm.usage import Excerpt
from relay.observe import log
from relay.observe.metrics import metrics
from relay.stream import late_answer, waiting
from relay.stream.drain import drain
from relay.stream.waiting import GONE, READY, client_socket
from relay.upstream.exchange import Exchange
from relay.wire import sse
from relay.wire.headers import SANDBOX, UNBUFFERED, response_headers, upstream_request_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.gate.slots import Admission, Lease
    from relay.record import Record
    from relay.settings import Settings
    from relay.wire.http1 import Head

Headers = list[tuple[str, str]]
monotonic = time.monotonic
_NEVER = float("inf")
#: Seconds between two looks at a request body that is being read.
_LOOK_AT_UPLOADS = 1.0
#: A write that has lasted so many seconds waits for the client.
_PAUSED = 0.1
#: Seconds from the last bytes to a cut. Browsers throw away what a page has not read yet when a connection breaks.
_TO_READ = 0.25
#: Characters of a model's name in the list of streams: a client may say what it likes.
_LONGEST_MODEL = 200
#: Seconds after which an upstream that has sent a chat's end mark and nothing more is left.
_AFTER_ITS_END = 5.0


class ClientGone(Exception):
    """The client has left: there is nobody to tell."""


class Intake(Protocol):
    """What prepares the exchange of a stream that has its slot: it reads the request's body, which may take long."""

    exchange: Exchange  # once `steps` has ended
    reading: bool  # it waits for the client's bytes
    received: int  # bytes so far
    uploads: bool  # there is a body that may have to be waited for

    def start(self, now: float) -> None:
        """Start the clocks of the upload (monotonic seconds)."""

    def overdue(self, now: float) -> bool:
        """Whether the clocks have given up the upload. Called from another thread or greenlet while it reads."""

    def stop(self, error: errors.RelayError) -> None:
        """What to raise when the reading ends early."""

    def steps(self) -> Iterator[None]:
        """Prepare the exchange; each step ends where other streams should get their turn. Raises RelayError."""

    def release(self) -> None:
        """The body is no longer held in memory. Idempotent."""


class Watch(Protocol):
    """Who is told of what becomes of a stream."""

    def answered(self, status: int, record: Record) -> None:
        """The upstream has answered with this status; when, says the record's `first_byte`."""

    def ended(self, record: Record) -> None:
        """The stream has ended, or was refused."""

    def finished(self, record: Record) -> None:
        """The server has written the last of it."""


class Stream:
    """One relayed exchange as a WSGI iterable. `close` ends it wherever it stands, and does so once."""

    # Beyond 30 attributes CPython gives each instance a whole dict of its own, which is slower and takes 2 KiB more.
    __slots__ = (
        "__weakref__", "_admission", "_arrived", "_beat_since", "_beating", "_began", "_broken", "_chunked",
        "_client", "_closed", "_comment", "_deadline", "_drain_at", "_excerpt", "_exchange", "_freed", "_gave",
        "_held", "_hold_at", "_http10", "_intake", "_join_next", "_lease", "_look_at", "_over", "_pending",
        "_present", "_quiet_since", "_resumed", "_settings", "_spoken", "_start_response", "_started", "_step",
        "_task", "_told", "_tracker", "_viewed", "_waiter", "_watch", "_writes", "failure", "record",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange | Intake,
        record: Record,
        settings: Settings,
        start_response: Callable[..., Any],
        *,
        client: Any,
        http10: bool,
        present: Callable[[int, Headers], Headers],
        admission: Admission,
        watch: Watch,
        closed: Callable[[], None],
        viewed: bool = False,
        comment: bytes = sse.HEARTBEAT,
    ) -> None:
        """`exchange`: the request upstream, or what makes it once there is a slot.

        `client`: the client's socket or None. `present` completes the headers of a response of some status. `watch`
        is told of what becomes of it; `closed` is called when the server is done with the response. `viewed`: the
        server gets something else than these bytes (relay.textview). `comment`: the heartbeat between two events."""
        self._intake: Intake | None = None if isinstance(exchange, Exchange) else exchange
        self._exchange: Exchange  # once it is prepared
        if isinstance(exchange, Exchange):
            self._exchange = exchange
        self.record = record
        self._settings = settings
        self._start_response = start_response
        self._client = client
        self._http10 = http10
        self._present = present
        self._admission = admission
        self._lease: Lease | None = None
        self._watch = watch
        self._closed = closed
        self._task: waiting.Task | None = None
        self._tracker: sse.Tracker | None = None  # only for a body that something may be added to
        # A function and not a bound method, which would tie the stream to itself until a collection.
        self._step: Callable[[Stream], bytes] = Stream._enter
        self._over = self._freed = False
        self._began = self._started = now = monotonic()
        # Clocks, all in monotonic seconds.
        self._hold_at = _NEVER
        self._held = False
        self._deadline = _NEVER  # no clock has anything to say before
        self._drain_at = drain.at
        self._resumed = now  # when the server last asked for more
        self._gave = -1.0  # when it was given something; later than `_resumed`: it is writing
        self._arrived = now  # the last byte from upstream
        self._spoken = False  # it came after the clocks were last looked at
        self._quiet_since = now  # since when the upstream is waited for
        self._beat_since = now  # the last heartbeat, or whatever else the client was sent
        self._beating = False  # a heartbeat was the last thing
        self._writes = client_socket.Writes(client, settings.write_timeout)
        self._excerpt: Excerpt | None = None  # of a body that may report its tokens
        itself = weakref.ref(self)
        self._waiter = waiting.waiter(client, _look_at_writes(itself), _look_at_clocks(itself))
        self._broken = "client_gone"  # the end reason if the client's connection breaks
        self._pending: errors.RelayError | None = None
        self._told: late_answer.LateAnswer | None = None
        self._chunked = False  # the server frames the body in chunks, so that its end is a write of its own
        #: Where the server's socket can do so: hold what is written next until what is written after it.
        self._join_next: Callable[[], object] = _nothing if viewed else getattr(client, "join_next", _nothing)
        self._comment = comment
        self._viewed = viewed
        self._look_at = _NEVER  # when a view wants to look at its own clocks
        self.failure: errors.RelayError | None = None  # what it has ended with, once it has failed
        drain.open.add(self)

    def _held_until(self, now: float) -> float:
        settings = self._settings
        if not self.record.asks_for_events or not settings.hold or not settings.heartbeat:
            return _NEVER
        return now + settings.hold

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> bytes:
        self._resumed = monotonic()
        try:
            data = self._step(self)
        except errors.RelayError as error:
            data = self._fail(error)
        except ClientGone:
            self._end(self._broken)
            raise errors.StreamCut from None
        except (StopIteration, errors.StreamCut):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach the server
            # A server would answer HTML, or take an OSError for a client that went.
            log.fault(error, "relaying", self.record.request_id)
            data = self._fail(errors.Fault("the relay has met a fault of its own; its log says which"))
        self._gave = monotonic()
        return data

    # Before the upstream's answer.

    def _enter(self) -> bytes:
        """Get a lease, in the queue if there is none and waiting is wanted."""
        self._refuse_if_late()
        lease = self._lease = self._admission.request(self.record.owner, self._waiter.wake)
        self._queue(lease, self._started)
        self._refuse_if_late()
        if self._intake is not None:
            uploads = self._intake.uploads
            if uploads:
                self._admission.lend(lease)
            self._exchange = self._take_in(self._intake)
            if uploads:
                self._admission.claim(lease)
                self._queue(lease, monotonic())
                self._refuse_if_late()
        self.record.admitted = True
        metrics().opened(self.record.mount)
        self._started = monotonic()  # the clocks are the upstream's
        self._hold_at = self._held_until(self._started)
        self._step = Stream._open
        return self._open()

    def _refuse_if_late(self) -> None:
        """What comes late in the drain, on a connection that was kept, would be cut and billed."""
        if drain.late:
            error = errors.Drained(
                "the relay is restarting and takes no more requests; nothing went upstream", retry_after=1
            )
            error.may_retry = True
            raise error

    def _queue(self, lease: Lease, since: float) -> None:
        """Wait until the lease is granted, for RELAY_QUEUE from `since` on."""
        give_up = since + self._settings.queue
        while not lease.granted:
            if monotonic() >= min(give_up, self._drain_at):
                raise self._admission.full()
            if self._waiter.wait(min(give_up, self._drain_at)) is GONE:
                raise ClientGone

    def _take_in(self, intake: Intake) -> Exchange:
        """Have the request's body read, and the exchange made from it."""
        uploads = intake.uploads
        began = monotonic()
        if uploads:
            intake.start(began)
            self._waiter.attend()
            try:
                getattr(self._client, "say_continue", _nothing)()
            except OSError:
                raise ClientGone from None
        for _ in intake.steps():
            wake = self._waiter.wait(0.0)
            if intake.reading:  # that the client has gone shows in what is read
                self._waiter.attend()  # the wait has used up the timer
            elif wake is GONE:
                raise ClientGone
        if uploads:
            self._waiter.attend()
            self._began += monotonic() - began  # times of the record are the answer's, without the upload
        return intake.exchange

    def _check_upload(self, intake: Intake) -> float:
        """Free the server from waiting for a body that is too slow. Returns seconds, as `_check_write`."""
        now = monotonic()
        if now >= self._drain_at:
            error = errors.Drained("the relay is restarting; the request had not come whole, and nothing went upstream")
            error.may_retry = True
            intake.stop(error)
            client_socket.stop_reading(self._client)
        elif intake.overdue(now):
            client_socket.stop_reading(self._client)
        return _LOOK_AT_UPLOADS

    def _open(self) -> bytes:
        """Have the request sent and wait for the head of the answer; meanwhile, if asked for events, hold the line."""
        exchange, waiter = self._exchange, self._waiter
        if self._task is None and not exchange.sent:
            if exchange.send_at_once():
                self._let_go_of_body()
                waiter.watch(exchange.sock)
            else:
                self._task = waiter.run(exchange.send)
        while True:
            if self._task is not None and self._task.finished and self._is_sent(self._task):
                return self._answer(exchange.head)
            now = monotonic()
            if now >= self._drain_at:
                raise errors.Drained("the relay is restarting and the upstream has not answered yet")
            if now >= min(self._hold_at, self._answer_by()) and self._has_answered():
                return self._answer(exchange.head)
            deadline = self._check_opening(now)
            if self._held:
                if now >= self._beat_since + self._settings.heartbeat:
                    self._beat_since = now
                    return self._heartbeat(self._comment)
                deadline = min(deadline, self._beat_since + self._settings.heartbeat)
            elif now >= self._hold_at:
                return self._hold(now)
            if now >= self._look_at:
                return b""
            wake = waiter.wait(min(deadline, self._hold_at, self._look_at, self._drain_at))
            if wake is GONE:
                raise ClientGone
            if (wake is READY or not exchange.empty) and exchange.read_head():
                return self._answer(exchange.head)

    def _is_sent(self, task: waiting.Task) -> bool:
        """The sending has ended; whether the answer is there already. Raises what became of it."""
        self._task = None
        if (failure := task.failure()) is not None:
            raise failure
        self._let_go_of_body()
        self._waiter.watch(self._exchange.sock)
        return self._exchange.answered  # before it had the whole request

    def _let_go_of_body(self) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.release()

    def _has_answered(self) -> bool:
        """Look before a clock is believed: this process may have stood still until it had passed."""
        return self._task is None and self._exchange.sent and self._exchange.read_head()

    def _check_opening(self, now: float) -> float:
        """The next deadline while there is no answer. Raises if one has passed."""
        settings = self._settings
        if not self._exchange.connected:
            connect_by = self._started + settings.connect_timeout
            if now >= connect_by:
                raise errors.ConnectTimeout(
                    f"no connection to {self._exchange.connecting_to} within {settings.connect_timeout:g} s "
                    "(RELAY_CONNECT_TIMEOUT)"
                )
            return connect_by
        answer_by = self._answer_by()
        if now >= answer_by:
            raise errors.FirstByteTimeout(
                f"no answer from the upstream within {settings.first_byte_timeout:g} s (RELAY_FIRST_BYTE_TIMEOUT)"
            )
        return answer_by

    def _answer_by(self) -> float:
        """When the first byte is due; the request's own clock runs until it is sent (relay.upstream.exchange)."""
        sent_at = self._exchange.sent_at
        return _NEVER if sent_at is None else sent_at + self._settings.first_byte_timeout

    def _hold(self, now: float) -> bytes:
        """Answer before the upstream has: proxies and clients on the way give up on a silent connection."""
        self._held = True
        self._hold_at = _NEVER
        self._beat_since = now
        self._tracker = sse.Tracker(self._comment)
        headers = [("Content-Type", "text/event-stream; charset=utf-8"), *SANDBOX, *UNBUFFERED]
        self._start(200, "OK", headers)
        return self._heartbeat(self._comment)

    # The answer.

    def _answer(self, head: Head) -> bytes:
        """Pass on the head of the answer, and go on to its body."""
        exchange = self._exchange
        now = self._arrived = self._quiet_since = monotonic()
        record = self.record
        record.first_byte = now - self._began
        record.upstream_request_id = upstream_request_id(head.fields)
        try:
            self._watch.answered(head.status, record)
        except Exception as error:  # noqa: BLE001 - the stream goes on
            log.fault(error, "noting an answer", record.request_id)
        content_type = head.fields.get("content-type", "")
        plain = head.fields.get("content-encoding", "identity").strip().lower() == "identity"
        plain_events = plain and sse.is_event_stream(content_type)
        if plain and (plain_events or content_type.startswith("application/json")):
            self._excerpt = Excerpt()
        if self._held:
            if head.status != 200 or not plain_events:
                self._deadline = now
                self._told = late_answer.LateAnswer(head, now)
                self._step = Stream._collect
                return self._collect()
        else:
            headers = response_headers(
                head.headers, head.fields, has_body=not head.framing.done, transparent=self._settings.transparent
            )
            if plain_events and record.method != "HEAD":
                self._tracker = sse.Tracker(self._comment)
            self._start(head.status, head.reason, headers)
        self._beat_since = now
        self._step = Stream._relay
        self._silence(now)  # nothing is due yet: it says when the clocks are looked at
        # What came along with the head goes out with it; an empty piece makes the server send the head alone.
        try:
            data = b"" if exchange.empty else exchange.read()
        except errors.RelayError as error:
            self._pending = error.detached()
            self._step = Stream._raise_pending
            return b""
        if not data:
            return b""
        if not self._held:
            self._join_next()
        return self._observe(data)

    def _collect(self) -> bytes:
        """After a hold: read an answer that is not called an event stream, and pass it on if it is one nevertheless.

        Else it is told in the error frame, with what the upstream said.
        """
        exchange, told = self._exchange, self._told
        assert told is not None  # noqa: S101 - for the type checker
        try:
            while True:
                wake = self._waiter.wait(min(self._deadline, told.give_up)) if exchange.empty else READY
                if wake is GONE:
                    raise ClientGone
                if wake is not READY:
                    now = monotonic()
                    if now >= told.give_up:
                        break
                    beat = self._silence(now)
                    if beat or now >= self._look_at:
                        return beat
                    continue
                data = exchange.read()
                if data is None:
                    continue
                self._spoken = True
                if not told.feed(data):
                    break
                if told.is_events:
                    self._excerpt = Excerpt()
                    self._step = Stream._relay
                    self._told = None
                    return self._observe(told.body)
        except errors.RelayError as error:
            told.broken = error.message  # what came before says more than this
        self.record.status = told.head.status
        raise told.error()

    def _raise_pending(self) -> NoReturn:
        """The failure that came along with the head, once the head is out."""
        assert self._pending is not None  # noqa: S101 - for the type checker
        raise self._pending

    def _start(self, status: int, reason: str, headers: Headers) -> None:
        headers = self._present(status, headers)  # which may refuse them
        self._chunked = not self._http10 and "Content-Length" not in dict(headers)
        self._start_response(f"{status} {reason}", headers)
        self.record.status = status

    # The body: this runs for every piece.

    def _relay(self) -> bytes:
        """The next bytes for the client: the upstream's as they have arrived, or a heartbeat in its silence."""
        exchange = self._exchange
        late = False
        while True:
            if exchange.empty:
                wake = self._waiter.wait(self._deadline)
                if wake is not READY:
                    if wake is GONE:
                        raise ClientGone
                    now = monotonic()
                    try:
                        beat = self._silence(now)
                    except errors.IdleTimeout:
                        late = True  # unless something has come: this process may have stood still since then
                    else:
                        if beat or now >= self._look_at:
                            return beat
                        continue
            data = exchange.read()
            if data:
                if not exchange.empty and self._chunked and exchange.complete:
                    self._join_next()  # the last chunk, which the server writes right after it
                return self._observe(data)
            if data is not None:
                if not self._viewed:  # a view knows whether the answer has come to its end with its body
                    self._end("done")
                raise StopIteration
            if late:
                raise self._idle_timeout()

    def _observe(self, data: bytes) -> bytes:
        """Note what passes, without touching it."""
        now = monotonic()
        record = self.record
        gap = now - self._arrived
        if gap > record.longest_gap:  # noqa: PLR1730 - max() costs a call for every event
            record.longest_gap = gap
        self._arrived = now
        self._spoken = True
        record.bytes += len(data)
        if self._tracker is not None:
            self._tracker.feed(data)
        if self._excerpt is not None:
            self._excerpt.feed(data)
        return data

    def _silence(self, now: float) -> bytes:
        """What the clocks call for now: nothing yet, a heartbeat, or the end. Sets when they are looked at again.

        That time may have passed by then without meaning: each byte puts the clocks back, and only here is it noticed.
        """
        if now >= self._drain_at:
            raise errors.Drained("the relay is restarting; the answer is not complete")
        settings = self._settings
        end_at = _NEVER
        if self._tracker is not None and self._excerpt is not None and self.record.asks_for_events:
            end_at = self._arrived + _AFTER_ITS_END
            if now >= end_at:
                end_at = _NEVER
                if self._excerpt.says_its_end():
                    return self._leave()
        # Only time in which the upstream was waited for counts: not that in which the client was written to.
        if self._spoken:
            self._spoken = False
            self._quiet_since = self._beat_since = self._resumed
        elif self._beating:
            self._quiet_since += self._resumed - self._gave
        self._beating = now >= self._look_at  # what a view sends then is no time of the upstream's either
        idle_at = self._quiet_since + settings.idle_timeout if settings.idle_timeout else _NEVER
        if now >= idle_at:
            raise self._idle_timeout()
        beat_at = _NEVER
        if self._tracker is not None and settings.heartbeat:
            beat_at = self._beat_since + settings.heartbeat
            if now >= beat_at:
                self._beat_since = now
                beat_at = now + settings.heartbeat
                comment = self._tracker.heartbeat
                if comment:
                    self._deadline = min(idle_at, beat_at, self._look_at, self._drain_at, end_at)
                    self._beating = True
                    return self._heartbeat(comment)
        self._deadline = min(idle_at, beat_at, self._look_at, self._drain_at, end_at, now + self._writes.every)
        return b""

    def _due(self) -> float:
        """Put the deadline back for what has come since the clocks were last looked at, and return it (monotonic
        seconds). A look would find as much, and costs a third of an event."""
        if not self._spoken or self._step is not Stream._relay:
            return 0.0
        settings = self._settings
        shortest = min(_AFTER_ITS_END, settings.heartbeat or _NEVER, settings.idle_timeout or _NEVER)
        self._deadline = min(self._arrived + shortest, self._look_at, self._drain_at)
        return self._deadline

    def _leave(self) -> bytes:
        """The answer has said its end, and its upstream keeps the connection open: it is whole."""
        data = self._exchange.read()  # this process may have stood still
        if data:
            return self._observe(data)
        self._end("done")
        raise StopIteration

    def _idle_timeout(self) -> errors.IdleTimeout:
        return errors.IdleTimeout(
            f"the upstream has sent nothing for {self._settings.idle_timeout:g} s (RELAY_IDLE_TIMEOUT)"
        )

    def _heartbeat(self, comment: bytes) -> bytes:
        self.record.heartbeats += 1
        return comment

    # The end.

    def _fail(self, error: errors.RelayError) -> bytes:
        """Tell the client of a failure: with a status if none was sent, with a frame where one fits, else by a cut."""
        self.failure = error.detached()
        record = self.record
        begun = record.status != 0
        tracker = self._tracker
        if not begun:
            record.status = (None if error.may_retry else self._settings.no_retry_status) or error.status
        self._end(error.reason or error.code)
        body = error.json(record.request_id, record.dialect).encode()
        if not begun:
            self._step = Stream._stop
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *error.headers()]
            reason = responses.get(record.status, "Failed")
            try:
                self._start(record.status, reason, headers + SANDBOX)
            except Exception as fault:  # noqa: BLE001 - such as a header of the app's that the server refuses
                log.fault(fault, "answering", record.request_id)
                headers.append(("X-Request-ID", record.request_id))
                self._start_response(f"{record.status} {reason}", headers + SANDBOX, sys.exc_info())
            return body
        self._step = Stream._raise_cut if self._viewed else Stream.cut
        if tracker is not None and tracker.at_boundary:
            begun_to_answer = self._excerpt is not None and self._excerpt.has_text()
            position = tracker.events if begun_to_answer else 0
            frame = sse.error_frame(error.json(record.request_id, record.dialect, position=position))
            # Without the relay an EventSource would have stopped at this answer (WHATWG HTML section 9.2.2).
            return sse.FOR_GOOD + frame if self._told is not None and record.method == "GET" else frame
        return self._step(self)

    def _raise_cut(self) -> NoReturn:
        """A view has the last word, and cuts the connection itself."""
        raise errors.StreamCut

    def _stop(self) -> NoReturn:
        raise StopIteration

    def cut(self) -> NoReturn:
        """End the connection so that nobody takes the body for whole, once there was time to read what came of it."""
        # The server writes nothing now: breaking its write off would send a FIN, which an HTTP/1.0 client takes for the
        # end of a whole body.
        self._resumed = monotonic()
        give_up = self._resumed + _TO_READ
        while monotonic() < give_up:
            if self._waiter.wait(give_up) is GONE:
                break
        if self._client is not None:
            # Whoever stands between here and the server may swallow the exception and end the body cleanly.
            self._waiter.close()
            client_socket.cut(self._client, reset=self._http10)
        raise errors.StreamCut

    def _end(self, reason: str) -> None:
        """Free everything and report; only the first call counts."""
        if self._over:
            return
        self._over = True
        record = self.record
        record.reason = reason
        now = monotonic()
        record.seconds = now - self._began
        if self._tracker is not None:
            record.events = self._tracker.events
        if self._task is not None:
            self._task.forget()
            if not self._task.finished:
                self._waiter.abort(self._task)
        self._waiter.unwatch()
        self._gave = now  # what the server still writes may get stuck too
        for step in (self._close_exchange, self._let_go_of_body, self._give_lease_back, self._tell_end):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - what can be freed is, and the stream goes on
                log.fault(error, "ending a stream", record.request_id)

    def _close_exchange(self) -> None:
        if hasattr(self, "_exchange"):
            self._exchange.close()

    def _give_lease_back(self) -> None:
        if self._lease is not None:
            self._lease.release()

    def _tell_end(self) -> None:
        try:
            if self._excerpt is not None:
                self.record.usage = self._excerpt.usage()
        finally:
            self._watch.ended(self.record)

    def close(self) -> None:
        """The server is done with this response, for whatever reason."""
        if self._freed:
            return
        self._freed = True
        # Not ended yet: the server's write failed, or it stopped iterating, as some do after the last byte.
        reason = "done" if self._has_all() else self._broken
        if reason == "client_gone" and drain.draining and client_socket.gone(self._client) is False:
            reason = "drained"  # it is the server that ends
        self._end(reason)
        self._waiter.close()
        drain.open.discard(self)
        try:
            self._closed()
        except Exception as error:  # noqa: BLE001 - the app's own code, after which the stream is billed nevertheless
            log.fault(error, "closing a response", self.record.request_id)
        self._watch.finished(self.record)

    def __del__(self) -> None:
        """Nobody holds it any more, and nobody has closed it: some servers and middleware forget to."""
        if hasattr(self, "failure"):  # it has come into being
            self.close()

    def _has_all(self) -> bool:
        """Whether the whole of a body was given to the server."""
        return self._step is Stream._relay and self._exchange.answered and self._exchange.complete

    # For a view, which reads the stream and gives the server something else (relay.textview).

    def look_again(self, at: float) -> None:
        """Have `next` give b"" at that time (monotonic seconds) if nothing has come by then."""
        self._look_at = at
        self._deadline = min(self._deadline, at)

    def rest(self, until: float) -> None:
        """Wait until then, or the drain's end, without reading upstream. Raises StreamCut when the client goes.

        Nothing is written meanwhile, and right afterwards something is.
        """
        began = self._resumed = monotonic()
        while monotonic() < min(until, self._drain_at):
            if self._waiter.rest(min(until, self._drain_at)) is GONE:
                self._end(self._broken)
                raise errors.StreamCut
        self._gave = monotonic()
        self._quiet_since += self._gave - began
        self._deadline = min(self._deadline, self._drain_at)  # the drain's word may have come meanwhile, and is spent

    def finish(self, error: errors.RelayError | None = None) -> None:
        """End it here: the rest is of no use, because of this error or because there is enough."""
        self.failure = error
        self._end("done" if error is None else error.reason or error.code)

    # From outside the stream's own greenlet or thread.

    def end_by(self, at: float) -> None:
        """The drain has begun: end then (monotonic seconds)."""
        self._drain_at = at
        self._waiter.wake()

    def report(self) -> dict[str, object]:
        """What the list of open streams says of it: no address, key or prompt. Ages are seconds."""
        record, now = self.record, monotonic()
        state = "waiting" if record.first_byte is None else "reading"
        intake = self._intake
        uploads = intake is not None and intake.reading
        if uploads:
            state = "uploading"
        if self._gave >= self._resumed and now - self._gave >= _PAUSED:
            state = "paused"
        return {
            "id": record.request_id,
            "age_s": round(now - self._began, 1),
            "state": state,
            "events": self._tracker.events if self._tracker is not None else 0,
            "bytes": intake.received if intake is not None and uploads else record.bytes,
            "mount": record.mount,
            "model": record.model and record.model[:_LONGEST_MODEL],
            "worker": os.getpid(),
        }

    def break_write(self) -> None:
        """Free the server from a write that outlasts the drain."""
        if self._gave >= self._resumed and self._client is not None:
            self._broken = "drained"
            client_socket.break_off(self._client)

    def _check_write(self) -> float:
        """Free the server from a write that is stuck, and the upstream from a client that has vanished. Gives the
        seconds until it wants to look again."""
        if self._intake is not None and self._intake.reading:
            return self._check_upload(self._intake)
        writes = self._gave >= self._resumed
        if self._writes.stuck(self._gave) if writes else self._writes.vanished():
            self._broken = "write_timeout"
            client_socket.break_off(self._client)
            self._waiter.lose_client()
        return self._writes.every


def _look_at_writes(stream: weakref.ref[Stream]) -> Callable[[], float]:
    """A waiter's tick. It must not hold the stream, which nobody may ever close."""

    def look() -> float:
        alive = stream()
        return _NEVER if alive is None else alive._check_write()  # noqa: SLF001 - it is the stream's own

    return look


def _look_at_clocks(stream: weakref.ref[Stream]) -> Callable[[], float]:
    """A waiter's `due`, which must not hold the stream either."""

    def due() -> float:
        alive = stream()
        return 0.0 if alive is None else alive._due()  # noqa: SLF001 - it is the stream's own

    return due


def _nothing() -> None:
    pass
