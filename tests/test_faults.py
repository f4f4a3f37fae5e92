"""An exception that nobody has foreseen, in the midst of a stream: told as one, logged once, and nothing stays held."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from harness import REPO, servers
from harness.client import Connection, NoResponse, request
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENTS = [("Content-Type", "text/event-stream")]
BODY = b"data: 1\n\n"


ID = ("X-Request-ID", "of-this-one")
WORKERS = pytest.mark.parametrize("worker", [("gthread", "--threads", "8"), ("gevent",)], ids=["threads", "gevent"])


@contextlib.contextmanager
def faulty(place: str, worker: tuple[str, ...], upstream: Upstream) -> Iterator[servers.Gunicorn]:
    env = {"UPSTREAM": upstream.base_url, "FAULT": place, "PYTHONPATH": str(REPO / "tests" / "shops")}
    with servers.gunicorn(env, "faulty:app", config=None, args=["-k", *worker], ready=None) as shop:
        shop.tracebacks_expected = True
        yield shop
        shop.wait_log("nobody has foreseen this")


@WORKERS
@pytest.mark.parametrize("place", ["text", "text-head"])
def test_a_fault_in_a_text_view_is_told_and_billed_as_one(place: str, worker: tuple[str, ...]) -> None:
    chat = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
    with Upstream(lambda ex: ex.reply(chat, headers=EVENTS)) as upstream, faulty(place, worker, upstream) as shop:
        with Connection(shop.port) as connection:
            headers = [ID, ("Content-Type", "application/json")]
            connection.send("POST", "/ai/_relay/chat/stream", headers, b'{"prompt": "Hello"}')
            if place == "text":
                body = connection.read_head().finish()
                assert body.ended == "cut"
                told = json.loads(body.data.partition(b"event: error\ndata: ")[2])
                assert (told["error"]["code"], told["error"]["request_id"]) == ("relay_error", "of-this-one")
            else:  # there is no head to tell it with
                with pytest.raises(NoResponse):
                    connection.read_head()
        shop.wait_log("billed of-this-one relay_error")


@WORKERS
def test_a_header_of_the_apps_that_the_server_refuses_is_a_fault_and_told(worker: tuple[str, ...]) -> None:
    with Upstream(lambda ex: ex.reply(BODY, headers=EVENTS)) as upstream, faulty("header", worker, upstream) as shop:
        response = request(shop.port, "POST", "/ai/x", [ID], b"{}")
        told = json.loads(response.finish().data)["error"]
        assert (response.status, told["code"], told["request_id"]) == (500, "relay_error", "of-this-one")
        shop.wait_log("billed of-this-one relay_error")


@WORKERS
def test_a_fault_in_the_doctors_ticks_is_a_cut(worker: tuple[str, ...]) -> None:
    with Upstream() as upstream, faulty("tick", worker, upstream) as shop:
        with Connection(shop.port) as connection:
            connection.send("GET", "/ai/_relay/ticks?n=2")
            with pytest.raises(NoResponse):
                connection.read_head()
        shop.wait_log("making the doctor's ticks")


@WORKERS
def test_an_app_whose_own_code_fails_at_the_end_is_told_of_the_stream_nevertheless(worker: tuple[str, ...]) -> None:
    with Upstream(lambda ex: ex.reply(BODY, headers=EVENTS)) as upstream, faulty("closed", worker, upstream) as shop:
        body = request(shop.port, "POST", "/ai/x", [ID], b"{}").finish()
        assert (body.data, body.ended) == (BODY, "clean")
        shop.wait_log("billed of-this-one done")


@WORKERS
def test_a_fault_before_a_stream_is_told_in_the_relays_shape(worker: tuple[str, ...]) -> None:
    with Upstream() as upstream, faulty("begin", worker, upstream) as shop:
        response = request(shop.port, "POST", "/ai/x", [ID], b"{}")
        told = json.loads(response.finish().data)["error"]
        assert (response.status, told["code"], told["request_id"]) == (500, "relay_error", "of-this-one")
        assert not upstream.seen()


@WORKERS
@pytest.mark.parametrize("place", ["let-go", "usage"])
def test_a_fault_while_a_stream_ends_holds_nothing(place: str, worker: tuple[str, ...]) -> None:
    """There is one slot: the second stream has it after the first."""
    with Upstream(lambda ex: ex.reply(BODY, headers=EVENTS)) as upstream, faulty(place, worker, upstream) as shop:
        for name in ("first", "second"):
            body = request(shop.port, "POST", "/ai/x", [("X-Request-ID", name)], b"{}").finish()
            assert (body.data, body.ended) == (BODY, "clean")
            shop.wait_log(f"billed {name} done")


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
