"""Limits in Redis: workers and hosts share one budget, a worker's death gives its part back, and without Redis the
relay serves on and says so."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from harness import REPO, eventually, servers, turns
from harness.client import Connection, request
from harness.redis import Redis, redis_server
from harness.upstream import Exchange, Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.client import Response
    from harness.servers import Gunicorn

RATE = 6  # requests an hour
STREAMS = 2  # at a time

_numbers = itertools.count(1)


def address() -> str:
    """A client that no other test is."""
    return f"198.51.100.{next(_numbers)}"


@pytest.fixture(autouse=True)
def _within_an_hour() -> None:
    turns.within_one(turns.HOUR)


#: Where counting is what matters, and not how soon the relay does without Redis.
PATIENT = "shops.patient:app"


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with redis_server() as server:
        yield server


def stream(ex: Exchange) -> None:
    ex.head(headers=[("Content-Type", "text/event-stream")])
    ex.send(b"data: 1\n\n")
    ex.wait_gone(40)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(lambda ex: ex.reply(b"{}")) as server:
        server.serve(stream, "/events")
        yield server


def settings(upstream: Upstream, redis: Redis, **more: str) -> dict[str, str]:
    return {
        "RELAY_UPSTREAM_URL": upstream.base_url,
        "RELAY_LIMITS_URL": redis.url,
        "RELAY_DRAIN": "0",
        "PYTHONPATH": str(REPO / "tests"),
        **{f"RELAY_{name.upper()}": value for name, value in more.items()},
    }


@pytest.fixture(scope="module")
def rated(upstream: Upstream, redis: Redis) -> Iterator[tuple[Gunicorn, Gunicorn]]:
    """Two hosts with one rate; the second has two workers."""
    env = settings(upstream, redis, rate_limit=f"{RATE}/hour")
    with servers.gunicorn(env, PATIENT) as one, servers.gunicorn(env | {"WEB_CONCURRENCY": "2"}, PATIENT) as other:
        yield one, other


@pytest.fixture(scope="module")
def limited(upstream: Upstream, redis: Redis) -> Iterator[tuple[Gunicorn, Gunicorn]]:
    """Two hosts with so many streams for a client."""
    env = settings(upstream, redis, max_streams_per_client=str(STREAMS))
    with servers.gunicorn(env, PATIENT) as one, servers.gunicorn(env, PATIENT) as other:
        yield one, other


def get(relay: Gunicorn, client: str, path: str = "/v1/x") -> Response:
    response = request(relay.port, "GET", path, {"X-Forwarded-For": client})
    response.finish()
    return response


def open_stream(relay: Gunicorn, client: str) -> Response:
    """A stream whose first event is there, or a refusal."""
    connection = Connection(relay.port)
    connection.send("GET", "/v1/events", {"X-Forwarded-For": client, "Accept": "text/event-stream"})
    response = connection.read_head()
    if response.status == 200:
        assert response.read_event() == b"data: 1\n\n"
    return response


def status_of_a_stream(relay: Gunicorn, client: str) -> int:
    response = open_stream(relay, client)
    response.close()
    return response.status


def metric(relay: Gunicorn, name: str) -> float:
    text = request(relay.admin_port, "GET", "/metrics").finish().data.decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def streams_in(redis: Redis, client: str) -> int:
    """How many streams of a client stand in this Redis."""
    import redis as library

    with library.Redis(redis.host, redis.port) as look:
        return int(look.zcard(f"relay:streams:relay:{client}"))


# --- One budget


def test_two_hosts_share_one_rate(rated: tuple[Gunicorn, Gunicorn]) -> None:
    client = address()
    left = []
    for relay in itertools.islice(itertools.cycle(rated), RATE):
        response = get(relay, client)
        assert response.status == 200
        left.append(int(response.header("RateLimit-Remaining") or -1))
    assert left == list(range(RATE - 1, -1, -1))
    for relay in rated:
        refused = get(relay, client)
        assert refused.status == 429
        assert json.loads(refused.body)["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.header("Retry-After") or 0) <= 2 * 3600
    assert get(rated[0], address()).status == 200, "the others do not feel it"


def test_two_hosts_share_one_number_of_streams(limited: tuple[Gunicorn, Gunicorn]) -> None:
    client = address()
    held = [open_stream(relay, client) for relay in limited]
    assert [response.status for response in held] == [200, 200]
    for relay in limited:
        refused = open_stream(relay, client)
        assert refused.status == 429
        assert json.loads(refused.finish().data)["error"]["code"] == "too_many_streams"
        assert refused.header("Retry-After") == b"1"
    assert status_of_a_stream(limited[0], address()) == 200, "the others do not feel it"
    held[0].close()
    eventually(lambda: status_of_a_stream(limited[1], client) == 200, "the slot of one host is free at the other")
    held[1].close()


def test_requests_one_after_another_are_never_too_many(limited: tuple[Gunicorn, Gunicorn]) -> None:
    """Slots are given back behind the response, and the next request may come sooner.

    At one host: how soon Redis hears of it from the other is for that one's machine to say.
    """
    client = address()
    first = open_stream(limited[0], client)
    for relay in limited:
        eventually(lambda relay=relay: get(relay, client).status == 200, "the slot of the host before")
        assert [get(relay, client).status for _ in range(20)] == [200] * 20
    first.close()


def test_addresses_of_one_ipv6_network_are_one_client(rated: tuple[Gunicorn, Gunicorn]) -> None:
    for number in range(RATE):
        assert get(rated[0], f"2001:db8:0:7:{number:x}::1").status == 200
    assert get(rated[1], "2001:db8:0:7:ffff::9").status == 429
    assert get(rated[1], "2001:db8:0:8::1").status == 200


# --- A burst


def test_a_burst_of_one_client_is_counted_whole(upstream: Upstream, redis: Redis) -> None:
    """While Redis answers, nobody passes uncounted because others are being counted."""
    client, other = address(), address()
    env = settings(upstream, redis, rate_limit="10/minute")
    # How long Redis takes for an answer is this machine's affair, and not what this is about.
    env["RELAY_LIMITS_URL"] += "?socket_timeout=20&socket_connect_timeout=20"
    with servers.gunicorn(env) as relay:
        connections = [Connection(relay.port) for _ in range(600)]
        for connection in connections:
            connection.send("GET", "/v1/x", {"X-Forwarded-For": client})
        statuses = Counter(connection.read_head().status for connection in connections)
        assert statuses[200] == 10, statuses
        assert set(statuses) <= {200, 429, 503}, statuses
        assert [get(relay, other).status for _ in range(11)] == [200] * 10 + [429]
        assert metric(relay, "relay_limits_errors_total") == 0
        assert "limits_away" not in relay.log()
        for connection in connections:
            connection.close()


def test_who_waits_too_long_for_a_turn_is_refused_and_not_let_through(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(
        "import relay.shared.redis\n"
        "relay.shared.redis._AT_ONCE, relay.shared.redis._TURN, relay.shared.redis._WAIT = 1, 1.0, 30.0\n"
        "from wsgi import app\n"
    )
    with redis_server() as redis:
        env = settings(upstream, redis, rate_limit="9/hour") | {"PYTHONPATH": str(tmp_path)}
        with servers.gunicorn(env, "busy:app") as relay, Connection(relay.port) as one, Connection(relay.port) as other:
            assert get(relay, address()).status == 200
            redis.hang()
            for connection in (one, other):
                connection.send("GET", "/v1/x", {"X-Forwarded-For": address()})
            eventually(lambda: metric(relay, 'relay_refused_total{reason="full"}') == 1, "one of them is refused")
            redis.go_on()
            served, refused = sorted((one.read_head(), other.read_head()), key=lambda response: response.status)
            assert (served.status, refused.status) == (200, 503)
            assert json.loads(refused.finish().data)["error"]["code"] == "full"
            assert refused.header("Retry-After") == b"1"
            assert metric(relay, "relay_limits_errors_total") == 0


# --- A death


def test_a_host_that_was_killed_gives_its_streams_back(
    limited: tuple[Gunicorn, Gunicorn], upstream: Upstream, redis: Redis
) -> None:
    """Its leases run out, and only its own: those of the living are renewed."""
    client, other = address(), address()
    kept = [open_stream(limited[0], other) for _ in range(STREAMS)]
    with servers.gunicorn(settings(upstream, redis, max_streams_per_client=str(STREAMS)), PATIENT) as dying:
        held = [open_stream(dying, client) for _ in range(STREAMS)]
        assert [response.status for response in held] == [200] * STREAMS
        assert status_of_a_stream(limited[0], client) == 429
        os.killpg(dying.pid, signal.SIGKILL)
        assert status_of_a_stream(limited[0], client) == 429
        eventually(lambda: status_of_a_stream(limited[0], client) == 200, "its leases have run out", 20, 0.2)
    assert status_of_a_stream(limited[1], other) == 429, "a stream that lives longer than a lease keeps its place"
    for response in kept:
        response.close()


# --- Without Redis


def test_without_redis_each_worker_counts_by_itself_and_metric_and_log_say_so(upstream: Upstream) -> None:
    client, other, third = address(), address(), address()
    with redis_server() as redis:
        env = settings(upstream, redis, rate_limit="3/hour", max_streams_per_client="2")
        with servers.gunicorn(env, PATIENT) as relay:  # a connection is refused at once
            metrics = request(relay.admin_port, "GET", "/metrics").finish().data
            assert b"\nrelay_limits_errors_total 0.0\n" in metrics, "before the first request"
            assert [get(relay, client).status for _ in range(4)] == [200] * 3 + [429]
            held = [open_stream(relay, other)]
            assert metric(relay, "relay_limits_errors_total") == 0

            redis.stop()
            held.append(open_stream(relay, other))
            refused = open_stream(relay, other)
            assert json.loads(refused.finish().data)["error"]["code"] == "too_many_streams"
            assert [response.status for response in (*held, refused)] == [200, 200, 429], "the first one counts, too"
            counted = [get(relay, client) for _ in range(4)]
            assert [response.status for response in counted] == [200] * 3 + [429]
            assert [response.header("RateLimit-Remaining") for response in counted] == [b"2", b"1", b"0", b"0"]
            assert metric(relay, "relay_limits_errors_total") >= 8
            assert relay.log().count('"limits_away"') == 1
            assert "limits_back" not in relay.log()

            redis.start_again()
            eventually(lambda: bool(get(relay, third) and '"limits_back"' in relay.log()), "it is there again")
            assert [get(relay, client).status for _ in range(4)] == [200] * 3 + [429], "a new Redis has no memory"
            held[0].close()
            eventually(lambda: streams_in(redis, other) == 1, "what began without Redis is counted now")
            held[1].close()

            redis.stop()
            eventually(lambda: bool(get(relay, third) and relay.log().count('"limits_away"') == 2), "said again")


def test_without_redis_workers_share_out_the_limits(upstream: Upstream) -> None:
    client, other = address(), address()
    with redis_server() as redis:
        env = settings(upstream, redis, rate_limit="40/hour", max_streams_per_client="5") | {"WEB_CONCURRENCY": "2"}
        with servers.gunicorn(env, PATIENT) as relay:
            assert get(relay, client).header("RateLimit-Limit") == b"40"
            redis.stop()
            held: list[Response] = []

            def hold_one_more() -> bool:
                response = open_stream(relay, client)
                if response.status == 200:
                    held.append(response)
                return len(held) == 4  # 5 are 2 for each of 2 workers

            eventually(hold_one_more, "both workers have their share")
            assert {response.header("RateLimit-Limit") for response in held} == {b"20"}
            for number in range(12):
                refused = open_stream(relay, client)
                code = json.loads(refused.finish().data)["error"]["code"]
                assert (refused.status, code) == (429, "too_many_streams"), number
            for response in held:
                response.close()
            connections = []  # kept, so that each worker has its part of them
            statuses: Counter[int] = Counter()
            bodies = []

            def ask_once_more() -> None:
                connections.append(Connection(relay.port))
                connections[-1].send("GET", "/v1/x", {"X-Forwarded-For": other})
                response = connections[-1].read_head()
                bodies.append(response.finish().data)
                statuses[response.status] += 1

            def both_have_counted() -> bool:
                ask_once_more()
                return statuses[200] == 40

            eventually(both_have_counted, "each worker lets 20 through")
            for _ in range(60):
                ask_once_more()
            assert statuses[200] == 40
            assert set(statuses) == {200, 429}
            for connection in connections:
                connection.close()
            assert any(b"20 requests in 1 hour (RELAY_RATE_LIMIT, shared out" in body for body in bodies)
            assert '"workers": 2' in relay.log()


def test_a_redis_that_hangs_holds_nobody_for_long(upstream: Upstream) -> None:
    client = address()
    with redis_server() as redis:
        env = settings(upstream, redis, rate_limit="1/hour", max_streams_per_client="1")
        with servers.gunicorn(env) as relay:
            assert get(relay, client).status == 200
            redis.hang()
            took = []
            began = time.monotonic()
            while time.monotonic() - began < 2.5:  # over more than one pause, so that it is tried again
                at = time.monotonic()
                assert get(relay, client).status in (200, 429), "counted by the worker itself"
                took.append(time.monotonic() - at)
            assert max(took) < 5, "its connection, and once an answer"
            redis.go_on()
            eventually(lambda: get(relay, client).status == 429, "counted again")


def test_redis_need_not_be_there_when_the_relay_starts(upstream: Upstream) -> None:
    env = {
        "RELAY_UPSTREAM_URL": upstream.base_url,
        "RELAY_RATE_LIMIT": "1/hour",
        "RELAY_LIMITS_URL": f"redis://:the-password@127.0.0.1:{servers.free_port()}",
    }
    with servers.gunicorn(env) as relay:
        assert [get(relay, address()).status for _ in range(3)] == [200] * 3
        assert '"limits_away"' in relay.log()
        assert "the-password" not in relay.log()


# --- Another server


#: The service in a world where the name redis.test is the address that stands in a file.
MOVING = """
import socket
from pathlib import Path
look_up = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    return look_up(Path({file!r}).read_text() if host == "redis.test" else host, *args, **kwargs)
socket.getaddrinfo = getaddrinfo
from wsgi import app
"""


def test_a_planned_switch_to_a_replica_is_followed_within_seconds(upstream: Upstream, tmp_path: Path) -> None:
    """The old master lives on, with all its connections, and answers READONLY."""
    import redis as library

    (tmp_path / "address").write_text("127.0.0.1")
    (tmp_path / "moving.py").write_text(MOVING.format(file=str(tmp_path / "address")))
    spent, held, fresh = address(), address(), address()
    with redis_server() as old, redis_server("127.0.0.2", old.port) as new:
        env = settings(upstream, old, rate_limit="3/hour", max_streams_per_client="1") | {"PYTHONPATH": str(tmp_path)}
        env["RELAY_LIMITS_URL"] = f"redis://redis.test:{old.port}/0"
        with (
            servers.gunicorn(env, "moving:app") as relay,
            library.Redis(old.host, old.port) as master,
            library.Redis(new.host, new.port) as replica,
        ):
            assert [get(relay, spent).status for _ in range(4)] == [200] * 3 + [429]
            stream = open_stream(relay, held)
            replica.config_set("replica-announce-ip", new.host)
            replica.replicaof(old.host, old.port)
            eventually(lambda: replica.info("replication")["master_link_status"] == "up", "they are in step")
            master.execute_command("FAILOVER", "TO", new.host, new.port)
            eventually(lambda: replica.info("replication")["role"] == "master", "the roles are changed")
            get(relay, fresh)
            relay.wait_log('"limits_away"')
            assert "ReadOnlyError" in relay.log()
            (tmp_path / "address").write_text("127.0.0.2")
            began = time.monotonic()
            eventually(lambda: get(relay, fresh).header("RateLimit-Limit") == b"3", "counted again", every=0.2)
            eventually(lambda: '"limits_back"' in relay.log(), "and the log says so")
            assert time.monotonic() - began < 5
            assert get(relay, spent).status == 429, "what was counted before the switch has come along"
            eventually(lambda: status_of_a_stream(relay, held) == 429, "and so has a stream", every=0.2)
            stream.close()


def test_a_redis_that_is_loading_is_asked_again(upstream: Upstream) -> None:
    import redis as library
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    def is_loading(data: library.Redis) -> bool:
        try:
            data.ping()
        except library.exceptions.BusyLoadingError:
            return True
        except library.ConnectionError:
            pass  # it does not listen yet
        return False

    with redis_server() as redis, servers.gunicorn(settings(upstream, redis, rate_limit="2/hour"), PATIENT) as relay:
        client = address()
        assert [get(relay, client).status for _ in range(3)] == [200, 200, 429]
        with library.Redis(port=redis.port) as data:
            data.mset({f"other:{number}": number for number in range(2000)})
            data.save()
        redis.stop(signal.SIGKILL)
        redis.begin("--key-load-delay", "2000", "--loading-process-events-interval-bytes", "1024")  # 4 s
        with library.Redis(port=redis.port, retry=Retry(NoBackoff(), 0)) as data:
            eventually(lambda: is_loading(data), "it is loading", every=0.05)
            assert get(relay, client).status == 200
            assert "BusyLoadingError" in relay.log()
            assert is_loading(data)
        eventually(lambda: get(relay, client).status == 429, "counted again, with what had been saved", every=0.2)


# --- What stands in Redis


def test_nothing_stays_in_redis_and_no_key_is_ever_in_it(upstream: Upstream) -> None:
    import redis as library

    with redis_server() as redis:
        env = settings(upstream, redis, rate_limit="9/hour", max_streams_per_client="3", client_keys="the-secret")
        with servers.gunicorn(env, PATIENT) as relay, library.Redis(port=redis.port, decode_responses=True) as look:
            connection = Connection(relay.port)
            connection.send("GET", "/v1/events", {"x-api-key": "the-secret", "Accept": "text/event-stream"})
            response = connection.read_head()
            response.read_event()
            names = look.keys()
            assert len([name for name in names if name.startswith("relay:streams:relay:key:")]) == 1
            assert not [name for name in names if "the-secret" in name]
            assert [name for name in names if look.ttl(name) < 0] == [], "each runs out by itself"
            response.close()
            eventually(lambda: look.keys("relay:streams:*") == [], "the lease is given back")


# --- Under plain threads


def test_plain_threads_share_the_budget_too(upstream: Upstream, redis: Redis, tmp_path: Path) -> None:
    """A shop under gunicorn's threads: leases are renewed and given back by a thread."""
    (tmp_path / "shop.py").write_text(
        "import relay.shared.redis\nfrom flask import Flask\nfrom relay import Relay\n"
        "relay.shared.redis._WAIT = 8.0\n"  # as in shops.patient
        "app = Flask(__name__)\n"
        f"Relay(app, url_prefix='/v1', settings={{'RELAY_UPSTREAM_URL': {upstream.base_url!r},\n"
        f"    'RELAY_LIMITS_URL': {redis.url!r}, 'RELAY_RATE_LIMIT': '50/hour', 'RELAY_MAX_STREAMS_PER_CLIENT': 1,\n"
        "    'RELAY_MAX_STREAMS': 4}, name='shop')\n"
    )
    client, other = address(), address()
    args = ["-k", "gthread", "--threads", "8", "--workers", "2"]
    with servers.gunicorn({"PYTHONPATH": str(tmp_path)}, "shop:app", None, args, ready=None) as shop:
        first = open_stream(shop, client)
        assert (first.status, first.header("RateLimit-Remaining")) == (200, b"49")
        assert status_of_a_stream(shop, client) == 429
        first.close()
        eventually(lambda: status_of_a_stream(shop, client) == 200, "given back", every=0.3)
        assert [get(shop, other).status for _ in range(51)] == [200] * 50 + [429]
