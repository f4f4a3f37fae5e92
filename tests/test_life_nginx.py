"""What nginx in front could change in a stream's life: leaving, heartbeats, cuts, error frames, backpressure.

The shipped configuration; only numbers are replaced where a test would take a minute otherwise.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest
from harness import eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream
from test_life import EVENTS, HEARTBEAT, Rig, endless, frame, gone, mute, silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Nginx
    from harness.upstream import Exchange

#: nginx gives up on a relay that is silent for so long: for longer than a heartbeat may be late.
IMPATIENT = {"proxy_read_timeout 660s": "proxy_read_timeout 2500ms"}


@contextlib.contextmanager
def behind_nginx(replace: dict[str, str] | None = None, **settings: str) -> Iterator[tuple[Rig, Nginx]]:
    env = {f"RELAY_{name.upper()}": value for name, value in settings.items()}
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **env}) as relay:
        rig = Rig(upstream, relay)
        with servers.nginx(relay.port, relay.admin_port, replace=replace) as proxy:
            rig.port = proxy.port
            yield rig, proxy


@pytest.fixture(scope="module")
def quiet() -> Iterator[Rig]:
    """No heartbeats, no hold: nothing of the relay's own keeps a connection busy."""
    with behind_nginx(heartbeat="0", hold="0") as (rig, _):
        yield rig


@pytest.fixture(scope="module")
def impatient() -> Iterator[Rig]:
    with behind_nginx(IMPATIENT, heartbeat="0.3", hold="0.3") as (rig, _):
        yield rig


# --- Leaving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("handler", [silent, mute], ids=["a silent stream", "no answer yet"])
def test_a_client_that_leaves_ends_the_upstream_request_while_it_is_silent(quiet: Rig, handler, leave: str) -> None:
    path = quiet.upstream.serve(handler)
    name = f"leave-{leave}-{handler.__name__}"
    connection = quiet.ask(path, [("X-Request-ID", name)])
    ex = quiet.upstream.next(path)
    if handler is silent:
        connection.read_head().read_until(b"data: 1\n\n")
    getattr(connection, leave)()
    gone(ex)
    assert quiet.ended(name)["reason"] == "client_gone"
    quiet.no_stream_open()


def test_50_clients_that_leave_at_once_leave_nothing_open(quiet: Rig) -> None:
    path = quiet.upstream.serve(silent)
    connections = [quiet.ask(path) for _ in range(50)]
    for connection in connections:
        connection.read_head().read_until(b"data: 1\n\n")
    for connection in connections:
        connection.close()
    for ex in quiet.upstream.seen(path):
        gone(ex)
    quiet.no_stream_open()


# --- Silence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [True, False], ids=["in a stream", "before the answer"])
def test_heartbeats_keep_a_proxy_that_is_impatient_from_giving_up(impatient: Rig, answered: bool) -> None:
    """For longer than nginx waits for a byte."""
    path = impatient.upstream.by_hand()
    connection = impatient.ask(path)
    ex = impatient.upstream.next(path)
    if answered:
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
    response = connection.read_head()
    began = time.monotonic()
    response.read_until(lambda body: body.endswith(HEARTBEAT) and time.monotonic() - began > 4)
    if not answered:
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
    ex.send(b"data: 2\n\n")
    ex.end()
    body = response.finish()
    assert (body.data.replace(HEARTBEAT, b""), body.ended) == (b"data: 1\n\ndata: 2\n\n", "clean")


def test_without_heartbeats_that_proxy_gives_up_and_the_client_sees_a_cut() -> None:
    """The other way round: it is the heartbeats that do it."""
    with behind_nginx(IMPATIENT, heartbeat="0") as (rig, _):
        path = rig.upstream.serve(silent)
        body = rig.ask(path).read_head().finish()
        assert (body.data, body.ended) == (b"data: 1\n\n", "cut")
        gone(rig.upstream.next(path))
        rig.no_stream_open()


# --- Ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abort", "reset"])
@pytest.mark.parametrize(
    ("headers", "sent", "framed"),
    [
        pytest.param(EVENTS, b"data: 1\n\n", True, id="at an event boundary"),
        pytest.param(EVENTS, b"", True, id="before any event"),
        pytest.param(EVENTS, b"data: 1\n\ndata: ha", False, id="inside an event"),
        pytest.param([("Content-Type", "application/json")], b'{"half": ', False, id="JSON"),
    ],
)
def test_a_cut_is_a_cut_behind_nginx_and_the_error_frame_comes_before_it(
    quiet: Rig, headers: list[tuple[str, str]], sent: bytes, framed: bool, how: str
) -> None:
    path = quiet.upstream.by_hand()
    connection = quiet.ask(path)
    ex = quiet.upstream.next(path)
    ex.head(headers=headers)
    ex.send(sent)
    response = connection.read_head()
    response.read_exactly(len(sent))
    getattr(ex, how)()
    body = response.finish()
    assert body.ended == "cut", body
    if framed:
        assert body.data.startswith(sent + b"event: error\n")
        assert frame(body.data)["code"] == "upstream_cut"
    else:
        assert body.data == sent


def test_a_body_of_known_length_that_is_cut_is_a_cut(quiet: Rig) -> None:
    path = quiet.upstream.by_hand()
    connection = quiet.ask(path)
    ex = quiet.upstream.next(path)
    ex.head(headers=[("Content-Type", "application/json")], framing="length", length=100)
    ex.send(b'{"half": ')
    response = connection.read_head()
    assert response.header("Content-Length") == b"100"
    ex.abort()
    body = response.finish()
    assert (body.data, body.ended) == (b'{"half": ', "cut")


def test_an_idle_timeouts_error_frame_arrives() -> None:
    with behind_nginx(heartbeat="0.2", idle_timeout="2.5") as (rig, _):
        path = rig.upstream.serve(silent)
        body = rig.ask(path, [("X-Request-ID", "idle")]).read_head().finish()
        assert body.ended == "cut"
        assert body.data.startswith(b"data: 1\n\n" + HEARTBEAT)
        assert frame(body.data)["code"] == "idle_timeout"
        assert rig.ended("idle")["reason"] == "idle_timeout"


def test_a_connection_to_the_relay_is_used_again_after_a_whole_stream_and_not_after_a_cut_one(quiet: Rig) -> None:
    """A cut must not leave nginx with a connection in the middle of a body."""
    for ending in ("end", "abort", "end"):
        path = quiet.upstream.by_hand()
        connection = quiet.ask(path)
        ex = quiet.upstream.next(path)
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
        getattr(ex, ending)()
        body = connection.read_head().finish()
        assert body.data.startswith(b"data: 1\n\n")
        assert body.ended == ("clean" if ending == "end" else "cut")
        assert request(quiet.port, "GET", "/health/live").status == 200


# --- Clients that do not read ---------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_stops_the_upstream_and_loses_nothing() -> None:
    events = [b"data: %d %b\n\n" % (n, b"x" * 32_000) for n in range(1500)]

    def long(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        for event in events:
            ex.send(event)
        ex.end()

    with behind_nginx(heartbeat="0", hold="0") as (rig, _):
        path = rig.upstream.serve(long)
        connection = Connection(rig.port, rcvbuf=8192)
        connection.send("POST", "/v1" + path)
        ex = rig.upstream.next(path)
        before = -1

        def standing_still() -> bool:
            nonlocal before
            same, before = ex.written == before, ex.written
            return same

        eventually(standing_still, "the upstream stands still", every=0.5)
        print(f"the upstream stood still after {before / 1e6:.1f} MB")
        # The kernel's buffers of three connections hold some megabytes each; neither nginx nor the relay adds any.
        assert 0 < before < 40_000_000
        body = connection.read_head().finish(deadline=30)
        assert body.ended == "clean"
        assert body.data == b"".join(events)


@pytest.mark.parametrize("whose", ["the relay's", "nginx's"])
def test_a_client_that_takes_nothing_is_gone_after_the_write_timeout(whose: str) -> None:
    """Whichever of the two loses its patience first, both let go of it, and so does the upstream."""
    mine = whose == "the relay's"
    replace = None if mine else {"send_timeout 60s": "send_timeout 1s"}
    with behind_nginx(replace, heartbeat="0.3", write_timeout="1" if mine else "60") as (rig, proxy):
        path = rig.upstream.serve(endless)
        connection = Connection(rig.port, rcvbuf=8192)
        connection.send("POST", "/v1" + path, [("X-Request-ID", "stuck")])
        ex = rig.upstream.next(path)
        eventually(lambda: ex.gone, "the upstream's connection is closed", 30)
        assert rig.ended("stuck")["reason"] == ("write_timeout" if mine else "client_gone")
        rig.no_stream_open()
        connection.close()
        eventually(lambda: "stuck" in proxy.log(), "nginx is done with it too")
