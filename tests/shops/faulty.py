"""A shop under which the relay meets exceptions that nobody has foreseen. `FAULT` says where: a function of it."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from flask import Flask, Response

from relay import Relay
from relay.llm.usage import Excerpt
from relay.stream.relayed import Stream
from relay.stream.ticks import Ticks
from relay.textview.events import TextEvents
from relay.textview.head import Head
from relay.upstream.exchange import Exchange
from relay.web.mount import Mount

_PLACES: dict[str, tuple[type, str]] = {
    "begin": (Stream, "__init__"),
    "let-go": (Exchange, "close"),
    "usage": (Excerpt, "usage"),
    "head": (Exchange, "read_head"),
    "body": (Exchange, "read"),
    "observe": (Stream, "_observe"),
    "answered": (Mount, "answered"),
    "ended": (Mount, "ended"),
    "text": (TextEvents, "feed"),
    "text-head": (Head, "of_text"),
    "tick": (Ticks, "_event"),
    "closed": (object, ""),
    "header": (object, ""),
}


def _fault(*_: Any, **__: Any) -> NoReturn:
    raise KeyError("nobody has foreseen this")


place = os.environ["FAULT"]
app = Flask(__name__)
if place == "header":

    @app.after_request
    def with_a_name_that_is_none(response: Response) -> Response:
        response.headers["nobody has foreseen this"] = "x"
        return response
elif place == "closed":

    @app.after_request
    def at_the_end(response: Response) -> Response:
        response.call_on_close(_fault)
        return response
else:
    setattr(*_PLACES[place], _fault)
Relay(
    app,
    url_prefix="/ai",
    settings={"RELAY_UPSTREAM_URL": os.environ["UPSTREAM"], "RELAY_MAX_STREAMS": "1"},
    on_end=lambda record: print(f"billed {record.request_id} {record.reason}", flush=True),
)
