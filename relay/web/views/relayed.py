"""The relay itself, and the doctor's ticks: requests that are answered with a stream as it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flask import Response, current_app, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import RequestRedirect

from relay import errors
from relay.gate.models import check_models
from relay.llm.asked import Asked, parse_json, scan, with_usage
from relay.stream import ticks
from relay.web.intake import Body, Intake
from relay.web.request import Wish, expected_body, raw_target, wish_for_events, without_body
from relay.web.views import answers, calls
from relay.web.views.calls import Call
from relay.wire.sse import GAVE_UP, MEDIA_TYPE
from relay.wire.target import METHODS, bad_target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.settings import Settings
    from relay.upstream.exchange import Exchange
    from relay.web.mount import Mount

#: Raw paths below the mount whose GET costs nothing with any provider: the list of models, and one of them.
_FREE_GET = re.compile(r"models(?:/[^/]*)?")

#: A digest or signature of the body (RFC 9530, RFC 9421 and those before them, AWS).
_SIGNATURES = frozenset(
    ["HTTP_CONTENT_DIGEST", "HTTP_DIGEST", "HTTP_CONTENT_MD5", "HTTP_SIGNATURE", "HTTP_X_AMZ_CONTENT_SHA256"]
)
#: Bytes of a body that is parsed where nothing but a strict reader's view of it counts.
_SHORT = 16 * 1024
#: Gemini's streams: google-genai for Python takes each comment for JSON and fails on it.
_BEARS_NO_COMMENTS = re.compile(r"(?::|%3a)streamGenerateContent$", re.IGNORECASE)


def relay_request(mount: Mount, rest: str) -> Response:
    """Check all of the request but its body, and answer with a stream that starts when Flask's contexts are gone.

    Only then is the body read, and what needs it done: nothing of the app's is kept for a client that uploads slowly.
    """
    _check_place(mount, rest)
    settings = mount.settings
    call = Call(mount)
    asked, environ = call.asked, call.environ
    method = asked.method
    path, query = raw_target(environ, rest)
    query = call.identify(query)
    if method not in METHODS:
        raise errors.MethodNotAllowed(f"the relay does not pass on {method[:32]}")
    fault = bad_target(path, query)
    if fault:
        raise errors.BadRequest(fault, code="bad_path")
    call.permit(method, path)
    if method == "GET" and environ.get("HTTP_LAST_EVENT_ID") == GAVE_UP:
        return answers.empty(204)
    if method in ("GET", "HEAD") and settings.adds_key and not _FREE_GET.fullmatch(path):
        call.paid_get()
    call.count()
    expected = expected_body(asked, settings.max_body)
    wish = wish_for_events(method, mount.upstream_path + path, query, asked.headers.get("Accept", ""))
    record = call.record(route="relay", model=None, asks_for_events=wish is Wish.YES)
    slash = "/" if path or environ["PATH_INFO"].endswith("/") else ""  # `/v1/` is not `/v1`
    headers = call.headers()
    overrides = call.overrides(record)
    models = settings.models
    looks = models is not None or mount.wants_model
    adds_usage = settings.include_usage and method == "POST" and _takes_usage(path, environ)
    kind, coding = asked.content_type or "", asked.headers.get("Content-Encoding", "identity").strip().lower()

    def finish(body: Body) -> Generator[None, None, Exchange]:
        if body is None:
            body = without_body(method)
        if looks or adds_usage or (wish is Wish.BODY and body and b"stream" in body):
            said = yield from _asked(body, kind, coding, every=models is not None)
            if models is not None:
                check_models(models, method, path, query, said)
            if looks:
                record.model = said.model
            if wish is Wish.BODY:
                record.asks_for_events = said.stream
            if adds_usage and body and said.stream and not said.stream_options and _is_json(kind):
                body = with_usage(body)
        overrides["X-Request-ID"] = record.request_id
        return mount.upstream.exchange(method, slash + path, query, headers, body, overrides)

    intake = Intake(environ, expected, mount.body_memory, finish)

    record.dialect = errors.dialect_of(f"/{path}")
    settings = _fitting(mount, method, path, environ)

    def begin(response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
        return calls.stream(mount, environ, intake, record, response, start_response, settings=settings)

    return call.answer(begin)


def _asked(body: Body, kind: str, coding: str, *, every: bool) -> Generator[None, None, Asked]:
    """What a body of this Content-Type and Content-Encoding asks for; `every`: each model that it names counts."""
    if body and coding not in ("", "identity"):
        return Asked().unsure("is compressed")
    if body and not every and len(body) <= _SHORT and body[:1] == b"{":
        return parse_json(body)
    return (yield from scan(body, kind))


def _takes_usage(path: str, environ: Mapping[str, Any]) -> bool:
    """Whether a wish for usage may be added to a request: this API knows it, and no digest or signature of the body
    would not fit any more."""
    return f"/{path}".endswith("/completions") and _SIGNATURES.isdisjoint(environ)


def _is_json(kind: str) -> bool:
    """Whether a body of this Content-Type is JSON, as one without any is taken for."""
    return kind.partition(";")[0].strip().lower() in ("", "application/json")


def _check_place(mount: Mount, rest: str) -> None:
    """Raise what is the relay's own 404, or the app's 405, for a path that only fell through to here."""
    if rest == "_relay" or rest.startswith("_relay/"):
        raise errors.NotFound("the relay serves nothing at this path, and what is below _relay/ never goes upstream")
    if mount.beside(current_app):
        _leave_to_the_app()


def _fitting(mount: Mount, method: str, path: str, environ: Mapping[str, Any]) -> Settings:
    """The mount's settings, but for what this request's client does not bear or need."""
    settings = mount.settings
    off = str(environ.get("HTTP_X_RELAY_HEARTBEAT", "")).strip().lower() == "off"
    if settings.heartbeat and (off or _BEARS_NO_COMMENTS.search(path)):
        return mount.without_heartbeats
    # An MCP client's stream of notifications is silent until there are some (modelcontextprotocol.io, "Streamable
    # HTTP"): heartbeats and the kernel watch over it.
    accepts = str(environ.get("HTTP_ACCEPT", "")).lower()
    if method == "GET" and "HTTP_MCP_SESSION_ID" in environ and MEDIA_TYPE in accepts:
        return replace(settings, idle_timeout=0.0)
    return settings


def _leave_to_the_app() -> None:
    """Raise the app's 405 if a rule of the app's knows this path, by whatever method."""
    adapter = current_app.create_url_adapter(request)
    assert adapter is not None and request.url_rule is not None  # noqa: S101, PT018 - for the type checker
    known = set()
    for method in METHODS - {request.method}:
        try:
            rule, _ = adapter.match(method=method, return_rule=True)
        except RequestRedirect:
            known.add(method)
        except HTTPException:
            continue
        else:
            if rule.endpoint != request.url_rule.endpoint:
                known.add(method)
    if known:
        raise MethodNotAllowed(sorted(known))


def upgrade_request(_mount: Mount, rest: str) -> Response:  # noqa: ARG001 - the rule's
    """A WebSocket's handshake, which clients that know HTTP too take back at this status."""
    raise errors.UpgradeRequired("the relay speaks HTTP and no WebSocket; send the request without Upgrade")


def ticks_request(mount: Mount) -> Response:
    """The doctor's timed stream, for whoever may use the relay."""
    environ, settings = request.environ, mount.settings
    call = Call(mount)
    request_id = call.request_id
    mount.keys.check(environ)
    plan = ticks.Plan.of(request.args)
    ticks.budget.take()

    def begin(response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
        return ticks.Ticks(
            plan,
            environ,
            settings,
            start=lambda headers: start_response(
                "200 OK", answers.complete(headers, list(response.headers), request_id)
            ),
            client=answers.client_socket(environ),
            closed=response.close,
        )

    return call.answer(begin)
