"""The Flask side: the extension, the blueprint's routes, and a response that becomes a stream when Flask is done."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, Response, current_app, g, request
from werkzeug.routing import BaseConverter

from relay import access, errors, log, ticks
from relay.drain import drain
from relay.headers import SANDBOX, sane_request_id
from relay.incoming import asks_for_events, check_model, raw_target, read_body, says
from relay.keys import TICKET_SECONDS
from relay.metrics import metrics
from relay.mount import EndHook, HeadersHook, Mount
from relay.paths import METHODS, allows, bad_target
from relay.record import Record
from relay.settings import Settings
from relay.stream import Headers, Stream
from relay.version import __version__

if TYPE_CHECKING:
    from flask.blueprints import BlueprintSetupState


class _Rest(BaseConverter):
    """Everything below the mount. Unlike Flask's `path` it takes empty segments, and a leading slash."""

    regex = "(?s:.*?)"
    part_isolating = False
    weight = 200


class Relay:
    """The Flask extension: mounts a relay to one upstream under a prefix.

    `url_prefix`: where; what follows it goes to the upstream. `name`: of the blueprint and the mount; each relay in
    an app needs its own. `settings`: the `RELAY_…` settings of this relay alone; without them they come from the
    app's config. `request_headers`: called in the request's context for each call, returns headers that are set on
    the request upstream in place of any others of their names. `on_end`: called with the `relay.record.Record` of each
    stream that has ended, for billing and audit; outside of any context of Flask's, and it must not block. What a
    `before_request` or `request_headers` leaves in `flask.g.relay_tenant` is the record's `tenant`.

    Raises SettingsError from `init_app` (and from the constructor, given an app) if a setting is wrong.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        url_prefix: str | None = None,
        name: str = "relay",
        settings: Mapping[str, object] | None = None,
        request_headers: HeadersHook | None = None,
        on_end: EndHook | None = None,
    ) -> None:
        self.name = name
        self.url_prefix = url_prefix
        self.blueprint = _blueprint(name)
        self._settings = settings
        self._request_headers = request_headers
        self._on_end = on_end
        self._apps: list[Flask] = []
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, *, url_prefix: str | None = None) -> None:
        """Register the blueprint. Nothing is opened or started: other programs import the app too."""
        given = app.config if self._settings is None else self._settings
        settings = Settings.from_mapping(given)
        mount = Mount(
            self.name,
            settings,
            request_headers=self._request_headers,
            on_end=self._on_end,
        )
        self._mount(app, mount, url_prefix or self.url_prefix or settings.mount)

    def init_service(self, app: Flask, settings: Settings) -> Mount:
        """Register the blueprint as the service's own, at its mount."""
        mount = Mount(self.name, settings, service=True)
        self._mount(app, mount, settings.mount)
        return mount

    def before_request(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Register a check that runs before each request to this relay, such as the shop's own login. A decorator.

        As a blueprint's `before_request`, and also after the relay was given its app.
        """
        if self._apps:
            for app in self._apps:
                app.before_request_funcs.setdefault(self.name, []).append(function)
        else:
            self.blueprint.before_request(function)
        return function

    def _mount(self, app: Flask, mount: Mount, prefix: str) -> None:
        if app.url_map.converters.setdefault("relay_rest", _Rest) is not _Rest:
            raise RuntimeError("another extension has registered a URL converter called relay_rest")
        mounts = app.extensions.setdefault("relay", {})
        if self.name in mounts:
            raise ValueError(f"the app has a relay called {self.name!r} already; give this one another name=")
        mounts[self.name] = mount
        app.register_blueprint(self.blueprint, url_prefix=prefix.rstrip("/") or None)
        self._apps.append(app)


def _blueprint(name: str) -> Blueprint:
    blueprint = Blueprint(name, __name__)
    for rule, view in (("health", health), ("health/live", live), ("health/ready", ready)):
        endpoint = rule.replace("/", "_")
        blueprint.add_url_rule(f"/_relay/{rule}", endpoint, _at(name, view), methods=["GET"])
    blueprint.add_url_rule("/_relay/ticks", "ticks", _at(name, ticks_request), methods=["GET"])
    relay = _at(name, relay_request)

    def everything_below(state: BlueprintSetupState) -> None:
        # Flask wants each method named; a rule without any takes all, and the view refuses those it does not relay.
        prefix, endpoint = (state.url_prefix or "").rstrip("/"), f"{name}.relay"
        state.app.view_functions[endpoint] = relay
        for rule, defaults in ((f"{prefix}/", {"rest": ""}), (f"{prefix}/<relay_rest:rest>", None)):
            state.app.url_map.add(
                state.app.url_rule_class(
                    rule, endpoint=endpoint, defaults=defaults, strict_slashes=False, merge_slashes=False
                )
            )

    blueprint.record(everything_below)
    blueprint.register_error_handler(errors.RelayError, error_response)
    return blueprint


def _at(name: str, view: Callable[..., Any]) -> Callable[..., Any]:
    """A view that is called with its relay's mount in the app that serves the request."""

    def bound(**arguments: Any) -> Any:
        return view(current_app.extensions["relay"][name], **arguments)

    # Extensions tell views apart by this name: what is said of one must not hold for all of them.
    bound.__name__ = bound.__qualname__ = f"{name}_{view.__name__}"
    return bound


# The views.


def relay_request(mount: Mount, rest: str) -> Response:
    """Check the request, read it whole, and answer with a stream that starts when Flask's contexts are gone."""
    settings = mount.settings
    asked = request._get_current_object()  # type: ignore[attr-defined] # noqa: SLF001 - each use of the proxy costs
    environ, method = asked.environ, asked.method
    request_id = _request_id()
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
            client=_client_socket(environ),
            http10=environ.get("SERVER_PROTOCOL") == "HTTP/1.0",
            present=lambda headers: _complete(headers, list(response.headers), request_id),
            admission=mount.admission,
            watch=mount,
            closed=response.close,
        )

    response = _relayed(begin)
    for name, value in budget:
        response.headers[name] = value
    return response


def ticks_request(mount: Mount) -> Response:
    """The doctor's timed stream, for whoever may use the relay."""
    environ, settings = request.environ, mount.settings
    request_id = _request_id()
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
            start=lambda headers: start_response("200 OK", _complete(headers, list(response.headers), request_id)),
            client=_client_socket(environ),
            closed=response.close,
        )

    return _relayed(begin)


def ticket(mount: Mount) -> Response:
    """A ticket for EventSource, which cannot send a client key in a header."""
    if not mount.keys:
        raise errors.NotFound("no client keys are set (RELAY_CLIENT_KEYS), so nobody needs a ticket")
    access.check_origin(request.environ, mount.settings)
    name = mount.keys.check(request.environ)
    return _json({"ticket": mount.keys.ticket(str(name)), "expires_in": TICKET_SECONDS})


def health(mount: Mount) -> Response:
    """The report for people and probes: 503 when the upstream is down or the relay is about to stop."""
    known = mount.health.known()
    status = "draining" if drain.draining else known.status
    response = _json(
        {
            "status": status,
            "upstream": known.report() | ({"demo": True} if mount.settings.upstream_url is None else {}),
            "streams": {"open": mount.admission.open, "max": mount.admission.maximum},
            "version": __version__,
            "uptime_s": round(time.monotonic() - mount.started, 1),
        }
    )
    response.status_code = 503 if status in ("down", "draining") else 200
    return response


def live(_mount: Mount) -> Response:
    """The process works."""
    return _json({"status": "ok"})


def ready(_mount: Mount) -> Response:
    """New requests are welcome; an upstream that is down does not change that."""
    draining = drain.draining
    response = _json({"status": "draining" if draining else "ok"})
    response.status_code = 503 if draining else 200
    return response


def error_response(error: errors.RelayError) -> Response:
    """An error of the relay's as its JSON, with the headers that every response of the relay's carries."""
    request_id = _request_id()
    metrics().refused(error.code)
    mounts = current_app.extensions["relay"]
    asked = mounts.get(request.blueprint) or next(iter(mounts.values()))  # beside its mount the service has one
    address = access.client_address(request.environ, asked.settings)
    log.refused(error, request_id, request.method, address, request.endpoint or "")
    response = Response(error.json(request_id), status=error.status, content_type="application/json")
    for name, value in [*error.headers(), *SANDBOX, ("X-Request-ID", request_id), ("Cache-Control", "no-store")]:
        response.headers[name] = value
    return response


# What the views need.


class _Deferred:
    """Mixed into the app's response class: answers WSGI with a stream, whose status and headers come later."""

    relay_begin: Callable[[Any, Callable[..., Any]], Iterable[bytes]]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return self.relay_begin(self, start_response)


_deferred_classes: dict[type, type] = {}


def _relayed(begin: Callable[[Any, Callable[..., Any]], Iterable[bytes]]) -> Response:
    """A response that `begin` turns into a stream. Holds nothing that would have to be freed if it is never served."""
    base = current_app.response_class
    deferred = _deferred_classes.get(base)
    if deferred is None:
        # Flask turns a response of any other class into the app's own, by assigning to its __class__.
        deferred = _deferred_classes[base] = type("RelayedResponse", (_Deferred, base), {})
    response: Response = deferred()
    response.headers.clear()
    response.relay_begin = begin  # type: ignore[attr-defined]
    return response


def _complete(headers: Headers, of_the_shop: Headers, request_id: str) -> Headers:
    """The upstream's headers and the relay's, with those that the shop's own hooks have put on the response.

    The shop's win over the upstream's, but not over those that keep a stranger's content harmless and a stream moving.
    """
    ours = {name.lower() for name, _ in SANDBOX}
    if any(name == "X-Accel-Buffering" for name, _ in headers):
        ours |= {"x-accel-buffering", "cache-control"}
    theirs = {"content-type", "content-length"}
    if of_the_shop and any(name.lower() == "retry-after" for name, _ in headers):
        theirs.add("retry-after")  # a rate limiter of the shop's puts one on every answer
    shop = [pair for pair in of_the_shop if pair[0].lower() not in ours | theirs]
    replaced = {name.lower() for name, _ in shop} - {"vary", "set-cookie", "link"}
    return [
        *(pair for pair in headers if pair[0].lower() not in replaced),
        *shop,
        ("X-Request-ID", request_id),
    ]


def _request_id() -> str:
    """The caller's request id if it is sane, else a new one; the same for the whole request."""
    environ = request.environ
    known = environ.get("relay.request_id")
    if known is None:
        known = sane_request_id(environ.get("HTTP_X_REQUEST_ID")) or os.urandom(16).hex()
        environ["relay.request_id"] = known
    return str(known)


def _client_socket(environ: Mapping[str, Any]) -> Any:
    """The client's socket where the server shows it and it carries this response alone."""
    if environ.get("HTTP_VERSION") == "2":  # gunicorn's mark of a stream among others on one connection
        return None
    return environ.get("gunicorn.socket") or environ.get("werkzeug.socket")


def _json(report: Mapping[str, Any]) -> Response:
    """A report as JSON in the order of its keys, which an app's own provider may sort."""
    response = Response(json.dumps(report) + "\n", content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Request-ID"] = _request_id()
    return response
