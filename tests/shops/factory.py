"""A shop in the factory's style: extensions without an app first, apps by the dozen later, and stranger mounts.

`create_app()` is the app, `dispatched` the same below `/shop` by a DispatcherMiddleware, `proxied` one that believes a
proxy's X-Forwarded-Prefix. `checked` has wsgiref's validator around it.
"""

from __future__ import annotations

import os
from typing import Any
from wsgiref.validate import validator

from flask import Flask, request, url_for
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from relay import Relay

relay = Relay(url_prefix="/ai")


@relay.before_request
def members_only() -> tuple[str, int] | None:
    return None if request.headers.get("X-Member") != "no" else ("members only", 402)


def create_app() -> Flask:
    app = Flask("factory")
    app.config["RELAY_UPSTREAM_URL"] = os.environ["SHOP_FIRST_URL"]
    app.config["RELAY_HEALTH_TTL"] = os.environ.get("SHOP_HEALTH_TTL", "10s")
    app.config["RELAY_HEALTH_TIMEOUT"] = os.environ.get("SHOP_HEALTH_TIMEOUT", "3s")
    app.add_url_rule("/", "home", lambda: f"home is {url_for('home')}")
    relay.init_app(app)
    return app


def _nothing_else(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"not the shop"]


dispatched = DispatcherMiddleware(_nothing_else, {"/shop": create_app()})
proxied = ProxyFix(create_app().wsgi_app, x_prefix=1)
checked = validator(create_app().wsgi_app)
