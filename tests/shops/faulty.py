"""A shop under which the relay meets exceptions that nobody has foreseen. `FAULT` says where: a function of it."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from flask import Flask

from relay import Relay
from relay.stream.relayed import Stream
from relay.upstream.exchange import Exchange
from relay.web.mount import Mount

_PLACES: dict[str, tuple[type, str]] = {
    "head": (Exchange, "read_head"),
    "body": (Exchange, "read"),
    "observe": (Stream, "_observe"),
    "answered": (Mount, "answered"),
    "ended": (Mount, "ended"),
}


def _fault(*_: Any) -> NoReturn:
    raise KeyError("nobody has foreseen this")


setattr(*_PLACES[os.environ["FAULT"]], _fault)
app = Flask(__name__)
Relay(app, url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": os.environ["UPSTREAM"]})
