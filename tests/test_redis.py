"""Limits in Redis: workers and hosts share one budget, a worker's death gives its part back, and without Redis the
relay serves on and says so."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from harness import REPO, eventually, servers, turns
from harness.authority import Authority
from harness.client import Connection, request
from harness.redis import Redis, cli, redis_cluster, redis_sentinel, redis_server
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
        assert 1 <= int(refused.header("Retry-After") or 0) <= 2 * 3600 + 60
    assert get(rated[0], address()).status == 200, "the others do not feel it"


def test_two_hosts_share_one_number_of_streams(limited: tuple[Gunicorn, Gunicorn]) -> None:
    client = address()
    held = [open_stream(relay, client) for relay in limited]
    assert [response.status for response in held] == [200, 200]
    for relay in limited:
        refused = open_stream(relay, client)
        assert refused.status == 429
        assert json.loads(refused.finish().data)["error"]["code"] == "too_many_streams"
        assert refused.header("Retry-After") in (b"1", b"2")
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
            assert refused.header("Retry-After") in (b"1", b"2")
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
            # The master may know it a moment later.
            eventually(
                lambda: master.info("replication").get("slave0", {}).get("state") == "online", "and both know it"
            )
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


def test_a_name_that_moves_is_followed_although_its_old_server_still_answers(
    upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "address").write_text("127.0.0.1")
    (tmp_path / "moving.py").write_text(MOVING.format(file=str(tmp_path / "address")))
    client = address()
    with redis_server() as old, redis_server("127.0.0.2", old.port) as new:
        env = settings(upstream, old, rate_limit="9000/hour") | {"PYTHONPATH": str(tmp_path)}
        env["RELAY_LIMITS_URL"] = f"redis://redis.test:{old.port}/0?socket_timeout=20&socket_connect_timeout=20"
        with servers.gunicorn(env, "moving:app") as relay:
            get(relay, client)
            assert (len(names_in(old)), names_in(new)) == (1, [])
            (tmp_path / "address").write_text("127.0.0.2")
            began = time.monotonic()
            eventually(lambda: bool(get(relay, client)) and names_in(new) != [], "counted there", every=0.1)
            assert time.monotonic() - began < 5
            assert metric(relay, "relay_limits_errors_total") == 0, "and nothing was lost on the way"


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


# --- Several servers


def test_a_cluster_counts_for_all_and_a_slot_that_moves_is_followed(upstream: Upstream) -> None:
    from redis.cluster import ClusterNode, RedisCluster

    clients = [address() for _ in range(8)]
    with redis_cluster() as nodes, RedisCluster(startup_nodes=[ClusterNode(nodes[0].host, nodes[0].port)]) as look:
        env = settings(upstream, nodes[0], rate_limit="3/hour", max_streams_per_client="1")
        dead = f"127.0.0.1:{servers.free_port()}"
        env["RELAY_LIMITS_URL"] = f"redis+cluster://{dead},{nodes[1].host}:{nodes[1].port}"
        with servers.gunicorn(env, PATIENT) as one, servers.gunicorn(env, PATIENT) as other:
            for relay in (one, other):  # the dead node is asked first, and next another
                eventually(lambda relay=relay: has_counted(relay, clients[0]), "it has found the cluster", every=0.2)
                relay.wait_log('"limits_back"')
            held = [open_stream(one, client) for client in clients[1:]]
            assert {response.status for response in held} == {200}
            keys = [f"relay:streams:relay:{client}" for client in clients[1:]]
            assert len({look.get_node_from_key(key).name for key in keys}) == 3, "they lie on all nodes"
            renewed(look, keys)
            for client in clients[1:]:
                assert json.loads(open_stream(other, client).finish().data)["error"]["code"] == "too_many_streams"
            for response in held:
                response.close()
            eventually(lambda: not any(look.exists(key) for key in keys), "the leases are given back")
            assert one.log().count('"limits_away"') == 1, "the dead node"

            for client in clients[1:]:  # the third and the fourth request of each
                assert [get(relay, client).status for relay in (one, other)] == [200, 429]
            spent = clients[1]
            (key,) = (name for node in nodes for name in names_in(node) if f"/{spent}/" in name)
            move(look, look.keyslot(key), nodes)
            one.mark()
            began = time.monotonic()
            get(one, spent)
            assert '"limits_away"' in one.log_since_mark()
            assert "MovedError" in one.log_since_mark()
            eventually(lambda: '"limits_back"' in one.log_since_mark() or not get(one, spent), "found", every=0.2)
            assert get(one, spent).status == 429, "what was counted has come along"
            assert time.monotonic() - began < 5


def test_a_cluster_that_hangs_holds_nobody_for_long(upstream: Upstream) -> None:
    """Also those who came before it hung: they wait for one node each, and not for all in turn."""
    client = address()
    with redis_cluster() as nodes:
        env = settings(upstream, nodes[0], rate_limit="50/hour")
        env["RELAY_LIMITS_URL"] = f"redis+cluster://{nodes[0].host}:{nodes[0].port}"
        with servers.gunicorn(env) as relay, contextlib.ExitStack() as stack:
            eventually(lambda: get(relay, client).header("RateLimit-Limit") == b"50", "it has found the cluster")
            connections = [stack.enter_context(Connection(relay.port)) for _ in range(60)]
            for node in nodes:
                node.hang()
            began = time.monotonic()
            for connection in connections:
                connection.send("GET", "/v1/x", {"X-Forwarded-For": client})
            assert {connection.read_head().status for connection in connections} <= {200, 429}
            assert time.monotonic() - began < 5
            relay.wait_log('"limits_away"')
            for node in nodes:
                node.go_on()
            eventually(lambda: bool(get(relay, client)) and '"limits_back"' in relay.log(), "it is back", every=0.2)


def test_leases_of_several_clients_are_renewed_where_no_command_takes_several_keys(upstream: Upstream) -> None:
    """A cluster of one node, which a plain URL reaches."""
    from redis import Redis as Client

    clients = [address() for _ in range(4)]
    with (
        redis_cluster(1) as (node,),
        Client(node.host, node.port) as look,
        servers.gunicorn(settings(upstream, node, max_streams_per_client="1"), PATIENT) as relay,
    ):
        held = [open_stream(relay, client) for client in clients]
        renewed(look, [f"relay:streams:relay:{client}" for client in clients])
        assert [status_of_a_stream(relay, client) for client in clients] == [429] * 4
        for response in held:
            response.close()
        eventually(lambda: names_in(node) == [], "the leases are given back")
        assert metric(relay, "relay_limits_errors_total") == 0


def test_a_master_that_dies_is_left_for_the_one_that_sentinels_name(upstream: Upstream) -> None:
    spent, fresh = address(), address()
    with redis_server() as master, redis_server() as replica:
        cli(replica, "REPLICAOF", master.host, str(master.port))
        with redis_sentinel(master) as sentinel:
            env = settings(upstream, master, rate_limit="3/hour")
            dead = f"127.0.0.1:{servers.free_port()}"
            env["RELAY_LIMITS_URL"] = f"redis+sentinel://{dead},{sentinel.host}:{sentinel.port}/mymaster/0"
            with servers.gunicorn(env, PATIENT) as relay:
                assert [get(relay, spent).status for _ in range(4)] == [200] * 3 + [429]
                assert len(names_in(master)) == 1
                eventually(lambda: names_in(replica) == names_in(master), "they are in step")
                eventually(lambda: "slaves=1" in cli(sentinel, "INFO", "sentinel"), "the Sentinel knows both")
                master.stop(signal.SIGKILL)
                get(relay, fresh)
                relay.wait_log('"limits_away"')
                eventually(
                    lambda: bool(get(relay, fresh)) and '"limits_back"' in relay.log(), "counted again", 60, every=0.2
                )
                assert get(relay, spent).status == 429, "what was counted has come along"


def test_tls_is_spoken_with_one_server_and_with_a_cluster(upstream: Upstream, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    authority.issue("redis", "DNS:localhost,IP:127.0.0.1")
    tls = servers.free_port()
    options = ["--tls-port", str(tls), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(authority.certificate)]
    options += ["--tls-cert-file", str(tmp_path / "redis.pem"), "--tls-key-file", str(tmp_path / "redis.key")]
    with redis_server(options=options) as redis:
        for scheme in ("rediss", "rediss+cluster"):
            client = address()
            env = settings(upstream, redis, rate_limit="2/hour")
            env["RELAY_LIMITS_URL"] = f"{scheme}://localhost:{tls}/0?ssl_ca_certs={authority.certificate}"
            with servers.gunicorn(env, PATIENT) as relay:
                assert [get(relay, client).status for _ in range(3)] == [200, 200, 429]
                said = "Cluster mode is not enabled" if "cluster" in scheme else ""
                assert said in relay.log()
            assert len(names_in(redis)) == 1


def has_counted(relay: Gunicorn, client: str) -> bool:
    get(relay, client)
    return '"limits_back"' in relay.log()


def names_in(redis: Redis) -> list[str]:
    return cli(redis, "KEYS", "*").split()


def renewed(look: Any, keys: list[str]) -> None:
    """Wait until each of these sets, of one lease each, lasts longer than it did."""
    ends = {key: look.zrange(key, 0, -1, withscores=True) for key in keys}
    assert {len(leases) for leases in ends.values()} == {1}, ends
    for key, [(lease, end)] in ends.items():
        eventually(lambda key=key, lease=lease, end=end: (look.zscore(key, lease) or 0) > end, f"{key} is renewed")


def move(look: Any, slot: int, nodes: list[Redis]) -> None:
    """Let another node of the cluster have this slot and what is in it."""
    owner = look.nodes_manager.get_node_from_slot(slot)
    (source,) = (node for node in nodes if node.port == owner.port)
    target = next(node for node in nodes if node is not source)
    ids = {node: cli(node, "CLUSTER", "MYID").strip() for node in nodes}
    cli(target, "CLUSTER", "SETSLOT", str(slot), "IMPORTING", ids[source])
    cli(source, "CLUSTER", "SETSLOT", str(slot), "MIGRATING", ids[target])
    for key in cli(source, "CLUSTER", "GETKEYSINSLOT", str(slot), "100").split():
        assert cli(source, "MIGRATE", target.host, str(target.port), key, "0", "5000").strip() == "OK"
    for node in (target, source, *nodes):
        cli(node, "CLUSTER", "SETSLOT", str(slot), "NODE", ids[target])


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
