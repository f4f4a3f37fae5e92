"""The relay itself, and the doctor's ticks: requests that are answered with a stream as it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Response, request

from relay import errors
from relay.stream import ticks
from relay.web.request import asks_for_events, check_model, raw_target, read_body, says
from relay.web.views import answers, calls
from relay.web.views.calls import Call
from relay.wire.target import METHODS, bad_target

if TYPE_CHECKING:
    from relay.web.mount import Mount

#: Raw paths below the mount whose GET costs nothing with any provider: the list of models, and one of them.
_FREE_GET = re.compile(r"models(?:/[^/]*)?")


def relay_request(mount: Mount, rest: str) -> Response:
    """Check the request, read it whole, and answer with a stream that starts when Flask's contexts are gone."""
    settings = mount.settings
    call = Call(mount)
    asked, environ = call.asked, call.environ
    method = asked.method
    path, query = raw_target(environ, rest)
    query = call.identify(query)
    if method not in METHODS:
        raise errors.MethodNotAllowed(f"the relay does not pass on {method}")
    fault = bad_target(path, query)
    if fault:
        raise errors.BadRequest(fault, code="bad_path")
    call.permit(method, path)
    if method in ("GET", "HEAD") and mount.settings.adds_key and not _FREE_GET.fullmatch(path):
        call.paid_get()
    call.count()
    body = read_body(asked, settings.max_body)
    said = None if settings.models is None else check_model(asked, body, settings.models)
    if said is None and mount.wants_model:
        said = says(body)
    model = None if said is None else said.get("model")
    record = call.record(
        route="relay",
        model=model if isinstance(model, str) else None,
        asks_for_events=asks_for_events(asked, path, body, said),
    )
    slash = "/" if path or environ["PATH_INFO"].endswith("/") else ""  # `/v1/` is not `/v1`
    headers = call.headers()
    exchange = mount.upstream.exchange(method, slash + path, query, headers, body, call.overrides(record))

    def begin(response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
        return calls.stream(mount, environ, exchange, record, response, start_response)

    return call.answer(begin)


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
