"""A chat's stream as an iterator of its text, or of its events: each piece the moment its bytes are there.

What has come is handed over before what went wrong is raised. It ends without an error only where the answer said that
it was whole: by `[DONE]`, `message_stop`, `response.completed` or `response.incomplete`, the text view's `done`, or a
finish reason, behind which it is given 2 s for its mark.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from relay import errors
from relay.client.connection import Connection
from relay.client.errors import Cut, ErrorFrame, StreamError
from relay.client.request import Request, build
from relay.client.textview import PATHS, TextView
from relay.llm.answer import Answer
from relay.wire.sse_parser import Parser, TooLarge

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from relay.wire import sse_parser

#: Seconds that a connection may stay open behind a whole answer: it is read to its end, so that the relay's log has it
#: as done, but nobody is kept waiting for it.
_LINGER = 2.0
#: Bytes of one event: what an answer may hold at once, pictures included.
_MOST_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `event` is its name, `message` if it had none; `id` the last one that the stream has named, or ""."""

    event: str
    data: str
    id: str


Piece = TypeVar("Piece", str, Event)


class Stream(Generic[Piece]):
    """An answer that has begun. Iterate over it once; `close()`, leaving its `with`, or dropping it ends it early.

    `status` and `request_id` are the answer's. `first_byte` is the seconds from the request to the first byte of the
    body, None before it; `events` and `characters` (of text) are counted as they come.
    """

    _linger: threading.Timer | None = None
    _waited = False

    def __init__(self, request: Request, *, events: bool, timeout: float | None, ca: str | None) -> None:
        self._started = time.monotonic()
        self._connection = connection = Connection(request, timeout=timeout, ca=ca)
        self.status = connection.status
        self.request_id = connection.request_id
        self.first_byte: float | None = None
        self.events = 0
        self.characters = 0
        self._as_events = events
        self._parser = Parser(_MOST_BYTES)
        self._answer: Answer | TextView = TextView() if request.path.endswith(PATHS) else Answer()
        self._ready: deque[str | Event] = deque()
        self._over = False
        self._failure: StreamError | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            if self._over:
                raise StopIteration
            self._read()
        return cast("Piece", self._ready.popleft())

    def _read(self) -> None:
        """Wait for the next bytes, and put into `_ready` what they complete."""
        try:
            data = self._connection.read()
        except StreamError as error:
            self._finish(None if self._answer.ended or self._waited else error)
            return
        if not data:
            whole = self._answer.ended or self._answer.finished
            self._finish(None if whole else self._cut("the answer ended without the mark of its end: it is not whole"))
            return
        if self.first_byte is None:
            self.first_byte = time.monotonic() - self._started
        try:
            for event in self._parser.feed(data):
                self._take(event)
        except errors.UpstreamSaid as said:
            code = vars(said).get("code") or said.type
            self._finish(ErrorFrame(said.message, code=code, status=self.status, request_id=self.request_id))
        except (errors.UpstreamFailed, TooLarge) as error:
            self._finish(self._cut(f"the answer cannot be read on: {error}", code="unreadable"))
        if (self._answer.ended or self._answer.finished) and self._linger is None and not self._over:
            self._linger = threading.Timer(_LINGER, self._leave)
            self._linger.daemon = True
            self._linger.start()

    def _leave(self) -> None:
        """The answer is whole, and has had its time to end."""
        self._waited = True
        self._connection.close()

    def _take(self, event: sse_parser.Event) -> None:
        self.events += 1
        text = ""
        if not self._answer.ended:
            try:
                text = self._answer.read(event)
            except errors.UpstreamFailed:
                if not self._as_events:
                    raise
        self.characters += len(text)
        if self._as_events:
            self._ready.append(Event(event.name, event.data, event.id))
        elif text:
            self._ready.append(text)

    def _cut(self, message: str, *, code: str | None = None) -> Cut:
        return Cut(message, code=code, status=self.status, request_id=self.request_id)

    def _finish(self, failure: StreamError | None) -> None:
        left = self._answer.end()
        if left and not self._as_events:
            self.characters += len(left)
            self._ready.append(left)
        self._over, self._failure = True, failure
        self.close()

    def close(self) -> None:
        """Close the connection at once, so that the upstream stops. Any thread may; twice does no harm.

        Whoever goes on reading an answer that was not whole gets Cut.
        """
        self._connection.close()
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None  # it holds this stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            self.close()


@overload
def stream_chat(
    base_url: str,
    prompt: str | None = None,
    *,
    model: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    events: Literal[False] = False,
    timeout: float | None = 60.0,
    path: str | None = None,
    extra: Mapping[str, Any] | None = None,
    ca: str | None = None,
) -> Stream[str]: ...


@overload
def stream_chat(
    base_url: str,
    prompt: str | None = None,
    *,
    model: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    events: Literal[True],
    timeout: float | None = 60.0,
    path: str | None = None,
    extra: Mapping[str, Any] | None = None,
    ca: str | None = None,
) -> Stream[Event]: ...


@overload
def stream_chat(
    base_url: str,
    prompt: str | None = None,
    *,
    model: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    events: bool,
    timeout: float | None = 60.0,
    path: str | None = None,
    extra: Mapping[str, Any] | None = None,
    ca: str | None = None,
) -> Stream[str] | Stream[Event]: ...


def stream_chat(
    base_url: str,
    prompt: str | None = None,
    *,
    model: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    events: bool = False,
    timeout: float | None = 60.0,
    path: str | None = None,
    extra: Mapping[str, Any] | None = None,
    ca: str | None = None,
) -> Stream[str] | Stream[Event]:
    """Ask for an answer; gives an iterator of its text, or of its events, once the answer has begun.

    `base_url` is what other clients use (`http://host:8000/v1`): `chat/completions` below it is asked. One without a
    path is a relay's own address, whose `/api/stream-chat` is asked and knows a model if none is named. `path` names
    something else below the base URL: `responses`, `messages` (Anthropic) and `completions` get the bodies that those
    APIs take, any other the one of the relay's own endpoints, such as `chat/stream`.

    `messages` is the conversation so far, and `prompt` the user's next message. `model` None: none is named, and the
    other side decides or refuses. `key` is sent as `Authorization: Bearer`. `headers` and `extra` (fields of the JSON
    body, such as `temperature`) are added, or take the place of ours. `events`: Event in place of text. `timeout`:
    seconds without a byte until Stalled, None for ever; heartbeats are bytes. `ca`: a file of certificates to trust, in
    place of certifi's.

    Raises StreamError, here or while it is read; ValueError for arguments that make no request.
    """
    if timeout is not None and timeout <= 0:
        raise ValueError("timeout must be more than 0 seconds, or None")
    request = build(base_url, prompt, model=model, messages=messages, key=key, headers=headers, path=path, extra=extra)
    if events:
        return Stream[Event](request, events=True, timeout=timeout, ca=ca)
    return Stream[str](request, events=False, timeout=timeout, ca=ca)
