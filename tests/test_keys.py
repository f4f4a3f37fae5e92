"""Client keys: who shows one may call, and nobody else; no key goes upstream or into the log."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from harness import eventually, servers
from harness.client import NoResponse, request
from harness.upstream import Upstream

from relay import errors
from relay.gate.keys import ClientKeys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEYS = "first-key,second-key"


@pytest.fixture(scope="module")
def keyed() -> Iterator[tuple[Upstream, servers.Gunicorn]]:
    with Upstream() as upstream:
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_UPSTREAM_KEY": "of-the-upstream",
            "RELAY_CLIENT_KEYS": KEYS,
            "RELAY_ALLOW": "*",
        }
        with servers.gunicorn(env) as relay:
            yield upstream, relay


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(("Authorization", "Bearer first-key"), id="bearer"),
        pytest.param(("authorization", "bearer second-key"), id="any-case"),
        pytest.param(("x-api-key", "second-key"), id="x-api-key"),
        pytest.param(("api-key", "first-key"), id="api-key"),
    ],
)
def test_a_known_key_opens_and_stays_here(keyed: tuple[Upstream, servers.Gunicorn], header: tuple[str, str]) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    assert request(relay.port, "POST", "/v1" + path, [header], b"{}").status == 200
    ex = upstream.next(path)
    assert ex.all("Authorization") == [b"Bearer of-the-upstream"]
    assert ex.all("x-api-key") == ex.all("api-key") == []
    assert not any(key in relay.log() for key in ("first-key", "second-key", "of-the-upstream"))


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="none"),
        pytest.param([("Authorization", "Bearer third-key")], id="unknown"),
        pytest.param([("Authorization", "first-key")], id="no-bearer"),
        pytest.param([("Authorization", "Basic first-key")], id="basic"),
        pytest.param([("Authorization", "Bearer first-ke")], id="a-part"),
        pytest.param([("Authorization", f"Bearer {KEYS}")], id="the-whole-list"),
        pytest.param([("Authorization", "Bearer of-the-upstream")], id="the-upstreams"),
        pytest.param([("x-api-key", "")], id="empty"),
        pytest.param([("x-api-key", "\xff\xfe")], id="bytes"),
    ],
)
def test_anything_else_is_401_and_reaches_nobody(
    keyed: tuple[Upstream, servers.Gunicorn], headers: list[tuple[str, str]]
) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    response = request(relay.port, "POST", "/v1" + path, headers, b"{}")
    assert (response.status, response.header("WWW-Authenticate")) == (401, b"Bearer")
    assert json.loads(response.finish().data)["error"]["code"] == "invalid_api_key"
    assert upstream.seen(path) == []


def test_with_keys_the_relay_may_be_called_by_any_name(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    headers = [("Host", "relay.example"), ("X-Forwarded-For", "203.0.113.9"), ("x-api-key", "first-key")]
    assert request(relay.port, "POST", "/v1" + path, headers, b"{}").status == 200


def test_health_needs_no_key(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    _, relay = keyed
    assert request(relay.port, "GET", "/health/live").status == 200


# --- A file of keys


@pytest.mark.parametrize("config", ["gunicorn.conf.py", "python:relay.gunicorn_conf"])
def test_a_file_of_keys_is_read_again_on_reload(tmp_path: Path, config: str) -> None:
    file = tmp_path / "keys"
    file.write_text("# who may\nold-key\n")

    def statuses() -> list[int]:
        return [request(relay.port, "GET", "/v1/x", {"x-api-key": key}).status for key in ("old-key", "new-key")]

    def reloaded() -> bool:
        try:
            return statuses() == [401, 200]
        except (NoResponse, OSError):
            return False  # a request too slow for the old worker's last second

    with Upstream(lambda ex: ex.reply(b"ok")) as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_CLIENT_KEYS": f"@{file}", "RELAY_DRAIN": "1"}
        with servers.gunicorn(env, config=config) as relay:
            assert statuses() == [200, 401]
            file.write_text("new-key\n")
            assert statuses() == [200, 401], "not before it is told to"
            old = relay.workers()
            relay.reload()
            eventually(reloaded, "the new keys", 20)
            eventually(lambda: len(relay.workers()) == 1 and relay.workers() != old, "the old worker's end", 20)

            # A reload with a faulty file changes nothing, and a worker that is replaced then has what the others have.
            file.write_text("\n")
            old = relay.workers()
            relay.reload()
            relay.wait_log("running on as before", 20)
            eventually(lambda: len(relay.workers()) == 1 and relay.workers() != old, "the old worker's end", 20)
            assert statuses() == [401, 200]
            file.unlink()
            killed = relay.kill_worker()
            eventually(lambda: relay.workers() not in ([], [killed]), "another worker", 20)
            eventually(lambda: request(relay.port, "GET", "/health/live").status == 200, "it serves")
            assert statuses() == [401, 200]
            assert relay.log().count("running on as before") == 1
            assert "new-key" not in relay.log()


def test_a_ticket_opens_for_an_eventsource_and_does_not_go_upstream(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    upstream, relay = keyed
    given = request(relay.port, "POST", "/ticket", [("x-api-key", "first-key")])
    assert given.header("Cache-Control") == b"no-store"
    ticket = json.loads(given.finish().data)
    assert ticket["expires_in"] == 60
    path = upstream.serve(lambda ex: ex.reply(b"data: 1\n\n", headers=[("Content-Type", "text/event-stream")]))
    for query, expected in (("a=%20b&ticket={}&c", "?a=%20b&c"), ("ticket={}", ""), ("ticket={}&ticket=x", "")):
        target = f"/v1{path}?{query.format(ticket['ticket'])}"
        assert request(relay.port, "GET", target).status == 200
        assert upstream.next(path).target.decode() == path + expected
    assert ticket["ticket"] not in relay.log()


@pytest.mark.parametrize("ticket", ["", "x", "ImtleTphYmMi.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb", "%FF"])
def test_a_ticket_that_was_not_given_opens_nothing(keyed: tuple[Upstream, servers.Gunicorn], ticket: str) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    assert request(relay.port, "GET", f"/v1{path}?ticket={ticket}").status == 401
    assert upstream.seen(path) == []


def test_a_ticket_is_good_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ClientKeys(["a-key"])
    ticket = keys.ticket("key:abc")
    assert keys.take_ticket(f"ticket={ticket}") == ("key:abc", None)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 62)
    with pytest.raises(errors.Unauthorized):
        keys.take_ticket(f"ticket={ticket}")
    with pytest.raises(errors.Unauthorized):
        ClientKeys(["another"]).take_ticket(f"ticket={ticket}")
    assert ClientKeys([]).take_ticket(f"ticket={ticket}") == (None, f"ticket={ticket}"), "without keys it is a query"


def test_a_ticket_costs_a_key(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    _, relay = keyed
    assert request(relay.port, "POST", "/ticket").status == 401
    assert request(relay.port, "POST", "/ticket", [("x-api-key", "no-key")]).status == 401
