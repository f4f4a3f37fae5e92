"""The relay's own errors: what each tells a client, an SDK and the metrics."""

from __future__ import annotations

import errno
import inspect
import json

import pytest

from relay import errors
from relay.errors import RelayError

# Status, code and type are what programs rely on; the reason is a label of relay_streams_ended_total; the last says
# whether an SDK may repeat the request without paying twice.
TABLE = [
    (errors.BadRequest, 400, "bad_request", "invalid_request_error", None, True),
    (errors.Unauthorized, 401, "invalid_api_key", "authentication_error", None, True),
    (errors.Forbidden, 403, "not_allowed", "permission_error", None, True),
    (errors.NotFound, 404, "not_found", "invalid_request_error", None, True),
    (errors.MethodNotAllowed, 405, "method_not_allowed", "invalid_request_error", None, True),
    (errors.UpgradeRequired, 426, "upgrade_required", "invalid_request_error", None, True),
    (errors.RequestTimeout, 408, "request_timeout", "invalid_request_error", None, True),
    (errors.BodyTooLarge, 413, "body_too_large", "invalid_request_error", None, True),
    (errors.TooMany, 429, "rate_limit_exceeded", "rate_limit_error", None, True),
    (errors.Full, 503, "full", "overloaded_error", None, True),
    (errors.Fault, 500, "relay_error", "relay_error", "relay_error", False),
    (errors.UpstreamUnreachable, 502, "upstream_unreachable", "upstream_error", "upstream_error", True),
    (errors.UpstreamFailed, 502, "upstream_error", "upstream_error", "upstream_error", False),
    (errors.UpstreamCut, 502, "upstream_cut", "upstream_error", "upstream_cut", False),
    (errors.UpstreamSaid, 502, "upstream_refused", "upstream_error", "upstream_error", False),
    (errors.ConnectTimeout, 504, "connect_timeout", "timeout_error", "connect_timeout", True),
    (errors.SendTimeout, 504, "send_timeout", "timeout_error", "send_timeout", False),
    (errors.FirstByteTimeout, 504, "first_byte_timeout", "timeout_error", "first_byte_timeout", False),
    (errors.IdleTimeout, 504, "idle_timeout", "timeout_error", "idle_timeout", False),
    (errors.HeartbeatMissed, 408, "heartbeat_missed", "timeout_error", "client_gone", True),
    (errors.Drained, 503, "drained", "overloaded_error", "drained", False),
]
KINDS = [row[0] for row in TABLE]


@pytest.mark.parametrize(
    ("kind", "status", "code", "type_", "reason", "may_retry"), [pytest.param(*row, id=row[2]) for row in TABLE]
)
def test_what_each_error_is(
    kind: type[RelayError], status: int, code: str, type_: str, reason: str | None, may_retry: bool
) -> None:
    error = kind("a sentence")
    assert (error.status, error.code, error.type, error.reason) == (status, code, type_, reason)
    assert error.may_retry is may_retry
    assert error.headers() == ([] if may_retry else [("x-should-retry", "false")])
    assert json.loads(error.json("req-1")) == {
        "type": "error",
        "error": {"message": "a sentence", "type": type_, "code": code, "request_id": "req-1"},
    }


def test_the_table_has_every_error() -> None:
    defined = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, RelayError)]
    assert [kind for kind in defined if kind is not RelayError] == KINDS
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", ""),
        ("/v1/messages", ""),
        ("/openai/v1/responses", "responses"),
        ("/api/chat", "ollama"),
        ("/x/api/generate", "ollama"),
        ("/v2/chat", "cohere"),
        ("/v1/responses/x", ""),
    ],
)
def test_how_an_api_tells_of_errors_is_known_by_its_path(path: str, dialect: str) -> None:
    assert errors.dialect_of(path) == dialect
    told = json.loads(errors.Full("a sentence").json("req-1", dialect))
    if dialect == "ollama":
        assert told == {"error": "a sentence"}
    else:
        assert (told["type"], told["error"]["code"]) == ("error", "full")
        assert told.get("message") == ("a sentence" if dialect else None)
        assert "sequence_number" not in told


@pytest.mark.parametrize("kind", [RelayError, *KINDS])
def test_no_error_is_taken_for_trouble_with_the_client(kind: type[RelayError]) -> None:
    """A WSGI server answers nothing at all to an OSError, and takes a StopIteration for the end."""
    assert not issubclass(kind, (OSError, StopIteration, RuntimeError))


@pytest.mark.parametrize("kind", [RelayError, *KINDS])
@pytest.mark.parametrize(
    "message",
    [
        pytest.param("plain", id="plain"),
        pytest.param("two\nlines\r\nand\rmore", id="line-ends"),
        pytest.param('a "quote" and a \\', id="quotes"),
        pytest.param("größer 🚀 \u2028 \x85 \x00 \xff", id="not-ascii"),
        pytest.param("\udcff", id="a-lone-surrogate"),
    ],
)
def test_the_json_is_one_line_of_ascii(kind: type[RelayError], message: str) -> None:
    text = kind(message).json("id")
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["error"]["message"] == message
    assert str(kind(message)) == message


@pytest.mark.parametrize(("seconds", "longest"), [(0, 0), (1, 2), (2, 3), (7, 11), (60, 90), (3600, 3660)])
def test_clients_that_are_refused_together_do_not_come_back_together(seconds: int, longest: int) -> None:
    waits = {int(dict(errors.Full("a", retry_after=seconds).headers())["Retry-After"]) for _ in range(1000)}
    assert waits <= set(range(seconds, longest + 1))
    assert len(waits) >= min(longest - seconds + 1, 20)


def test_what_the_upstream_asks_for_stays_as_it_is() -> None:
    error = errors.UpstreamSaid("a", status=429)
    error.retry_after = 7
    assert {dict(error.headers())["Retry-After"] for _ in range(100)} == {"7"}


def test_a_code_and_a_retry_of_ones_own() -> None:
    error = errors.Full("a", code="queue_full", retry_after=7)
    assert json.loads(error.json("id"))["error"]["code"] == "queue_full"
    assert {name for name, _ in error.headers()} == {"Retry-After"}
    assert errors.Full("a").code == "full"
    assert errors.Drained("a", retry_after=0).headers() == [("Retry-After", "0"), ("x-should-retry", "false")]


def test_the_cut_is_a_broken_pipe() -> None:
    """gunicorn and Flask's own server then say nothing, and do not send the last chunk."""
    cut = errors.StreamCut()
    assert isinstance(cut, BrokenPipeError)
    assert cut.errno == errno.EPIPE
