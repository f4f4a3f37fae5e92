"""What the relay says of its upstream and of itself, over HTTP, and how little it costs the upstream to be asked."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask
from harness import DEADLINE, REPO, eventually, servers
from harness.authority import Authority
from harness.client import Client, Connection
from harness.servers import free_port
from harness.upstream import Upstream

from relay import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Service
    from harness.upstream import Exchange, Handler

KEY = {"RELAY_UPSTREAM_KEY": "sk-the-relays-own"}
ALWAYS_FRESH = {"RELAY_HEALTH_TTL": "0"}
#: A probe may take so long where nobody asks how long it takes.
LONG = {"RELAY_HEALTH_TIMEOUT": "60"}


class Watched:
    """A relay, its upstream, and every place where its health can be asked for."""

    def __init__(self, upstream: Upstream, ports: dict[str, int], path: str = "/health") -> None:
        self.upstream = upstream
        self.ports = ports
        self.path = path

    def ask(self, where: str = "service", what: str = "", method: str = "GET", headers: Any = ()) -> tuple[int, Any]:
        """Status and report; the answer must come within a deadline and say that it is not to be stored."""
        with Client(self.ports[where]) as client:
            response = client.request(method, self.path + what, headers, deadline=DEADLINE)
            body = response.finish().data
            assert response.header("Content-Type") == b"application/json"
            assert b"no-store" in (response.header("Cache-Control") or b"")
            return response.status, json.loads(body) if body else None

    def answers(self, handler: Handler) -> None:
        """From now on the upstream answers probes so."""
        self.upstream.serve(handler, "/models")

    def probes(self) -> int:
        return len(self.upstream.seen("/models"))


def ok(ex: Exchange) -> None:
    ex.reply(b'{"data": []}', headers=[("Content-Type", "application/json")])


def _never(ex: Exchange) -> None:
    ex.wait_gone()


def status(code: int) -> Handler:
    return lambda ex: ex.reply(b"{}", code)


@contextlib.contextmanager
def service_with(
    upstream: Upstream, settings: dict[str, str], *, nginx: bool = False, patient: bool = False
) -> Iterator[Watched]:
    """`patient`: whoever asks waits for the probe, and not for a second."""
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, **(LONG if patient else {}), **settings}
    app = "wsgi:app"
    if patient:
        app, env["PYTHONPATH"] = "shops.asking:service()", str(REPO / "tests")
    with servers.gunicorn(env, app) as relay, contextlib.ExitStack() as stack:
        ports = {"service": relay.port, "admin": relay.admin_port}
        if nginx:
            ports["nginx"] = stack.enter_context(servers.nginx(relay.port, relay.admin_port)).port
        yield Watched(upstream, ports)


@contextlib.contextmanager
def mounted_with(upstream: Upstream, settings: dict[str, str]) -> Iterator[Watched]:
    """A patient one."""
    env = {"PYTHONPATH": str(REPO / "tests"), "SHOP_FIRST_URL": upstream.base_url, "SHOP_HEALTH_TIMEOUT": "60s"}
    env |= settings
    with servers.gunicorn(env, "shops.asking:shop()", None, ["-k", "gevent"], ready=None) as shop:
        yield Watched(upstream, {"service": shop.port}, "/ai/_relay/health")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(base_path="/base/v1") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def _keyed(upstream: Upstream) -> Iterator[Watched]:
    with service_with(upstream, KEY | ALWAYS_FRESH, nginx=True, patient=True) as watched:
        yield watched


@pytest.fixture(scope="module")
def _hasty(upstream: Upstream) -> Iterator[Watched]:
    with service_with(upstream, KEY | ALWAYS_FRESH | {"RELAY_HEALTH_TIMEOUT": "1.5"}) as watched:
        yield watched


def for_one_test(watched: Watched) -> Iterator[Watched]:
    watched.answers(ok)
    yield watched
    watched.upstream.forget("/models")
    watched.upstream.check()


@pytest.fixture
def hasty(_hasty: Watched) -> Iterator[Watched]:
    """The same, with the time-outs that a test can wait for."""
    yield from for_one_test(_hasty)


@pytest.fixture
def keyed(_keyed: Watched) -> Iterator[Watched]:
    """With a key; each question is a probe."""
    yield from for_one_test(_keyed)


@pytest.fixture(scope="module")
def _mounted(upstream: Upstream) -> Iterator[Watched]:
    with mounted_with(upstream, {"SHOP_HEALTH_TTL": "0"}) as watched:
        yield watched


@pytest.fixture
def mounted(_mounted: Watched) -> Iterator[Watched]:
    yield from for_one_test(_mounted)


@pytest.fixture(scope="module")
def dead() -> Iterator[Watched]:
    """An upstream that refuses connections."""
    with Upstream() as nobody:
        pass
    with service_with(nobody, {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{free_port()}"}, nginx=True) as watched:
        yield watched


EVERYWHERE = pytest.mark.parametrize("where", ["service", "admin", "nginx"])


# --- The report


@EVERYWHERE
def test_a_live_upstream_is_ok(keyed: Watched, where: str) -> None:
    """With all that README.md names, and nothing that is nobody's business."""
    code, report = keyed.ask(where)
    assert (code, report["status"]) == (200, "ok")
    assert sorted(report) == ["status", "streams", "upstream", "uptime_s", "version"]
    of_upstream = report["upstream"]
    assert sorted(of_upstream) == ["checked_at", "key", "latency_ms", "reachable", "source", "status_code"]
    assert (of_upstream["reachable"], of_upstream["status_code"], of_upstream["key"]) == (True, 200, "accepted")
    assert of_upstream["source"] in ("probe", "traffic")
    assert 0 <= of_upstream["latency_ms"] < 5000
    checked = datetime.fromisoformat(of_upstream["checked_at"])
    assert abs(datetime.now(UTC) - checked) < timedelta(seconds=10)
    assert (report["streams"]["open"], report["streams"]["max"]) == (0, 900)
    assert report["uptime_s"] >= 0
    assert re.fullmatch(r"\d+\.\d+.*", report["version"])
    assert "sk-" not in json.dumps(report)


def test_the_probe_is_an_ordinary_get_with_the_key_and_no_more(keyed: Watched) -> None:
    """Nothing of the caller's goes with it."""
    headers = {"Cookie": "a=1", "X-Custom": "1", "Authorization": "Bearer the-callers"}
    keyed.ask(headers=headers)
    (ex,) = keyed.upstream.seen("/models")
    assert (ex.method, ex.target, ex.body) == (b"GET", b"/base/v1/models", b"")
    assert ex.all("Authorization") == [b"Bearer sk-the-relays-own"]
    assert not [
        name
        for name, _ in ex.headers
        if name.lower() in (b"cookie", b"x-custom", b"x-forwarded-for", b"content-length")
    ]


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        pytest.param({"RELAY_HEALTH_PATH": "status/ready"}, b"/base/v1/status/ready", id="another-path"),
        pytest.param(
            {"RELAY_HEALTH_PATH": "models?limit=1", "RELAY_UPSTREAM_QUERY": "api-version=1"},
            b"/base/v1/models?limit=1&api-version=1",
            id="with-queries",
        ),
    ],
)
def test_the_probe_goes_where_the_operator_says(upstream: Upstream, settings: dict[str, str], target: bytes) -> None:
    fixed = {"RELAY_UPSTREAM_HEADERS": '{"anthropic-version": "1"}'}
    with service_with(upstream, {**fixed, **settings}, patient=True) as watched:
        watched.ask()
        ex = upstream.seen()[-1]
        assert (ex.target, ex.all("anthropic-version")) == (target, [b"1"])
    upstream.forget("/models")


@pytest.mark.parametrize("code", [401, 403])
def test_a_key_that_is_refused_is_degraded(keyed: Watched, code: int) -> None:
    """Reachable: it answers 200, so that no balancer drops a relay for it."""
    keyed.answers(status(code))
    answered, report = keyed.ask()
    assert (answered, report["status"]) == (200, "degraded")
    assert (report["upstream"]["reachable"], report["upstream"]["status_code"]) == (True, code)
    assert report["upstream"]["key"] == "rejected"


@pytest.mark.parametrize("code", [500, 502, 503, 529])
def test_an_upstream_with_a_failure_of_its_own_is_degraded(keyed: Watched, code: int) -> None:
    keyed.answers(status(code))
    answered, report = keyed.ask()
    assert (answered, report["status"]) == (200, "degraded")
    assert (report["upstream"]["reachable"], report["upstream"]["status_code"]) == (True, code)


@pytest.mark.parametrize("code", [204, 302, 404, 405, 429])
def test_any_other_answer_is_an_answer(keyed: Watched, code: int) -> None:
    """Not every upstream has a list of models; a redirect is not followed."""
    keyed.answers(
        lambda ex: ex.reply(
            b"", code, headers=[("Location", "/elsewhere")], framing="none" if code == 204 else "length"
        )
    )
    answered, report = keyed.ask()
    assert (answered, report["status"], report["upstream"]["status_code"]) == (200, "ok", code)
    assert report["upstream"]["key"] == ("accepted" if code == 204 else "not checked")
    assert keyed.upstream.seen("/elsewhere") == []


@pytest.mark.parametrize("code", [200, 401, 500])
def test_without_a_key_of_the_relays_none_is_judged(mounted: Watched, code: int) -> None:
    """A mounted relay has the same report below its prefix."""
    mounted.answers(status(code))
    answered, report = mounted.ask()
    assert (answered, report["upstream"]["key"]) == (200, "not checked")
    assert report["status"] == ("degraded" if code == 500 else "ok")
    assert report["upstream"]["status_code"] == code


@pytest.mark.parametrize("hook", ["Authorization", "x-api-key", "X-Tenant"])
def test_a_tenants_key_that_is_refused_is_not_the_relays(upstream: Upstream, hook: str) -> None:
    """One that the shop's hook has set in its place; another header leaves the relay's key where it is."""
    app = Flask("shop")
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_ALLOW": "*", **KEY}
    Relay(app, url_prefix="/ai", settings=settings, request_headers=lambda: {hook: "of-a-tenant"})
    path = upstream.serve(status(401))
    client = app.test_client()
    assert client.get("/ai" + path).status_code == 401
    report = client.get("/ai/_relay/health").json
    key = "rejected" if hook == "X-Tenant" else "not checked"
    assert report["upstream"]["source"] == "traffic"
    assert (report["upstream"]["key"], report["upstream"]["status_code"]) == (key, 401)


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(lambda ex: ex.abort(), id="hangs-up"),
        pytest.param(lambda ex: ex.reset(), id="resets"),
        pytest.param(lambda ex: (ex.raw(b"garbage\r\n\r\n"), ex.abort()), id="garbage"),
        pytest.param(lambda ex: (ex.raw(b"HTTP/1.1 200 OK\r\nContent-"), ex.abort()), id="half-a-head"),
    ],
)
def test_an_upstream_that_does_not_answer_http_is_down(keyed: Watched, handler: Handler) -> None:
    keyed.answers(handler)
    answered, report = keyed.ask()
    assert (answered, report["status"]) == (503, "down")
    assert (report["upstream"]["reachable"], report["upstream"]["status_code"]) == (False, None)
    assert report["upstream"]["latency_ms"] is None
    keyed.answers(ok)
    assert keyed.ask()[1]["status"] == "ok"


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param(lambda ex: (ex.head(framing="length", length=100), ex.send(b"{"), ex.abort()), id="cut"),
        pytest.param(lambda ex: (ex.head(), ex.raw(b"no size\r\n"), ex.abort()), id="badly-framed"),
        pytest.param(lambda ex: (ex.head(framing="close"), ex.send(b"{}"), ex.end()), id="until-close"),
        pytest.param(lambda ex: ex.reply(b"x" * 1_000_000), id="long"),
    ],
)
def test_what_becomes_of_the_probes_body_does_not_matter(keyed: Watched, handler: Handler) -> None:
    keyed.answers(handler)
    answered, report = keyed.ask()
    assert (answered, report["status"]) == (200, "ok")


@EVERYWHERE
def test_a_dead_upstream_is_down_and_health_says_so_at_once(dead: Watched, where: str) -> None:
    started = time.monotonic()
    answered, report = dead.ask(where)
    assert time.monotonic() - started < 6
    assert (answered, report["status"]) == (503, "down")
    assert (report["upstream"]["reachable"], report["upstream"]["key"]) == (False, "not checked")
    assert "127.0.0.1" not in json.dumps(report)


@EVERYWHERE
def test_a_dead_upstream_makes_neither_live_nor_ready_red(dead: Watched, where: str) -> None:
    """All hosts share it, and a balancer that drops them all helps nobody."""
    for what in ("/live", "/ready"):
        started = time.monotonic()
        answered, report = dead.ask(where, what)
        assert time.monotonic() - started < 6
        assert (answered, report["status"]) == (200, "ok")


def test_live_and_ready_ask_nobody(keyed: Watched, mounted: Watched) -> None:
    for watched in (keyed, mounted):
        for what in ("/live", "/ready"):
            assert watched.ask(what=what)[0] == 200
    assert keyed.probes() == mounted.probes() == 0


@EVERYWHERE
@pytest.mark.parametrize("what", ["", "/live", "/ready"])
def test_probes_may_ask_with_head(keyed: Watched, where: str, what: str) -> None:
    assert keyed.ask(where, what, "HEAD") == (200, None)


@EVERYWHERE
@pytest.mark.parametrize("what", ["", "/live", "/ready"])
def test_a_report_carries_a_request_id_as_every_response_does(keyed: Watched, where: str, what: str) -> None:
    """The caller's, or one of its own."""
    with Client(keyed.ports[where]) as client:
        response = client.request("GET", keyed.path + what, {"X-Request-ID": "of-the-caller"})
        response.finish()
        assert response.all("X-Request-ID") == [b"of-the-caller"]
        response = client.request("GET", keyed.path + what)
        response.finish()
        assert re.fullmatch(rb"[0-9a-f]{32}", response.header("X-Request-ID") or b"")


# --- An upstream that hangs


@pytest.fixture
def hanging(upstream: Upstream) -> Iterator[threading.Event]:
    """Probes hang until the event is set, at the latest when the test is over."""
    go_on = threading.Event()

    def handler(ex: Exchange) -> None:
        while not go_on.wait(0.02):
            if ex.gone:  # the relay has given up
                ex.finished.set()
                ex.keep_alive = False
                return
        ok(ex)

    upstream.serve(handler, "/models")
    yield go_on
    go_on.set()
    upstream.forget("/models")


@pytest.mark.parametrize("where", ["service", "admin"])
def test_an_upstream_that_hangs_from_the_start_is_down_within_a_second(
    upstream: Upstream, hanging: threading.Event, where: str
) -> None:
    with service_with(upstream, LONG) as watched:
        started = time.monotonic()
        answered, report = watched.ask(where)
        assert time.monotonic() - started < 6
        assert (answered, report["status"], report["upstream"]["reachable"]) == (503, "down", False)
        # It answers the next moment: that is told as soon as it is known.
        hanging.set()
        eventually(lambda: watched.ask(where)[0] == 200, "a health that is ok again")


def test_an_upstream_that_begins_to_hang_is_what_it_was_for_a_while_and_then_down(hasty: Watched) -> None:
    """A caller waits a second and gets the last state; after RELAY_HEALTH_TIMEOUT it is known to be down."""
    while True:
        eventually(lambda: hasty.ask()[0] == 200, "a health that is ok")
        hasty.answers(_never)
        started = time.monotonic()
        answered, report = hasty.ask()
        took = time.monotonic() - started
        if took < 1.4:
            break
        hasty.answers(ok)  # so long that it may be known by then; the watchdog ends this
    assert took > 0.5
    assert (answered, report["status"]) == (200, "ok")
    eventually(lambda: hasty.ask()[0] == 503, "a health that is down")
    assert time.monotonic() - started > 1.5
    hasty.answers(ok)
    eventually(lambda: hasty.ask()[0] == 200, "a health that is ok again")


def test_a_head_that_trickles_in_counts_as_hanging(hasty: Watched) -> None:
    """The limit is for the whole probe, not for each byte of it."""

    def trickle(ex: Exchange) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-A: " + b"b" * 1000:
            ex.raw(bytes([byte]))
            if ex.finished.wait(0.05):
                return
        raise AssertionError("the relay has listened to all of it")

    hasty.answers(trickle)
    eventually(lambda: hasty.ask()[0] == 503, "a health that is down")


def test_a_tls_handshake_that_trickles_in_counts_as_hanging(tmp_path: Path) -> None:
    """Here no single step of the probe takes too long, as with several addresses or a name that takes its time."""
    authority = Authority(tmp_path)
    context = authority.issue("upstream", "IP:127.0.0.1")
    slow, over = threading.Event(), threading.Event()

    def answer(plain: socket.socket) -> None:
        if slow.is_set():
            plain.sendall(b"\x16\x03\x03\x3f\xff")  # a record of 16 KiB
            while not over.wait(0.05):
                plain.sendall(b"x")
        with context.wrap_socket(plain, server_side=True) as sock:
            sock.recv(65536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                plain, _ = listener.accept()
                with contextlib.suppress(OSError), plain:  # the probe has given up
                    answer(plain)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = {
            **ALWAYS_FRESH,
            "RELAY_HEALTH_TIMEOUT": "1.5",
            "RELAY_UPSTREAM_URL": f"https://127.0.0.1:{listener.getsockname()[1]}/v1",
            "RELAY_UPSTREAM_CA": str(authority.certificate),
        }
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        try:
            with servers.gunicorn(settings) as relay, Client(relay.port) as client:

                def health() -> tuple[str, str]:
                    report = json.loads(client.request("GET", "/health").finish().data)
                    return report["status"], report["upstream"].get("error") or ""

                eventually(lambda: health()[0] == "ok", "a health that is ok")
                slow.set()
                eventually(lambda: health() == ("down", "the upstream did not answer within 1.5 s"), "one that is down")
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            server.join(10)


def test_a_body_that_never_ends_does_not_hold_the_report(hasty: Watched) -> None:
    def endless(ex: Exchange) -> None:
        ex.head()
        for _ in range(1000):
            ex.send(b"x")
            if ex.finished.wait(0.05):
                return
        raise AssertionError("the relay has listened to all of it")

    hasty.answers(endless)
    eventually(lambda: hasty.ask()[1]["upstream"]["status_code"] == 200, "the status")


def test_live_answers_while_health_waits(upstream: Upstream, hanging: threading.Event) -> None:
    with service_with(upstream, {}, patient=True) as watched, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Connection(watched.ports["service"])) for _ in range(20)]
        for connection in waiting:
            connection.send("GET", "/health")
        upstream.wait_for(1, "/models")
        assert watched.ask(what="/live")[0] == 200
        assert select.select(waiting, [], [], 0)[0] == []
        hanging.set()
        for connection in waiting:
            assert connection.read_head().finish().ended == "clean"


# --- What it costs the upstream


@pytest.mark.parametrize("where", ["service", "admin", "mounted"])
def test_a_burst_of_1000_costs_the_upstream_two_requests_at_most(
    upstream: Upstream, hanging: threading.Event, where: str
) -> None:
    """All are waiting while the first probe is under way, and all get its answer; later ones get it without a wait."""
    if where == "mounted":
        patient = mounted_with(upstream, {"SHOP_HEALTH_TTL": "1m"})
    else:
        patient = service_with(upstream, {"RELAY_HEALTH_TTL": "1m"}, patient=True)
    with patient as watched, contextlib.ExitStack() as stack:
        port = "service" if where == "mounted" else where
        burst = []
        for _ in range(1000):
            # Each asks at once: one that did not would be closed as idle before a slow test gets to it.
            burst.append(stack.enter_context(Connection(watched.ports[port])))
            burst[-1].send("GET", watched.path)
        upstream.wait_for(1, "/models")
        hanging.set()
        for connection in burst:
            response = connection.read_head()
            assert (response.status, json.loads(response.finish().data)["status"]) == (200, "ok")
        for _ in range(20):
            assert watched.ask(port)[0] == 200
        assert 1 <= watched.probes() <= 2


def test_an_answer_serves_everyone_until_it_is_stale(upstream: Upstream) -> None:
    upstream.serve(ok, "/models")
    with service_with(upstream, {"RELAY_HEALTH_TTL": "1s"}, patient=True) as watched:
        before, took = 0, float("inf")
        while took > 0.9:  # so long that the first one's answer may be stale
            before, began = watched.probes(), time.monotonic()
            reports = [watched.ask(where)[1]["upstream"] for where in ("service", "admin", "service", "admin")]
            probes, took = watched.probes() - before, time.monotonic() - began
        assert probes == 1 or before
        assert probes <= 1
        assert [report["source"] for report in reports] == ["probe"] * 4
        before = watched.probes()

        def probed_again() -> bool:
            watched.ask()
            return watched.probes() > before

        eventually(probed_again, "another probe once the first is stale")
    upstream.forget("/models")


def test_a_service_with_a_full_house_answers_on_the_admin_address(upstream: Upstream) -> None:
    """RELAY_MAX_STREAMS streams are open: health still answers, on both addresses, and counts them."""
    upstream.serve(ok, "/models")
    path = upstream.by_hand()
    with service_with(upstream, {"RELAY_MAX_STREAMS": "3"}, patient=True) as watched, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Connection(watched.ports["service"])).send("GET", "/v1" + path)
            upstream.next(path)
        for where in ("service", "admin"):
            answered, report = watched.ask(where)
            assert (answered, report["streams"]) == (200, {"open": 3, "max": 3})
        stack.close()
        eventually(lambda: watched.ask()[1]["streams"]["open"] == 0, "no open stream")
    upstream.forget(path)
    upstream.forget("/models")


def test_the_demo_says_that_it_is_one() -> None:
    with servers.gunicorn({}) as relay, Client(relay.port) as client:

        def report() -> Any:
            return json.loads(client.request("GET", "/health").finish().data)

        eventually(lambda: report()["status"] == "ok", "the first probe's answer")
        assert report()["upstream"]["demo"] is True


def test_other_methods_on_health_are_a_405_in_json(service: Service) -> None:
    for method in ("POST", "DELETE", "PUT"):
        response = service.client.request(method, "/health")
        assert (response.status, json.loads(response.finish().data)["error"]["code"]) == (405, "method_not_allowed")
