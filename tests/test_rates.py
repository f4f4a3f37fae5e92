"""RELAY_RATE_LIMIT: each client has its budget, is told what is left of it, and gets no second one by a trick."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import TYPE_CHECKING

import pytest
from harness import servers, turns
from harness.client import Client
from harness.upstream import Upstream
from test_floors import modules_after

from relay import errors
from relay.gate.address import payer
from relay.gate.rates import Rates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.client import Response
    from harness.servers import Gunicorn
    from harness.upstream import Exchange

LIMITS = [("RateLimit-Limit", "100"), ("X-RateLimit-Limit", "200"), ("X-RateLimit-Reset", "1767225600")]

_numbers = itertools.count(1)


def address() -> str:
    """A client that no other test is."""
    return f"198.51.100.{next(_numbers)}"


def _answer(ex: Exchange) -> None:
    ex.reply(b"{}", headers=LIMITS)


@pytest.fixture(autouse=True)
def _within_an_hour() -> None:
    turns.within_one(turns.HOUR)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(_answer) as server:
        yield server


@contextlib.contextmanager
def relaying(upstream: Upstream, **settings: str) -> Iterator[tuple[Gunicorn, Client]]:
    env = {f"RELAY_{name.upper()}": value for name, value in settings.items()}
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **env}) as relay, Client(relay.port) as client:
        yield relay, client


@pytest.fixture(scope="module")
def relay(upstream: Upstream) -> Iterator[Client]:
    with relaying(upstream, rate_limit="3/hour", allow="GET x") as (_, client):
        yield client


def get(client: Client, headers: dict[str, str], path: str = "/v1/x") -> Response:
    response = client.request("GET", path, headers)
    response.finish()
    return response


def numbers(response: Response) -> list[int]:
    names = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
    return [int(value) for name in names for value in response.all(name)]


# --- Through gunicorn


def test_a_client_has_its_budget_and_is_told_what_is_left(relay: Client, upstream: Upstream) -> None:
    client = {"X-Forwarded-For": address()}
    for left in (2, 1, 0):
        response = get(relay, client)
        assert response.status == 200
        limit, remaining, reset = numbers(response)  # each once: the upstream's own of this name are gone
        assert (limit, remaining) == (3, left)
        assert 1 <= reset <= 3600
        assert response.all("X-RateLimit-Limit") == [b"200"], "what the upstream says of its own budget comes through"
    before = len(upstream.seen())
    refused = get(relay, client)
    assert refused.status == 429
    assert len(upstream.seen()) == before
    assert refused.header("Content-Type") == b"application/json"
    error = json.loads(refused.body)["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "3 requests in 1 hour" in error["message"]
    limit, remaining, reset = numbers(refused)
    assert (limit, remaining) == (3, 0)
    assert reset <= int(refused.header("Retry-After") or 0) <= reset + 60
    assert reset >= 1


def test_another_client_does_not_feel_it(relay: Client) -> None:
    busy, other = {"X-Forwarded-For": address()}, {"X-Forwarded-For": address()}
    assert [get(relay, busy).status for _ in range(4)] == [200, 200, 200, 429]
    assert get(relay, other).status == 200


def test_health_and_what_is_refused_anyway_cost_nothing(relay: Client) -> None:
    client = {"X-Forwarded-For": address()}
    assert [get(relay, client, path).status for path in ["/health/live"] * 5 + ["/v1/not-allowed"] * 5] == [
        *([200] * 5),
        *([403] * 5),
    ]
    assert numbers(get(relay, client))[1] == 2


@pytest.mark.parametrize("proxies", ["", "192.0.2.1,10.0.0.0/8"], ids=["nobody is trusted", "others are trusted"])
def test_a_spoofed_address_buys_no_new_budget(upstream: Upstream, proxies: str) -> None:
    with relaying(upstream, rate_limit="3/hour", trusted_proxies=proxies) as (_, client):
        statuses = [
            get(client, {"X-Forwarded-For": f"203.0.113.{number}", "X-Real-IP": f"203.0.113.{number}"}).status
            for number in range(6)
        ]
    assert statuses == [200, 200, 200, 429, 429, 429]


def test_what_a_client_writes_left_of_a_proxys_word_buys_no_new_budget(relay: Client) -> None:
    client = address()
    statuses = [get(relay, {"X-Forwarded-For": f"203.0.113.{number}, {client}"}).status for number in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


def test_with_client_keys_each_key_has_a_budget_wherever_it_comes_from(upstream: Upstream) -> None:
    with relaying(upstream, rate_limit="2/hour", client_keys="one,two") as (server, client):
        for _ in range(5):
            assert get(client, {"x-api-key": "wrong"}).status == 401
        statuses = [get(client, {"x-api-key": "one", "X-Forwarded-For": address()}).status for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert get(client, {"Authorization": "Bearer one"}).status == 429
        assert get(client, {"x-api-key": "two"}).status == 200
        server.wait_log('"rate_limit_exceeded"')


@pytest.mark.parametrize(
    ("env", "warned"),
    [
        pytest.param({"RELAY_RATE_LIMIT": "9/hour", "WEB_CONCURRENCY": "2"}, True, id="rate"),
        pytest.param({"RELAY_MAX_STREAMS_PER_CLIENT": "9", "WEB_CONCURRENCY": "2"}, True, id="streams"),
        pytest.param({"RELAY_RATE_LIMIT": "9/hour"}, False, id="one worker"),
        pytest.param({"WEB_CONCURRENCY": "2"}, False, id="no limit"),
        pytest.param(
            {"RELAY_RATE_LIMIT": "9/hour", "WEB_CONCURRENCY": "2", "RELAY_LIMITS_URL": "redis://127.0.0.1:9"},
            False,
            id="shared",
        ),
    ],
)
def test_the_start_says_when_each_worker_counts_for_itself(env: dict[str, str], warned: bool) -> None:
    with servers.gunicorn(env) as server:
        log = server.log()
    assert ("each of the 2 workers counts for itself" in log) is warned
    if warned:
        assert next(name for name in env if name != "WEB_CONCURRENCY") in log


# --- The rules alone


def test_the_shortest_rate_refuses_first_and_costs_nothing_of_the_others() -> None:
    turns.within_one(turns.MINUTE, 5)
    rates = Rates("5/hour; 2/minute", "relay", None)
    assert dict(rates.take("a"))["RateLimit-Limit"] == "2"
    rates.take("a")
    for _ in range(10):
        with pytest.raises(errors.TooMany, match="2 requests in 1 minute"):
            rates.take("a")
    hour = next(rate for rate in rates._rates if rate.amount == 5)
    assert rates._limiter.get_window_stats(hour, rates._name, "a").remaining == 3


def test_the_longer_rate_counts_too() -> None:
    rates = Rates("3/2 hours, 10/second", "relay", None)
    assert [dict(rates.take("a"))["RateLimit-Remaining"] for _ in range(3)] == ["2", "1", "0"]
    with pytest.raises(errors.TooMany, match="3 requests in 2 hours"):
        rates.take("a")


def test_two_relays_in_one_app_have_budgets_of_their_own_in_one_place() -> None:
    one, other = Rates("1/hour", "one", None), Rates("1/hour", "other", None)
    other.__dict__["_limiter"] = one._limiter
    one.take("a")
    other.take("a")


@pytest.mark.parametrize(
    ("address", "whose"),
    [
        pytest.param("203.0.113.7", "203.0.113.7", id="ipv4"),
        pytest.param("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", id="ipv6"),
        pytest.param("2001:db8:1:2::1", "2001:db8:1:2::/64", id="the same network"),
        pytest.param("2001:db8:1:3::1", "2001:db8:1:3::/64", id="the next network"),
        pytest.param("::1", "::/64", id="loopback"),
        pytest.param("fe80::1%eth0", "fe80::/64", id="with a zone"),
        pytest.param("unix", "unix", id="a unix socket"),
        pytest.param("unknown", "unknown", id="nobody knows"),
    ],
)
def test_who_pays(address: str, whose: str) -> None:
    assert payer(address) == whose


# --- Without the library


SHOP = """
from flask import Flask
from relay import Relay
from relay.settings import SettingsError
try:
    Relay(Flask("shop"), url_prefix="/ai", settings={{"RELAY_UPSTREAM_URL": "http://127.0.0.1:9", **{settings}}})
except SettingsError as error:
    assert error.faults == ({fault!r},), error
else:
    raise SystemExit("mounted all the same")
"""


@pytest.mark.parametrize(
    ("settings", "absent", "fault"),
    [
        pytest.param(
            {"RELAY_RATE_LIMIT": "60/minute"},
            "limits",
            "RELAY_RATE_LIMIT = '60/minute': needs the package limits; pip install limits",
            id="limits",
        ),
        pytest.param(
            {"RELAY_MAX_STREAMS_PER_CLIENT": 3, "RELAY_LIMITS_URL": "redis://:secret@h"},
            "redis",
            "RELAY_LIMITS_URL = (not shown): needs the package redis; pip install 'redis<8'",
            id="redis",
        ),
        pytest.param(
            {"RELAY_MAX_STREAMS_PER_CLIENT": 3, "RELAY_LIMITS_URL": "redis://:secret@h/?no_such_option=1"},
            "",
            "RELAY_LIMITS_URL = (not shown): is no URL that redis-py understands",
            id="a URL with an option that redis-py has not",
        ),
        pytest.param(
            {"RELAY_RATE_LIMIT": "3/hour", "RELAY_LIMITS_URL": "redis+cluster://:secret@h/?no_such_option=1"},
            "",
            "RELAY_LIMITS_URL = (not shown): is no URL that redis-py understands",
            id="a cluster with such an option",
        ),
    ],
)
def test_a_shop_without_the_package_is_told_when_it_mounts(
    settings: dict[str, object], absent: str, fault: str
) -> None:
    modules_after(SHOP.format(settings=settings, fault=fault), frozenset({absent} - {""}))


def test_a_shop_that_limits_nothing_loads_neither() -> None:
    loaded = modules_after(
        "from flask import Flask\nfrom relay import Relay\n"
        "Relay(Flask('shop'), url_prefix='/ai', settings={'RELAY_UPSTREAM_URL': 'http://127.0.0.1:9',"
        " 'RELAY_LIMITS_URL': 'redis://h'})\n"
    )
    assert not loaded & {"limits", "redis"}


def test_mounting_with_limits_starts_no_thread_and_opens_no_socket() -> None:
    modules_after(
        "import socket, threading\n"
        "from flask import Flask\n"
        "from relay import Relay\n"
        "def refuse(*args, **kwargs): raise AssertionError('opened something')\n"
        "socket.socket.__init__ = threading.Thread.start = refuse\n"
        "for url in ('memory://', 'redis://127.0.0.1:9', 'redis+unix:///run/redis', 'redis+cluster://127.0.0.1:9',\n"
        "        'redis+sentinel://127.0.0.1:9/name'):\n"
        "    Relay(Flask('shop'), url_prefix='/ai', settings={'RELAY_UPSTREAM_URL': 'http://127.0.0.1:9',\n"
        "        'RELAY_RATE_LIMIT': '9/hour', 'RELAY_MAX_STREAMS_PER_CLIENT': 2, 'RELAY_LIMITS_URL': url})\n"
    )
