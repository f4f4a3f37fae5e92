"""The shipped HAProxy and Envoy configurations in front of two relays: streams as they come, and what a relay's end
costs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import pytest
from harness import eventually, servers
from harness.client import Connection, Response, request
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Envoy, Gunicorn, HAProxy
    from harness.upstream import Exchange

EVENTS = [("Content-Type", "text/event-stream")]


class Two(NamedTuple):
    upstream: Upstream
    relays: list[Gunicorn]
    proxy: HAProxy | Envoy

    def ask(self, path: str) -> Connection:
        connection = Connection(self.proxy.port)
        connection.send("POST", "/v1" + path, [("Content-Type", "application/json")], b"{}")
        return connection

    def stream(self, path: str, data: bytes = b"data: 1\n\n") -> tuple[Exchange, Response]:
        """One that has begun with these bytes, at its upstream and at its client."""
        connection = self.ask(path)
        ex = self.upstream.next(path)
        ex.head(headers=EVENTS)
        ex.send(data)
        response = connection.read_head()
        response.read_until(data)
        return ex, response

    def all_get_requests(self) -> bool:
        """Whether each relay is given requests."""
        path = self.upstream.serve(brief)
        for _ in range(4):
            request(self.proxy.port, "POST", "/v1" + path, body=b"{}").finish()
        return all(relay.log().count('"event": "request"') for relay in self.relays)


def refuses(port: int) -> bool:
    with contextlib.closing(socket.socket()) as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def brief(ex: Exchange) -> None:
    ex.head(headers=EVENTS)
    ex.send(b"data: 1\n\n")
    ex.end()


KINDS = (
    "haproxy",
    pytest.param(
        "envoy",
        marks=pytest.mark.skipif(find_spec("envoy") is None, reason="PyPI has Envoy for Linux on x86_64 only"),
    ),
)


@pytest.fixture(params=KINDS, scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def two(kind: str) -> Iterator[Two]:
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(Upstream())
        # As several hosts: the proxy's connections count as the clients', and it names them.
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_DRAIN": "3"}
        relays = [stack.enter_context(servers.gunicorn(env)) for _ in range(2)]
        proxy = stack.enter_context(getattr(servers, kind)([(relay.port, relay.admin_port) for relay in relays]))
        rig = Two(upstream, relays, proxy)
        eventually(rig.all_get_requests, "both relays", 20)
        yield rig


@pytest.fixture(scope="module")
def calm(kind: str) -> Iterator[Two]:
    with two(kind) as rig:
        yield rig


def test_each_event_arrives_before_the_next_is_sent(calm: Two) -> None:
    path = calm.upstream.by_hand()
    with calm.ask(path) as connection:
        ex = calm.upstream.next(path)
        ex.head(headers=EVENTS)
        ex.send(b"data: 0\n\n")
        response = connection.read_head()
        for n in range(5):
            assert response.read_event() == b"data: %d\n\n" % n
            ex.send(b"data: %d\n\n" % (n + 1))
        assert response.header("X-Accel-Buffering") == b"no"
        ex.end()
        assert response.finish().ended == "clean"


def test_a_cut_stays_a_cut(calm: Two) -> None:
    ex, response = calm.stream(calm.upstream.by_hand(), b"data: half")
    ex.abort()
    assert response.finish().ended != "clean"


def test_a_client_that_leaves_ends_the_request_upstream(calm: Two) -> None:
    ex, response = calm.stream(calm.upstream.by_hand())
    response.close()
    ex.wait_gone()


def test_streams_go_to_the_relay_with_fewer(calm: Two, kind: str) -> None:
    path = calm.upstream.by_hand()
    streams = [calm.stream(path)[1] for _ in range(10)]
    counts = [len(json.loads(request(relay.admin_port, "GET", "/streams").finish().data)) for relay in calm.relays]
    for response in streams:
        response.close()
    assert sum(counts) == 10
    # Envoy's slow start weighs the one lighter that was found ready a moment later.
    assert max(counts) - min(counts) <= {"haproxy": 0, "envoy": 2}[kind]


def test_the_logs_lines_are_json_without_the_query(calm: Two) -> None:
    path = calm.upstream.serve(brief)
    request(calm.proxy.port, "POST", f"/v1{path}?prompt=a-secret", body=b"{}").finish()
    calm.proxy.wait_log(path)
    lines = [line for line in calm.proxy.log().splitlines() if path in line]
    assert [json.loads(line)["status"] for line in lines] == [200]
    assert "a-secret" not in calm.proxy.log()


def test_a_relay_that_is_gone_costs_nobody_a_request(kind: str) -> None:
    with two(kind) as rig:
        path = rig.upstream.serve(brief)
        gone, _ = rig.relays
        os.killpg(gone.pid, signal.SIGKILL)
        eventually(lambda: refuses(gone.port), "its port is closed")  # what is still accepted is lost with it
        answers = [request(rig.proxy.port, "POST", "/v1" + path, body=b"{}").finish().data for _ in range(30)]
        assert answers == [b"data: 1\n\n"] * 30
        assert len(rig.upstream.seen(path)) == 30, "none is sent twice"


def test_what_was_sent_is_not_sent_again(kind: str) -> None:
    """The relay dies with a request that its upstream has: whoever asks again would pay twice."""
    with two(kind) as rig:
        path = rig.upstream.by_hand()
        connection = rig.ask(path)
        rig.upstream.next(path)
        for relay in rig.relays:
            os.killpg(relay.pid, signal.SIGKILL)
        answer = connection.read_head()
        assert (answer.status, answer.header("x-should-retry")) == (502, b"false")
        assert json.loads(answer.finish().data)["error"]["code"] == "bad_gateway"
        assert len(rig.upstream.seen(path)) == 1

        nobody: list[Response] = []

        def refused() -> bool:
            nobody[:] = [request(rig.proxy.port, "POST", "/v1" + path, body=b"{}")]
            return nobody[0].status == 503

        eventually(refused, "nobody is there", 20)
        assert nobody[0].header("x-should-retry") == b"true"
        waits = {request(rig.proxy.port, "POST", "/v1" + path, body=b"{}").header("Retry-After") for _ in range(40)}
        assert waits == {b"2", b"3"}
        assert json.loads(nobody[0].finish().data)["error"]["code"] == "bad_gateway"


def test_a_relay_that_drains_gets_nothing_more(kind: str) -> None:
    with two(kind) as rig:
        path = rig.upstream.serve(brief)
        leaving, _ = rig.relays
        by_hand = rig.upstream.by_hand()
        held = [rig.ask(by_hand) for _ in range(2)]  # one at each: the drain lasts
        for _ in held:
            ex = rig.upstream.next(by_hand)
            ex.head(headers=EVENTS)
            ex.send(b"data: 1\n\n")
        leaving.send_signal(signal.SIGTERM)
        rig.proxy.wait_log("DOWN" if kind == "haproxy" else "eject_unhealthy_event", 20)
        before = leaving.log().count('"event": "request"')
        answers = [request(rig.proxy.port, "POST", "/v1" + path, body=b"{}").finish().data for _ in range(20)]
        assert answers == [b"data: 1\n\n"] * 20
        assert leaving.log().count('"event": "request"') == before
        for connection in held:
            connection.close()
