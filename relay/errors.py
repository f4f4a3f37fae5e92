"""The relay's own errors: each knows its HTTP status, its code and the end reason of its stream.

No Flask and no sockets in here. An error is raised where it is noticed and translated once, at the boundary:
into a JSON response while nothing has been sent, into an error frame (`relay.wire.sse`) afterwards. None of them is an
OSError, because a WSGI server takes an OSError out of an application for trouble with the client and answers
nothing at all; the one exception is `StreamCut`, whose purpose is exactly that.
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Sequence


class RelayError(Exception):
    """A failure that the client is told of.

    `message` is a sentence for the person who reads it: what was wrong and what to do. It never holds a key, a header
    value of the client's or a part of a request body.
    """

    status = 500
    code = "relay_error"
    type = "relay_error"
    #: Why a stream that fails so has ended (`relay_streams_ended_total`); None: it never became a stream.
    reason: str | None = None
    #: False: the request reached the upstream, so an SDK that repeats it may pay twice (`x-should-retry: false`).
    may_retry = True
    #: More response headers of this one error.
    fields: Sequence[tuple[str, str]] = ()

    def __init__(self, message: str, *, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.retry_after = retry_after  # whole seconds, for `Retry-After`

    def headers(self) -> list[tuple[str, str]]:
        """The response headers that belong to this error and to no other response."""
        headers = []
        if self.retry_after is not None:
            headers.append(("Retry-After", str(self._wait(self.retry_after))))
        if not self.may_retry:
            headers.append(("x-should-retry", "false"))
        return [*headers, *self.fields]

    def _wait(self, seconds: int) -> int:
        """At random up to half more, a minute at most, so that clients that were refused together do not come back
        together."""
        return seconds + random.randint(0, min((seconds + 1) // 2, 60))  # noqa: S311 - nobody gains by guessing it

    def detached(self) -> RelayError:
        """Itself, to be kept: without the frames that it came through, which would keep whoever keeps it."""
        self.__traceback__ = self.__context__ = None
        return self

    def json(self, request_id: str, dialect: str = "", *, position: int = 0) -> str:
        """The body of the error, in the shape that OpenAI's and Anthropic's SDKs and the AI SDK read. One line.

        `dialect`: what `dialect_of` said of the path, for APIs whose clients look elsewhere too. `position`: the number
        of events before it in a stream in which text of the answer has passed; 0: none is sure to have.
        """
        if dialect == "ollama":
            return json.dumps({"error": self.message})
        error: dict[str, object] = {"message": self.message, "type": self.type, "code": self.code}
        told: dict[str, object] = {"type": "error", "error": error | {"request_id": request_id} | self.more()}
        if dialect == "responses":
            told |= {"code": self.code, "message": self.message, "param": None}
            # Vercel's AI SDK reads no error without it, but asks again for one that comes before any of the answer.
            if position:
                told["sequence_number"] = position
        elif dialect == "cohere":
            told["message"] = self.message
        return json.dumps(told)

    def more(self) -> dict[str, object]:
        """What else this error says of itself in its JSON."""
        return {}


#: The ends of paths whose APIs tell of errors otherwise than OpenAI's chat completions and Anthropic's messages.
_DIALECTS = {
    "/responses": "responses",
    "/api/chat": "ollama", "/api/generate": "ollama", "/api/embed": "ollama", "/api/embeddings": "ollama",
    "/v1/chat": "cohere", "/v2/chat": "cohere",
}  # fmt: skip
_ENDS = tuple(_DIALECTS)


def dialect_of(path: str) -> str:
    """How the API of this path tells of errors: the name of it, or an empty text for the usual way."""
    if not path.endswith(_ENDS):
        return ""
    return next(dialect for end, dialect in _DIALECTS.items() if path.endswith(end))


class BadRequest(RelayError):
    status, code, type = 400, "bad_request", "invalid_request_error"


class Unauthorized(RelayError):
    status, code, type = 401, "invalid_api_key", "authentication_error"


class Forbidden(RelayError):
    status, code, type = 403, "not_allowed", "permission_error"


class NotFound(RelayError):
    status, code, type = 404, "not_found", "invalid_request_error"


class MethodNotAllowed(RelayError):
    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class UpgradeRequired(RelayError):
    status, code, type = 426, "upgrade_required", "invalid_request_error"


class RequestTimeout(RelayError):
    """The client was too slow with the body of its request; nothing went upstream."""

    status, code, type = 408, "request_timeout", "invalid_request_error"


class BodyTooLarge(RelayError):
    status, code, type = 413, "body_too_large", "invalid_request_error"


class TooMany(RelayError):
    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class Full(RelayError):
    status, code, type = 503, "full", "overloaded_error"


class Fault(RelayError):
    """An exception that nobody has foreseen. The request may have reached the upstream by then."""

    status, code, type, reason = 500, "relay_error", "relay_error", "relay_error"
    may_retry = False


class UpstreamUnreachable(RelayError):
    """No connection to the upstream: refused, no such name, TLS not accepted. Nothing was sent."""

    status, code, type, reason = 502, "upstream_unreachable", "upstream_error", "upstream_error"


class UpstreamFailed(RelayError):
    """The upstream took the request and then hung up, or answered something that cannot be relayed."""

    status, code, type, reason = 502, "upstream_error", "upstream_error", "upstream_error"
    may_retry = False


class UpstreamCut(RelayError):
    """The upstream's body ended before it was complete. Only ever told in a stream: the head is out by then."""

    status, code, type, reason = 502, "upstream_cut", "upstream_error", "upstream_cut"
    may_retry = False


class UpstreamSaid(RelayError):
    """The upstream's own error, where it is told in an event and not passed on as it came."""

    status, code, type, reason = 502, "upstream_refused", "upstream_error", "upstream_error"
    may_retry = False

    def __init__(
        self, message: str, *, kind: str | None = None, code: str | None = None, status: int | None = None
    ) -> None:
        """`kind`: its type. `status`: the one that the upstream answered with, or named; None: it is not known."""
        super().__init__(message, code=code)
        if kind is not None:
            self.type = kind
        self.upstream_status = status

        #: A whole answer that could not be passed on as it came: its status, type and body.
        self.answer: dict[str, object] | None = None

    def _wait(self, seconds: int) -> int:
        return seconds  # the upstream's own

    def more(self) -> dict[str, object]:
        told = {"status": self.upstream_status, "retry_after": self.retry_after, "upstream": self.answer}
        return {name: value for name, value in told.items() if value is not None}


class ConnectTimeout(RelayError):
    status, code, type, reason = 504, "connect_timeout", "timeout_error", "connect_timeout"


class SendTimeout(RelayError):
    status, code, type, reason = 504, "send_timeout", "timeout_error", "send_timeout"
    may_retry = False


class FirstByteTimeout(RelayError):
    status, code, type, reason = 504, "first_byte_timeout", "timeout_error", "first_byte_timeout"
    may_retry = False


class IdleTimeout(RelayError):
    status, code, type, reason = 504, "idle_timeout", "timeout_error", "idle_timeout"
    may_retry = False


class HeartbeatMissed(RelayError):
    """A client that had begun to report in has stopped to."""

    status, code, type, reason = 408, "heartbeat_missed", "timeout_error", "client_gone"


class Drained(RelayError):
    status, code, type, reason = 503, "drained", "overloaded_error", "drained"
    may_retry = False


def codes() -> list[str]:
    """The codes of the errors with which the relay refuses a request."""
    kinds: list[type[RelayError]] = [RelayError, *RelayError.__subclasses__()]
    return sorted({kind.code for kind in kinds if kind.reason is None or kind is Drained})


class StreamCut(BrokenPipeError):
    """Ends the client's connection without a clean end of the body.

    Raised out of the WSGI iterator. gunicorn (gevent and gthread) and Flask's own server take a broken pipe for a
    client that went: what was written is delivered, the last chunk is not sent, and nothing is logged.
    """

    def __init__(self) -> None:
        super().__init__(errno.EPIPE, "the stream is cut on purpose")
