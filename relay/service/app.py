"""The service: a Flask app that is nothing but the relay, from the environment."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app, request
from werkzeug.exceptions import HTTPException

from relay import errors
from relay.gate.origin import check_admin
from relay.observe import log
from relay.observe.metrics import CONTENT_TYPE, metrics
from relay.service import open_streams
from relay.settings import Settings, environment, split_bind
from relay.shared import lame_duck
from relay.web import cors
from relay.web.extension import Relay
from relay.web.request import current_request
from relay.web.routes import PARTS, routes
from relay.web.views import answers, state
from relay.wire.target import METHODS

if TYPE_CHECKING:
    from relay.web.mount import Mount


#: What RELAY_ADMIN_BIND has, by endpoint: of these nobody is asked for a key.
_ADMIN = frozenset(
    {
        "service_health",
        "service_health_live",
        "service_health_ready",
        "service_metrics",
        "service_streams",
        "service_drain",
    }
)


def create_app(config: Mapping[str, object] | None = None) -> Flask:
    """The service's WSGI app.

    `config`: its settings; without it the environment, and `.env` beneath it. Raises SettingsError with every fault.
    """
    settings = Settings.from_mapping(environment.environment() if config is None else config, service=True)
    app = Flask("relay", static_folder=None)
    log.to_standard_output()
    mount = Relay(parts=()).init_service(app, settings)
    for name, view in (
        ("health", state.health),
        ("health/live", state.live),
        ("health/ready", state.ready),
    ):
        app.add_url_rule(f"/{name}", f"service_{name.replace('/', '_')}", _bound(view, mount), methods=["GET"])
    app.add_url_rule("/ticket", "service_ticket", _bound(state.ticket, mount), methods=["POST"])
    for route in routes(PARTS):
        app.add_url_rule(
            f"/{route.path}",
            f"service_{route.endpoint}",
            _bound(route.view, mount),
            methods=METHODS,
            provide_automatic_options=False,
        )
    app.add_url_rule("/metrics", "service_metrics", lambda: _metrics(settings), methods=["GET"])
    app.add_url_rule("/streams", "service_streams", lambda: _streams(settings), methods=["GET"])
    app.add_url_rule("/drain", "service_drain", lambda: _drain(settings, mount), methods=["POST", "DELETE"])
    app.before_request(lambda: _admin_has_no_more(settings))
    across = cors.hooks(app, settings, not_for=("/metrics", "/streams", "/drain"))
    if across:
        app.before_request(across[0])
        app.after_request(across[1])
    app.register_error_handler(errors.RelayError, answers.error_response)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _bug)
    if settings.upstream_url is None:
        log.event("demo", message="no RELAY_UPSTREAM_URL is set: what is relayed is the embedded demo upstream")
    return app


def _bound(view: Any, mount: Mount) -> Any:
    return lambda: view(mount)


def _metrics(settings: Settings) -> Response:
    """All workers' metrics, on the admin address only: they tell who uses how much."""
    _check_admin_address(settings, "metrics are")
    response = Response(metrics().expose(), content_type=CONTENT_TYPE)
    response.headers["X-Request-ID"] = answers.request_id(request.environ)
    return response


def _streams(settings: Settings) -> Response:
    """The open streams of all workers, on the admin address only."""
    _check_admin_address(settings, "the list of streams is")
    streams, silent = open_streams.everywhere()
    response = answers.as_json(streams)
    if silent:
        response.headers["X-Workers-Silent"] = ", ".join(map(str, silent))
    return response


def _drain(settings: Settings, mount: Mount) -> Response:
    """POST: not ready from now on, in all workers, and accepting as before; DELETE takes it back. On the admin address
    only. The answer is that of `/health/ready`, and 200."""
    _check_admin_address(settings, "a drain is asked for")
    try:
        if request.method == "POST":
            lame_duck.say()
        else:
            lame_duck.take_back()
    except OSError as error:
        raise errors.RelayError(f"the workers cannot be told ({error}); SIGTERM drains nevertheless") from None
    response = state.ready(mount)
    response.status_code = 200
    return response


def _admin_has_no_more(settings: Settings) -> None:
    """Serve only admin routes on the admin address, and those to no page: it is open to monitoring, and may bypass the
    proxy that protects the service. Raises NotFound or Forbidden."""
    environ = current_request().environ
    answers.check_slashes(environ)
    if not _on_admin_address(settings):
        return
    check_admin(environ, settings)
    if request.endpoint not in _ADMIN:
        raise errors.NotFound(
            "nothing is at this path: here are health, metrics and the list of streams; the relay is on RELAY_BIND"
        )


def _check_admin_address(settings: Settings, what: str) -> None:
    """Raise NotFound for a request that came in elsewhere; `what` is there, in words with their verb."""
    if not _on_admin_address(settings):
        raise errors.NotFound(f"nothing is at this path; {what} on RELAY_ADMIN_BIND")


def _on_admin_address(settings: Settings) -> bool:
    """Whether the request came in at RELAY_ADMIN_BIND, by its socket's own address and not by anything that it says."""
    sock = current_request().environ.get("gunicorn.socket")
    if settings.admin_bind is None or sock is None:
        return False
    return _is_admin(sock.getsockname(), settings.bind, settings.admin_bind)


@functools.lru_cache(maxsize=64)
def _is_admin(here: tuple[Any, ...] | str, bind: str, admin_bind: str) -> bool:
    """Whether a socket of this name is that of the admin address. Asked for each request, with few different names."""
    if not isinstance(here, tuple):
        return admin_bind == f"unix:{here}"
    service, admin = split_bind(bind), split_bind(admin_bind)
    if here[1] != admin.port or service.port != admin.port:
        return bool(here[1] == admin.port)
    # One port of two hosts. A name may be any address, so it is told from the other by that one's.
    address, theirs, ours = (_ip(host) for host in (here[0], service.host, admin.host))
    return address == ours if ours else theirs is not None and address != theirs


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _http_error(error: HTTPException) -> Response:
    """What Flask refuses itself, in the relay's shape."""
    error.__traceback__ = error.__context__ = None  # Flask's request keeps it, and its frames the request
    if error.code == 404:
        mount = next(iter(current_app.extensions["relay"].values())).settings.mount
        known: errors.RelayError = errors.NotFound(
            f"nothing is at this path; what is relayed lies below {mount} (RELAY_MOUNT)"
        )
    elif error.code == 405:
        known = errors.MethodNotAllowed("this path does not take this method")
    else:
        known = errors.BadRequest(error.description or "the request cannot be understood")
        known.status = error.code or 400
    response = answers.error_response(known)
    for name, value in error.get_headers():
        if name.lower() == "allow":
            response.headers[name] = value
    return response


def _bug(_error: Exception) -> Response:
    log.logger.exception("request %s failed in the relay itself", answers.request_id(request.environ))
    return answers.error_response(errors.RelayError("the relay failed; its log says why under this request id"))
