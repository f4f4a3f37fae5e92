"""The relay itself, and the doctor's ticks: requests that are answered with a stream as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Response, g, request

from relay import access, errors, ticks
from relay.incoming import asks_for_events, check_model, raw_target, read_body, says
from relay.paths import METHODS, allows, bad_target
from relay.record import Record
from relay.stream import Stream
from relay.views import answers

if TYPE_CHECKING:
    from relay.mount import Mount


def relay_request(mount: Mount, rest: str) -> Response:
    """Check the request, read it whole, and answer with a stream that starts when Flask's contexts are gone."""
    settings = mount.settings
    asked = request._get_current_object()  # type: ignore[attr-defined] # noqa: SLF001 - each use of the proxy costs
    environ, method = asked.environ, asked.method
    request_id = answers.request_id()
    address = access.client_address(environ, settings)
    access.check_origin(environ, settings)
    if mount.service:
        access.check_host(environ, settings)
        access.check_peer(address, settings)
    path, query = raw_target(environ, rest)
    holder, query = mount.keys.take_ticket(query)
    client = holder or mount.keys.check(environ) or access.payer(address)
    if method not in METHODS:
        raise errors.MethodNotAllowed(f"the relay does not pass on {method}")
    fault = bad_target(path, query)
    if fault:
        raise errors.BadRequest(fault, code="bad_path")
    if not allows(settings.allow, method, path):
        raise errors.Forbidden(
            f"{method} on this path is not among what this relay passes on (RELAY_ALLOW)",
            code="path_not_allowed",
        )
    budget = () if mount.rates is None else mount.rates.take(client)
    body = read_body(asked, settings.max_body)
    said = None if settings.models is None else check_model(asked, body, settings.models)
    if said is None and mount.wants_model:
        said = says(body)
    model = None if said is None else said.get("model")
    record = Record(
        request_id=request_id,
        method=method,
        route=f"{mount.name}.relay",
        client=address,
        owner=client,
        mount=mount.name,
        asks_for_events=asks_for_events(asked, path, body, said),
        model=model if isinstance(model, str) else None,
        upstream_host=mount.settings.upstream_host,
    )
    overrides = mount.call_hook()
    overrides["X-Request-ID"] = request_id
    if mount.wants_model and (tenant := g.get("relay_tenant")) is not None:
        record.tenant = str(tenant)
    slash = "/" if path or environ["PATH_INFO"].endswith("/") else ""  # `/v1/` is not `/v1`
    exchange = mount.upstream.exchange(method, slash + path, query, mount.headers.select(environ), body, overrides)

    def begin(response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
        return Stream(
            exchange,
            record,
            settings,
            start_response,
            client=answers.client_socket(environ),
            http10=environ.get("SERVER_PROTOCOL") == "HTTP/1.0",
            present=lambda headers: answers.complete(headers, list(response.headers), request_id),
            admission=mount.admission,
            watch=mount,
            closed=response.close,
        )

    response = answers.deferred(begin)
    for name, value in budget:
        response.headers[name] = value
    return response


def ticks_request(mount: Mount) -> Response:
    """The doctor's timed stream, for whoever may use the relay."""
    environ, settings = request.environ, mount.settings
    request_id = answers.request_id()
    access.check_origin(environ, settings)
    if mount.service:
        access.check_host(environ, settings)
        access.check_peer(access.client_address(environ, settings), settings)
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

    return answers.deferred(begin)
