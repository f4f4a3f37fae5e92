"""A shop with two relays: one that shows the page, one as it is by default. Both below a prefix of the shop's own.

TRYOUT_URL is their upstream. The first wants a member, by a cookie that the shop's own login sets.
"""

from __future__ import annotations

import os

from flask import Flask, Response, request

from relay import Relay

app = Flask("tryout")
settings = {"RELAY_UPSTREAM_URL": os.environ["TRYOUT_URL"]}
shown = Relay(app, name="shown", url_prefix="/shop/ai", settings=settings, parts=("page",))
plain = Relay(app, name="plain", url_prefix="/shop/plain", settings=settings)


@shown.before_request
def members_only() -> tuple[str, int] | None:
    return None if request.cookies.get("member") == "yes" else ("members only", 402)


@app.get("/login")
def login() -> Response:
    response = Response("welcome")
    response.set_cookie("member", "yes")
    return response
