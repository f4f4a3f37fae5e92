"""Calls from pages of other origins (RELAY_CORS_ORIGINS): preflights, and what a page may read. flask-cors does it.

The relay's own refusal of foreign origins is in relay.gate.origin: CORS alone only keeps a page from reading an answer
that was already paid for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask, request

from relay.gate.origin import check_origin
from relay.web.views import answers
from relay.wire.target import METHODS

if TYPE_CHECKING:
    from flask import Response

    from relay.settings import Settings

#: Response headers beyond the few that every page may read (Fetch standard, "CORS-safelisted response-header name").
EXPOSED = (
    "X-Request-ID", "X-Upstream-Request-ID", "Retry-After", "x-should-retry", "ETag",
    "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset",
    "x-ratelimit-limit-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens",
    "anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining",
    "anthropic-ratelimit-requests-reset", "anthropic-ratelimit-tokens-limit", "anthropic-ratelimit-tokens-remaining",
    "anthropic-ratelimit-tokens-reset",
    # modelcontextprotocol.io, "Streamable HTTP"; WWW-Authenticate begins its OAuth (RFC 9728)
    "Mcp-Session-Id", "Mcp-Protocol-Version", "WWW-Authenticate",
)  # fmt: skip
#: Seconds that a browser may keep a preflight's answer; Chromium keeps none longer than two hours.
MAX_AGE = 600

Before = Callable[[], Any]
After = Callable[["Response"], "Response"]


def hooks(app: Flask, settings: Settings, not_for: Iterable[str] = ()) -> tuple[Before, After] | None:
    """What is to run before and after each request: preflights are answered, answers told whose pages may read them.

    None if no origins are set. `not_for`: paths that no page may read.
    """
    origins = settings.cors_origins
    if not origins:
        return None
    from flask_cors.core import FLASK_CORS_EVALUATED, get_cors_options, set_cors_headers

    everybody = "*" in origins
    options = get_cors_options(
        app,
        {
            # Literally: flask-cors takes a text with a bracket in it, such as an IPv6 address, for a pattern.
            "origins": "*" if everybody else [re.compile(re.escape(origin) + r"\Z") for origin in origins],
            "methods": sorted(METHODS),
            "allow_headers": "*",  # what the page asks for is told back; what may go upstream is decided there
            "expose_headers": [*EXPOSED, *sorted(settings.cors_expose)],
            "supports_credentials": not everybody,  # with `*` any page could spend what a visitor's cookies open
            "send_wildcard": everybody,
            "always_send": False,
            "vary_header": True,
            "max_age": MAX_AGE,
        },
    )
    closed = frozenset(not_for)

    def before() -> Response | None:
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        if request.path in closed or "Origin" not in request.headers:
            return None
        check_origin(request.environ, settings)
        return answers.empty(204)

    def after(response: Response) -> Response:
        if request.path not in closed:
            # A shop's own flask-cors has put its headers on our errors, and would put them on all else after this.
            for name in [name for name, _ in response.headers if name.lower().startswith("access-control-")]:
                response.headers.pop(name, None)
            set_cors_headers(response, options)
            setattr(response, FLASK_CORS_EVALUATED, True)
            if not everybody:
                response.vary.add("Origin")  # for answers to requests without one too: caches mix them up
        return response

    return before, after
