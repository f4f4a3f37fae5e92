"""`on_end`: the record of every stream, with the tokens that it reported, whatever becomes of stream or hook."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from harness import REPO, eventually, servers
from harness.client import Connection, request
from harness.upstream import Exchange, Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENTS = [("Content-Type", "text/event-stream")]
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'


class Shop:
    def __init__(self, upstream: Upstream, relay: servers.Gunicorn, bills: Path) -> None:
        self.upstream = upstream
        self.relay = relay
        self._bills = bills

    def bill(self, request_id: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def there() -> bool:
            written = self._bills.read_text() if self._bills.exists() else ""
            lines = written[: written.rfind("\n") + 1].splitlines()  # half a line is none yet
            found[:] = [bill for bill in map(json.loads, lines) if bill["request_id"] == request_id]
            return bool(found)

        eventually(there, f"the bill of {request_id}")
        assert len(found) == 1, "one stream, one bill"
        return found[0]


@pytest.fixture(scope="module", params=["gevent", "gthread"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    bills = tmp_path_factory.mktemp("bills") / "bills"
    with Upstream() as upstream:
        env = {"UPSTREAM": upstream.base_url, "BILLS": str(bills), "PYTHONPATH": str(REPO / "tests" / "shops")}
        args = ["-k", request.param, *(["--threads", "8"] if request.param == "gthread" else [])]
        with servers.gunicorn(env, "billing:app", config=None, args=args, ready=None) as relay:
            yield Shop(upstream, relay, bills)


def test_a_whole_stream_is_billed_with_what_it_reported(shop: Shop) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(USAGE, headers=EVENTS))
    headers = [("X-Request-ID", "whole")]
    response = request(shop.relay.port, "POST", "/ai" + path, headers, b'{"model": "of-the-shop", "stream": true}')
    assert response.finish().data == USAGE
    bill = shop.bill("whole")
    assert (bill["reason"], bill["status"], bill["bytes"], bill["events"]) == ("done", 200, len(USAGE), 2)
    tokens = {"input_tokens": 7, "output_tokens": 2, "cache_read_tokens": None, "cache_write_tokens": None}
    assert (bill["model"], bill["usage"]) == ("of-the-shop", tokens)
    assert 0 < bill["first_byte"] <= bill["seconds"]


def test_a_stream_that_says_nothing_of_tokens_is_billed_without(shop: Shop) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"data: [DONE]\n\n", headers=EVENTS))
    request(shop.relay.port, "POST", "/ai" + path, [("X-Request-ID", "silent")], b"{}").finish()
    assert (shop.bill("silent")["usage"], shop.bill("silent")["model"]) == (None, None)


@pytest.mark.parametrize(("said", "billed"), [("acme", "acme"), ("17", "17"), (None, None)])
def test_the_bill_names_the_tenant_that_the_shop_has_named(shop: Shop, said: str | None, billed: str | None) -> None:
    """As text, whatever it is in the shop; and what one request is for says nothing of the next."""
    path = shop.upstream.serve(lambda ex: ex.reply(USAGE, headers=EVENTS))
    request_id = f"tenant-{said}"
    headers = [("X-Request-ID", request_id), *([("X-Tenant", said)] if said else [])]
    request(shop.relay.port, "POST", "/ai" + path, headers, b"{}").finish()
    assert shop.bill(request_id)["tenant"] == billed


@pytest.mark.parametrize("end", ["upstream_cut", "client_gone", "upstream_error"])
def test_every_other_end_is_billed_too(shop: Shop, end: str) -> None:
    def handler(ex: Exchange) -> None:
        if end == "upstream_error":
            ex.abort()
            return
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
        ex.abort() if end == "upstream_cut" else ex.wait_gone()

    path = shop.upstream.serve(handler)
    with Connection(shop.relay.port) as connection:
        connection.send("POST", "/ai" + path, [("X-Request-ID", end)], b"{}")
        response = connection.read_head()
        if end == "client_gone":
            response.read_event()
        else:
            response.finish()
    assert shop.bill(end)["reason"] == end


def test_a_hook_that_fails_harms_nothing_but_the_log(shop: Shop) -> None:
    shop.relay.tracebacks_expected = True
    path = shop.upstream.serve(lambda ex: ex.reply(USAGE, headers=EVENTS))
    for _ in range(3):
        response = request(shop.relay.port, "POST", "/ai" + path, body=b'{"model": "of-the-wrong-kind"}')
        assert response.finish().data == USAGE
    shop.relay.wait_log("the shop's own mistake")
