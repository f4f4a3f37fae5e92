"""What can go wrong for a client of a stream, one class for each thing that a caller may want to tell apart.

A stream that fails has raised one of these by the time that it is over: none ends in silence. No sockets in here.
"""

from __future__ import annotations


class StreamError(Exception):
    """An answer that did not come, or not whole.

    `message` is a sentence for people and holds no key. `code` is for programs: the error's own code where the other
    side named one. `status` is the HTTP status, None if no answer had begun. `request_id` is what to look for in the
    relay's log, None if nobody has said.
    """

    code: str = "stream_error"

    def __init__(
        self, message: str, *, code: str | None = None, status: int | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        if code:
            self.code = code
        self.status = status
        self.request_id = request_id


class Unreachable(StreamError):
    """No connection, or none that is to be trusted: the request was not sent."""

    code = "unreachable"


class Refused(StreamError):
    """An answer of another status than 200. `retry_after`: the seconds of its `Retry-After`, if it had one."""

    code = "refused"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code=code, status=status, request_id=request_id)
        self.retry_after = retry_after


class NotAnEventStream(StreamError):
    """Status 200, but another media type than `text/event-stream`."""

    code = "not_an_event_stream"


class ErrorFrame(StreamError):
    """The stream itself told of an error: the upstream's own, or the relay's before it cut the stream."""

    code = "error"


class Cut(StreamError):
    """The connection or the stream ended, or could not be read on, before the mark of a whole answer."""

    code = "cut"


class Stalled(StreamError):
    """Not one byte for as long as was allowed; the relay's heartbeats count as bytes."""

    code = "stalled"
