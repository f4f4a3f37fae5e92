"""Client keys: who shows one may call, and nobody else; no key goes upstream or into the log."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from harness import servers
from harness.client import request
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    assert response.status == 401
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
