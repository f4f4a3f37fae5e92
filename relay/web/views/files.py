"""Files that come with the relay, served from memory: the JavaScript client, and what else lies in relay/static."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from flask import Response, request

from relay import errors
from relay.web.views import answers
from relay.wire.headers import SANDBOX

FOLDER = Path(__file__).resolve().parents[2] / "static"

_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".ts": "text/plain; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # No text may become markup or script, not even by a mistake in the page's own code (W3C Trusted Types).
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
#: On a page of the relay's: it asks its own origin only, runs nothing but its files, and stands in nobody's frame.
OF_A_PAGE = (
    ("Content-Security-Policy", "; ".join(f"{name} {value}" for name, value in _POLICY.items())),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)


class StaticFile:
    """One file as a view, read when it is made. GET and HEAD; 304 for who has it already (RFC 9110 section 13.1.2)."""

    def __init__(self, path: Path, headers: Sequence[tuple[str, str]] = ()) -> None:
        """`headers`: further ones, such as a page's Content-Security-Policy. Raises OSError."""
        self._data = path.read_bytes()
        self._type = _TYPES[path.suffix]
        self._tag = hashlib.sha256(self._data).hexdigest()[:32]
        self._headers = headers

    def __call__(self, _mount: object) -> Response:
        if request.method not in ("GET", "HEAD"):
            refusal = errors.MethodNotAllowed("this path takes GET and HEAD only")
            refusal.fields = [("Allow", "GET, HEAD")]
            raise refusal
        response = Response(self._data, content_type=self._type)
        response.headers.extend([SANDBOX[0], ("Cache-Control", "no-cache"), *self._headers])
        response.headers["X-Request-ID"] = answers.request_id(request.environ)
        response.set_etag(self._tag)
        return response.make_conditional(request)  # type: ignore[return-value]
