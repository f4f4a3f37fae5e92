"""A shop with a login, a database pool of one, strict error pages, hooks and a response class of its own.

Mounts two relays: `/ai` to one upstream, with a key for each customer, and `/other/v2` to another, a transparent one.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import Any

from flask import Flask, Response, abort, g, request, session

from relay import Relay

PUBLIC = ("/", "/login", "/ran")


class ShopResponse(Response):
    """What the shop's views and its extensions return."""

    default_mimetype = "text/html"


class Pool:
    """The database's connections: one, for all that happens in this process."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(1)

    def take(self) -> None:
        if not self._free.acquire(timeout=8):
            abort(503, "the pool is empty")

    def give_back(self) -> None:
        self._free.release()


app = Flask(__name__)
app.response_class = ShopResponse
app.secret_key = "of the shop"
app.config.update(
    SESSION_REFRESH_EACH_REQUEST=True,
    RELAY_UPSTREAM_URL=os.environ["SHOP_FIRST_URL"],
    RELAY_UPSTREAM_HEADERS={"X-Shop": "bookshop"},
    RELAY_MAX_STREAMS=50,
    RELAY_HEALTH_TTL=0,
)
pool = Pool()
# Which hook has run for which request, by the tag that the request came with. Appending is atomic, counting up is not.
ran: list[tuple[str, str]] = []


def has_run(hook: str) -> None:
    ran.append((request.headers.get("X-Tag", ""), hook))


@app.before_request
def who_is_it() -> None:
    """The customer, from the database."""
    g.tag = request.headers.get("X-Tag", "")
    if request.path in PUBLIC:
        return
    pool.take()
    g.database = True
    g.user = session.get("user")
    if g.user is None:
        abort(401)


@app.after_request
def on_the_way_out(response: Response) -> Response:
    has_run("after_request")
    tag = request.headers.get("X-Tag", "")
    response.call_on_close(lambda: ran.append((tag, "on_close")))
    response.headers["X-Frame-Options"] = "DENY"
    response.headers["X-Class"] = next(c.__name__ for c in type(response).__mro__ if c.__module__ == __name__)
    response.headers["Access-Control-Allow-Origin"] = "https://pages.shop.example"
    response.vary.add("Origin")
    response.set_cookie("basket", "empty", httponly=True)
    return response


@app.teardown_request
def request_over(_error: BaseException | None) -> None:
    has_run("teardown_request")


@app.teardown_appcontext
def give_back(_error: BaseException | None) -> None:
    ran.append((g.get("tag", ""), "teardown_appcontext"))
    if g.pop("database", False):
        pool.give_back()


@app.errorhandler(401)
def not_logged_in(_error: Any) -> tuple[str, int]:
    return "<h1>Please log in</h1>", 401


@app.errorhandler(404)
def not_found(_error: Any) -> tuple[str, int]:
    return "<h1>No such book</h1>", 404


@app.errorhandler(Exception)
def whatever(error: Exception) -> tuple[str, int]:
    return "<h1>The shop is closed</h1>", getattr(error, "code", None) or 500


@app.get("/")
def home() -> str:
    return "<h1>Books</h1>"


@app.post("/login")
def login() -> str:
    session.permanent = True
    session["user"] = request.form["user"]
    return "welcome"


@app.get("/books")
def books() -> str:
    return f"three books for {g.user}"


@app.get("/boom")
def boom() -> str:
    raise RuntimeError("the shop's own fault")


@app.get("/ran")
def what_ran() -> dict[str, int]:
    """How often each hook has run for the requests with a tag."""
    return Counter(hook for tag, hook in list(ran) if tag == request.args["tag"])


UNSENDABLE = {
    "line break": {"Authorization": "Bearer x\r\nX-Injected: 1"},
    "line feed": {"Authorization": "Bearer x\n"},
    "nul": {"Authorization": "Bearer \0"},
    "euro": {"Authorization": "Bearer \u20ac"},
    "name": {"X-A: b\r\nX-Injected": "1"},
    "length": {"Content-Length": "0"},
    "coding": {"transfer-encoding": "chunked"},
    "host": {"Host": "elsewhere.example"},
}


def of_the_customer() -> dict[str, str]:
    """Each customer has a key upstream; some have one that no header can carry."""
    if g.user in UNSENDABLE:
        return UNSENDABLE[g.user]
    return {"Authorization": f"Bearer key-of-{g.user}", "X-Tenant": g.user}


first = Relay(app, url_prefix="/ai", request_headers=of_the_customer)
second = Relay(
    name="second",
    url_prefix="/other/v2/",
    settings={
        "RELAY_UPSTREAM_URL": os.environ["SHOP_SECOND_URL"],
        "RELAY_UPSTREAM_KEY": "sk-second",
        "RELAY_TRANSPARENT": True,
    },
)
second.init_app(app)


@second.before_request
def not_for_everyone() -> None:
    """The second relay has a check of its own besides."""
    if g.user == "eve":
        abort(403)
