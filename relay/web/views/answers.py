"""What the views answer with: a response that becomes a stream when Flask is done, the relay's JSON, its errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flask import Response, current_app

from relay import errors
from relay.gate.address import client_address
from relay.observe import log
from relay.observe.metrics import metrics
from relay.web.request import current_request
from relay.wire.headers import SANDBOX, sane_request_id

if TYPE_CHECKING:
    from relay.stream.relayed import Headers


def error_response(error: errors.RelayError) -> Response:
    """An error of the relay's as its JSON, with the headers that every response of the relay's carries."""
    # What raised it may still name it, and the frames of its traceback hold all that was read of the request.
    error.detached()
    asked = current_request()
    known_as = request_id(asked.environ)
    metrics().refused(error.code)
    mounts = current_app.extensions["relay"]
    mount = mounts.get(asked.blueprint) or next(iter(mounts.values()))  # beside its mount the service has one
    address = client_address(asked.environ, mount.settings)
    log.refused(error, known_as, asked.method, address, asked.endpoint or "")
    response = Response(
        error.json(known_as, errors.dialect_of(asked.path)), status=error.status, content_type="application/json"
    )
    for name, value in [*error.headers(), *SANDBOX, ("X-Request-ID", known_as), ("Cache-Control", "no-store")]:
        response.headers[name] = value
    return response


class _Deferred:
    """Mixed into the app's response class: answers WSGI with a stream, whose status and headers come later."""

    relay_begin: Callable[[Any, Callable[..., Any]], Iterable[bytes]]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            return self.relay_begin(self, start_response)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not reach the server (relay.stream.relayed)
            known_as = request_id(environ)
            log.fault(error, "beginning a stream", known_as)
            body = errors.RelayError("the relay has met a fault of its own; its log says which").json(known_as).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *SANDBOX]
            start_response("500 Internal Server Error", [*headers, ("X-Request-ID", known_as)])
            return [body]


_deferred_classes: dict[type, type] = {}


def deferred(begin: Callable[[Any, Callable[..., Any]], Iterable[bytes]], environ: dict[str, Any]) -> Response:
    """A response that `begin` turns into a stream. Holds nothing that would have to be freed if it is never served."""
    base = current_app.response_class
    deferred = _deferred_classes.get(base)
    if deferred is None:
        # Flask turns a response of any other class into the app's own, by assigning to its __class__.
        deferred = _deferred_classes[base] = type("RelayedResponse", (_Deferred, base), {})
    response: Response = deferred()
    response.headers.clear()
    response.headers["Content-Type"] = "application/octet-stream"  # for hooks that look; the upstream's goes out
    environ["relay.deferred"] = True
    response.relay_begin = begin  # type: ignore[attr-defined]
    return response


def not_replaced(response: Response) -> Response:
    """After all hooks of the app's: an error for a stream that one of them has replaced by some other success."""
    environ = current_request().environ
    if environ.pop("relay.deferred", None) and not isinstance(response, _Deferred) and response.status_code < 400:
        known_as = request_id(environ)
        log.app_fault(
            "an after_request hook has replaced the relay's response by one of its own, for request %s; the upstream "
            "was not called. The hook must return the response that it was given.",
            known_as,
        )
        error = errors.RelayError("the app has replaced the relay's response; its log says more")
        return Response(error.json(known_as), status=error.status, content_type="application/json")
    return response


#: What a hook of the app's says of the placeholder's bytes is not said of the upstream's; its id is the request's.
_OF_THE_BYTES = frozenset(
    {
        "accept-ranges",
        "connection",
        "content-digest",
        "content-encoding",
        "content-length",
        "content-md5",
        "content-range",
        "content-type",
        "digest",
        "etag",
        "last-modified",
        "repr-digest",
        "trailer",
        "transfer-encoding",
        "x-request-id",
    }
)


def complete(headers: Headers, of_the_shop: Headers, request_id: str) -> Headers:
    """The upstream's headers and the relay's, with those that the shop's own hooks have put on the response.

    The shop's win over the upstream's, but not over those that keep a stranger's content harmless and a stream moving.
    """
    of_the_shop = [pair for pair in of_the_shop if pair[0].lower() not in _OF_THE_BYTES]
    if not of_the_shop:
        return [*headers, ("X-Request-ID", request_id)]
    ours = {name.lower() for name, _ in SANDBOX}
    if any(name == "X-Accel-Buffering" for name, _ in headers):
        ours |= {"x-accel-buffering", "cache-control"}
    if any(name.lower() == "retry-after" for name, _ in headers):
        ours.add("retry-after")  # a rate limiter of the shop's puts one on every answer
    shop = [pair for pair in of_the_shop if pair[0].lower() not in ours]
    replaced = {name.lower() for name, _ in shop} - {"vary", "set-cookie", "link"}
    return [
        *(pair for pair in headers if pair[0].lower() not in replaced),
        *shop,
        ("X-Request-ID", request_id),
    ]


def check_slashes(environ: Mapping[str, Any]) -> None:
    """Refuse a path that begins with a run of slashes. Raises NotFound.

    Werkzeug takes it for the same path with one, and a proxy that guards a prefix does not.
    """
    if str(environ.get("PATH_INFO", "")).startswith("//"):
        raise errors.NotFound("nothing is at this path: it begins with more than one slash")


def request_id(environ: dict[str, Any]) -> str:
    """The caller's request id if it is sane, else a new one; the same for the whole request."""
    known = environ.get("relay.request_id")
    if known is None:
        known = sane_request_id(environ.get("HTTP_X_REQUEST_ID")) or os.urandom(16).hex()
        environ["relay.request_id"] = known
    return str(known)


def client_socket(environ: Mapping[str, Any]) -> Any:
    """The client's socket where the server shows it and it carries this response alone."""
    if environ.get("HTTP_VERSION") == "2":  # gunicorn's mark of a stream among others on one connection
        return None
    return environ.get("gunicorn.socket") or environ.get("werkzeug.socket")


def empty(status: int) -> Response:
    """A status that says it all."""
    response = Response(status=status)
    response.headers.clear()
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Request-ID"] = request_id(current_request().environ)
    return response


def as_json(report: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Response:
    """A report as JSON in the order of its keys, which an app's own provider may sort."""
    response = Response(json.dumps(report) + "\n", content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Request-ID"] = request_id(current_request().environ)
    return response
