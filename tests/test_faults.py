"""An exception that nobody has foreseen, in the midst of a stream: told as one, logged once, and nothing stays held."""

from __future__ import annotations

import json

import pytest
from harness import REPO, servers
from harness.client import request
from harness.upstream import Upstream

EVENTS = [("Content-Type", "text/event-stream")]
BODY = b"data: 1\n\n"


@pytest.mark.parametrize("place", ["head", "body", "observe", "answered", "ended"])
def test_a_fault_in_a_stream_is_told_and_logged_once(place: str) -> None:
    with Upstream() as upstream:
        path = upstream.serve(lambda ex: ex.reply(BODY, headers=EVENTS))
        env = {"UPSTREAM": upstream.base_url, "FAULT": place, "PYTHONPATH": str(REPO / "tests" / "shops")}
        args = ["-k", "gthread", "--threads", "8"]
        with servers.gunicorn(env, "faulty:app", config=None, args=args, ready=None) as shop:
            shop.tracebacks_expected = True
            response = request(shop.port, "POST", "/ai" + path, [("X-Request-ID", "of-this-one")], b"{}")
            body = response.finish()
            shop.wait_log("of-this-one")
            assert shop.log().count("KeyError: 'nobody has foreseen this'") == 1
        if place in ("answered", "ended"):  # the stream is none the worse for it
            assert (response.status, body.data, body.ended) == (200, BODY, "clean")
            return
        if place == "head":
            assert (response.status, response.header("x-should-retry")) == (500, b"false")
            told = json.loads(body.data)
        else:
            assert (response.status, body.ended) == (200, "cut")
            told = json.loads(body.data.removeprefix(b"event: error\ndata: "))
        assert told["type"] == "error"
        assert (told["error"]["code"], told["error"]["request_id"]) == ("relay_error", "of-this-one")
