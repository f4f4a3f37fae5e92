"""A stream's life: cancel, heartbeats, the hold, four clocks, truthful ends, backpressure, admission.

The upstream does each of these things on request; the times are the relay's settings, made short. Assertions on time
are only of kinds: before or after a clock of the relay's, never how fast.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import eventually, servers
from harness.calm import undisturbed
from harness.client import Body, Connection, EndedEarly, request
from harness.upstream import Exchange, Upstream

from relay.stream.waiting.client_socket import Writes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn

EVENTS = [("Content-Type", "text/event-stream")]
HEARTBEAT = b": keep-alive\n"


class Rig:
    """An upstream and a relay with settings of this module's own."""

    def __init__(self, upstream: Upstream, relay: Gunicorn) -> None:
        self.upstream = upstream
        self.relay = relay
        self.port = relay.port

    def ask(self, path: str, headers: list[tuple[str, str]] | None = None, method: str = "POST") -> Connection:
        """Send a request and do not wait."""
        connection = Connection(self.port)
        connection.send(method, "/v1" + path, headers or [("Accept", "text/event-stream")])
        return connection

    def ended(self, request_id: str) -> dict[str, object]:
        """The log line of a request, once it has ended."""
        found: list[dict[str, object]] = []

        def there() -> bool:
            for line in self.relay.log().splitlines(keepends=True):
                if line.startswith("{") and request_id in line and line.endswith("\n"):  # the whole of it
                    found.append(json.loads(line))
                    return True
            return False

        eventually(there, f"the log line of {request_id}")
        return found[0]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples whose name and labels begin so."""
        text = request(self.relay.admin_port, "GET", "/metrics").finish().data.decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def streams(self) -> list[dict[str, object]]:
        """What the admin address lists as open."""
        listed: list[dict[str, object]] = json.loads(request(self.relay.admin_port, "GET", "/streams").finish().data)
        return listed

    def no_stream_open(self) -> None:
        eventually(lambda: self.metric("relay_open_streams") == 0, "all streams closed")


def _rig(**settings: str) -> Iterator[Rig]:
    with Upstream() as upstream:
        env = {f"RELAY_{name.upper()}": value for name, value in settings.items()}
        with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **env}) as relay:
            yield Rig(upstream, relay)


@pytest.fixture(scope="module")
def quiet() -> Iterator[Rig]:
    """No heartbeats, no hold: nothing of the relay's own keeps a connection busy."""
    yield from _rig(heartbeat="0", hold="0")


@pytest.fixture(scope="module")
def beating() -> Iterator[Rig]:
    yield from _rig(heartbeat="0.15", hold="0.3")


@pytest.fixture(scope="module")
def hasty() -> Iterator[Rig]:
    yield from _rig(
        connect_timeout="0.5",
        first_byte_timeout="0.6",
        idle_timeout="0.6",
        write_timeout="0.8",
        heartbeat="0.2",
        hold="0",
    )


def gone(ex: Exchange) -> None:
    """Wait until the relay has closed the connection of this exchange, which its handler may be noticing too."""
    eventually(lambda: ex.gone, f"{ex!r} gone")


# --- Cancel ---------------------------------------------------------------------------------------------------------


def silent(ex: Exchange) -> None:
    ex.head(headers=EVENTS)
    ex.send(b"data: 1\n\n")
    ex.wait_gone(30)


def mute(ex: Exchange) -> None:
    ex.wait_gone(30)


@pytest.mark.parametrize("leave", ["close", "reset", "half_close"])
@pytest.mark.parametrize("handler", [silent, mute], ids=["a silent stream", "no answer yet"])
def test_a_client_that_leaves_ends_the_upstream_request_while_it_is_silent(quiet: Rig, handler, leave: str) -> None:
    path = quiet.upstream.serve(handler)
    connection = quiet.ask(path, [("X-Request-ID", f"leave-{leave}-{handler.__name__}")])
    ex = quiet.upstream.next(path)
    if handler is silent:
        connection.read_head().read_until(b"data: 1\n\n")
    getattr(connection, leave)()
    gone(ex)
    connection.close()
    assert quiet.ended(f"leave-{leave}-{handler.__name__}")["reason"] == "client_gone"
    quiet.no_stream_open()


def test_200_clients_that_leave_at_once_are_all_gone_upstream(quiet: Rig) -> None:
    """The time that it took is printed; `make bench` measures it."""
    gone: list[float] = []

    def note(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
        gone.append(ex.wait_gone(30))

    path = quiet.upstream.serve(note)
    connections = [quiet.ask(path) for _ in range(200)]
    for connection in connections:
        connection.read_head().read_until(b"data: 1\n\n")
    left = time.monotonic()
    for connection in connections:
        connection.close()
    eventually(lambda: len(gone) == 200, "200 upstream connections gone")
    times = sorted(1000 * (at - left) for at in gone)
    print(f"gone upstream after {times[100]:.0f} ms (p50), {times[197]:.0f} ms (p99)")
    quiet.no_stream_open()


def test_500_clients_that_leave_before_the_upstream_has_answered_leave_nothing_behind(quiet: Rig) -> None:
    (worker,) = quiet.relay.workers()
    path = quiet.upstream.serve(mute)
    before = len(list(Path(f"/proc/{worker}/fd").iterdir()))
    for half in (1, 2):
        connections = [quiet.ask(path) for _ in range(250)]
        quiet.upstream.wait_for(250 * half, path, 30)
        for connection in connections:
            connection.reset()
        quiet.no_stream_open()
    eventually(
        lambda: len(list(Path(f"/proc/{worker}/fd").iterdir())) <= before + 2, "file descriptors back where they were"
    )


# --- Heartbeats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param([b""], HEARTBEAT, id="before any byte"),
        pytest.param([b"data: 1\n\n"], HEARTBEAT, id="LF"),
        pytest.param([b"data: 1\r\n\r\n"], HEARTBEAT, id="CRLF"),
        pytest.param([b"data: 1\r\r"], HEARTBEAT, id="CR"),
        pytest.param([b"data: 1\n", b"\n"], HEARTBEAT, id="split between the line ends"),
        pytest.param([b"data: 1\r\n\r", b"\n"], HEARTBEAT, id="split inside a CRLF"),
        pytest.param([b"data: 1\n\r\n"], HEARTBEAT, id="LF and CRLF"),
        pytest.param([b"id: 7\ndata: 1\n\n"], b": keep-alive\n", id="an id: no blank line"),
        pytest.param([b"i", b"d: 7\n", b"data: 1\n\n"], b": keep-alive\n", id="an id in pieces"),
    ],
)
def test_a_heartbeat_comes_in_silence_at_an_event_boundary(beating: Rig, pieces: list[bytes], expected: bytes) -> None:
    path = beating.upstream.by_hand()
    connection = beating.ask(path, [("Accept", "*/*")])  # which is not held
    ex = beating.upstream.next(path)
    ex.head(headers=EVENTS)
    response = connection.read_head()
    if expected == HEARTBEAT and pieces[0][:1] != b"i":
        expected += b"\n"  # for a client that does not ask for events by name
    for piece in pieces:
        ex.send(piece)
        if piece:
            response.read_until(piece)
    assert response.read_exactly(len(expected)) == expected
    assert response.read_exactly(len(expected)) == expected
    ex.send(b"data: last\n\n")
    ex.end()
    body = response.finish()
    assert body.ended == "clean"
    # One may have come before the first piece, too.
    assert body.data.replace(expected, b"").replace(HEARTBEAT, b"") == b"".join(pieces) + b"data: last\n\n"


@pytest.mark.parametrize(
    ("headers", "sent"),
    [
        pytest.param(EVENTS, b"data: half", id="inside an event"),
        pytest.param(EVENTS, b"data: half\n", id="inside an event, after a line"),
        pytest.param([("Content-Type", "application/json")], b"{", id="JSON"),
        pytest.param([("Content-Type", "application/x-ndjson")], b"{}\n\n", id="NDJSON"),
        pytest.param([*EVENTS, ("Content-Encoding", "gzip")], b"\x1f\x8b\n\n", id="a compressed event stream"),
    ],
)
def test_no_heartbeat_comes_anywhere_else(beating: Rig, headers: list[tuple[str, str]], sent: bytes) -> None:
    path, other = beating.upstream.by_hand(), beating.upstream.by_hand()
    connection = beating.ask(path, [("Accept", "*/*")])  # which is not held
    ex = beating.upstream.next(path)
    ex.head(headers=headers)
    ex.send(sent)
    response = connection.read_head()
    before = response.read_until(sent).removesuffix(sent)
    assert before.replace(HEARTBEAT, b"") == b""
    assert not before or headers == EVENTS
    # A stream beside it gets three heartbeats meanwhile.
    beside = beating.ask(other)
    sign = beating.upstream.next(other)
    sign.head(headers=EVENTS)
    beside.read_head().read_exactly(3 * len(HEARTBEAT))
    beside.close()
    ex.send(b"!")
    ex.end()
    assert response.finish().data == before + sent + b"!"


@pytest.mark.parametrize("colon", [":", "%3A"])
def test_geminis_streams_get_neither_a_hold_nor_heartbeats(beating: Rig, colon: str) -> None:
    """google-genai for Python takes comments for JSON. A stream beside it is held, and gets heartbeats."""
    path = f"/v1beta/models/gemini{colon}streamGenerateContent"
    gemini, other = beating.upstream.by_hand(path), beating.upstream.by_hand()

    def three_heartbeats() -> None:
        beside = beating.ask(other)
        sign = beating.upstream.next(other)
        beside.read_head().read_exactly(3 * len(HEARTBEAT))
        sign.abort()
        beside.close()

    connection = beating.ask(gemini)
    ex = beating.upstream.next(gemini)
    three_heartbeats()
    ex.head(headers=EVENTS)
    ex.send(b"data: {}\n\n")
    response = connection.read_head()
    response.read_until(b"data: {}\n\n")
    three_heartbeats()
    ex.end()
    body = response.finish()
    assert (body.data, body.ended) == (b"data: {}\n\n", "clean")


@undisturbed(0.05, tries=10)
def test_an_upstream_that_speaks_gets_no_heartbeats_beside_it(beating: Rig) -> None:
    path = beating.upstream.by_hand()
    connection = beating.ask(path)
    ex = beating.upstream.next(path)
    ex.head(headers=EVENTS)
    sent = b""
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        ex.send(b"data: x\n\n")
        sent += b"data: x\n\n"
        time.sleep(0.02)
    ex.end()
    assert connection.read_head().finish().data == sent


# --- The hold -------------------------------------------------------------------------------------------------------

CHAT = "/chat/completions"


def test_a_late_upstream_gets_200_and_heartbeats_then_its_bytes(beating: Rig) -> None:
    path = beating.upstream.by_hand()
    connection = beating.ask(path)
    ex = beating.upstream.next(path)
    response = connection.read_head()
    assert response.status == 200
    assert response.header("Content-Type").startswith(b"text/event-stream")
    assert response.header("X-Accel-Buffering") == b"no"
    response.read_exactly(2 * len(HEARTBEAT))
    ex.reply(b"data: 1\n\n", headers=EVENTS)
    body = response.finish()
    assert body.ended == "clean"
    assert body.data.replace(HEARTBEAT, b"") == b"data: 1\n\n"


def test_within_the_hold_the_upstreams_own_status_comes(narrow: Rig) -> None:
    """Which is 20 s here, as by default."""
    path = narrow.upstream.serve(lambda ex: ex.reply(b"{}", 401, "Unauthorized"))
    response = narrow.ask(path).read_head()
    assert (response.status, response.finish().data) == (401, b"{}")


def _held_answer(rig: Rig, status: int, headers: list[tuple[str, str]], body: bytes) -> Body:
    """What comes when the upstream answers so after the hold."""
    path = rig.upstream.by_hand()
    connection = rig.ask(path)
    ex = rig.upstream.next(path)
    response = connection.read_head()
    response.read_exactly(len(HEARTBEAT))
    ex.reply(body, status, "Whatever", headers)
    return response.finish()


JSON = [("Content-Type", "application/json")]
TEXT = [("Content-Type", "text/plain; charset=utf-8")]


@pytest.mark.parametrize(
    ("status", "headers", "body", "told"),
    [
        pytest.param(
            429,
            [*JSON, ("Retry-After", "7")],
            b'{"error": {"message": "slow down", "type": "rate_limit_error", "code": "too_fast"}}',
            {"message": "slow down", "type": "rate_limit_error", "code": "too_fast", "retry_after": 7},
            id="OpenAI",
        ),
        pytest.param(
            529,
            JSON,
            b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}',
            {"message": "Overloaded", "type": "overloaded_error"},
            id="Anthropic",
        ),
        pytest.param(
            429,
            JSON,
            b'{"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED"}}',
            {"message": "quota"},
            id="Google",
        ),
        pytest.param(401, JSON, b'{"error": {"code": "401", "message": "Access denied"}}', {"code": "401"}, id="Azure"),
        pytest.param(401, JSON, b'{"message": "invalid api token"}', {"message": "invalid api token"}, id="Cohere"),
        pytest.param(400, JSON, b'{"object": "error", "message": "bad model"}', {"message": "bad model"}, id="Mistral"),
        pytest.param(404, TEXT, b"no such page", {"message": "no such page"}, id="text"),
        pytest.param(
            502,
            [("Content-Type", "text/html")],
            b"<h1>502</h1>",
            {"message": "the upstream answered 502 Whatever"},
            id="HTML",
        ),
        pytest.param(
            500, EVENTS, b'data: {"error": {"message": "broken"}}\n\n', {"message": "broken"}, id="500 and events"
        ),
        pytest.param(503, JSON, b"", {"message": "the upstream answered 503 Whatever"}, id="empty"),
    ],
)
def test_after_the_hold_a_failure_is_told_in_the_upstreams_words(
    beating: Rig, status: int, headers: list[tuple[str, str]], body: bytes, told: dict[str, object]
) -> None:
    got = _held_answer(beating, status, headers, body)
    assert got.ended == "cut"
    assert told.items() <= frame(got.data).items()
    assert frame(got.data)["status"] == status
    assert beating.ended(frame(got.data)["request_id"])["status"] == status


@pytest.mark.parametrize("headers", [TEXT, [], JSON], ids=["text", "untyped", "JSON"])
@pytest.mark.parametrize("body", [b"data: 1\n\n", b"\xef\xbb\xbfevent: x\ndata: 1\n\n", b": hello\n\ndata: 1\n\n"])
def test_after_the_hold_what_looks_like_an_event_stream_is_one(
    beating: Rig, headers: list[tuple[str, str]], body: bytes
) -> None:
    got = _held_answer(beating, 200, headers, body)
    assert (got.ended, got.data.replace(HEARTBEAT, b"")) == ("clean", body)


@pytest.mark.parametrize(
    ("headers", "body", "told"),
    [
        pytest.param(JSON, b'{"choices": []}', {"type": "application/json", "body": '{"choices": []}'}, id="JSON"),
        pytest.param(JSON, b"x" * 70_000, {"body": "x" * 65_536, "truncated": True}, id="large"),
        pytest.param([("Content-Type", "image/png")], b"\x89PNG", {"body_base64": "iVBORw=="}, id="binary"),
        pytest.param([*EVENTS, ("Content-Encoding", "gzip")], b"\x1f\x8b", {"encoding": "gzip"}, id="compressed"),
    ],
)
def test_after_the_hold_any_other_answer_is_in_the_frame(
    beating: Rig, headers: list[tuple[str, str]], body: bytes, told: dict[str, object]
) -> None:
    got = _held_answer(beating, 200, headers, body)
    assert got.ended == "cut"
    upstream = frame(got.data)["upstream"]
    assert upstream["status"] == 200
    assert told.items() <= upstream.items()


def test_an_upstream_that_has_said_its_end_is_left(beating: Rig) -> None:
    """It keeps the connection open after the mark: the answer is whole all the same."""
    beating.upstream.by_hand(CHAT)
    connection = beating.ask(CHAT)
    ex = beating.upstream.next(CHAT)
    ex.head(headers=EVENTS)
    ex.send(b"data: {}\n\ndata: [DONE]\n\n")
    body = connection.read_head().finish()
    assert body.ended == "clean"
    assert body.data.replace(HEARTBEAT, b"") == b"data: {}\n\ndata: [DONE]\n\n"
    ex.wait_gone()
    beating.upstream.forget(CHAT)


@pytest.mark.parametrize(("status", "method", "stops"), [(401, "GET", True), (500, "GET", True), (401, "POST", False)])
def test_an_eventsource_that_failed_for_good_does_not_come_back(
    beating: Rig, status: int, method: str, stops: bool
) -> None:
    """It connects again after whatever end, and would do so for ever."""
    path = beating.upstream.by_hand()
    connection = Connection(beating.port)
    connection.send(method, "/v1" + path, {"Accept": "text/event-stream"}, b"" if method == "GET" else b"{}")
    ex = beating.upstream.next(path)
    response = connection.read_head()
    response.read_exactly(len(HEARTBEAT))
    ex.reply(b"{}", status, "No", [("Content-Type", "application/json")])
    body = response.finish()
    event = body.data.replace(HEARTBEAT, b"")
    assert event.startswith(b"retry: 86400000\nid: relay-gave-up\nevent: error\n") is stops
    before = len(beating.upstream.seen(path))
    again = request(
        beating.port, "GET", "/v1" + path, {"Accept": "text/event-stream", "Last-Event-ID": "relay-gave-up"}
    )
    assert (again.status, again.finish().data) == (204, b"")
    assert len(beating.upstream.seen(path)) == before


def test_a_client_may_have_no_heartbeats(beating: Rig) -> None:
    path = beating.upstream.by_hand()
    connection = beating.ask(path, [("Accept", "text/event-stream"), ("X-Relay-Heartbeat", "off")])
    ex = beating.upstream.next(path)
    assert ex.all("X-Relay-Heartbeat") == []
    ex.head(headers=EVENTS)
    ex.send(b"data: 1\n\n")
    # Several heartbeats of another stream's show that there was time for them.
    other = beating.ask(beating.upstream.by_hand())
    other.read_head().read_exactly(4 * len(HEARTBEAT))
    ex.end()
    assert connection.read_head().finish().data == b"data: 1\n\n"


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "held"),
    [
        pytest.param("GET", "/feed", [("Accept", "text/event-stream")], b"", True, id="Accept: text/event-stream"),
        pytest.param("GET", "/feed", [("Accept", "*/*")], b"", False, id="Accept: */*"),
        pytest.param("POST", "/mcp", [("Accept", "application/json, text/event-stream")], b"{}", False, id="MCP"),
        pytest.param("POST", CHAT, [("Accept", "application/json")], b'{"stream": true}', True, id="chat, stream"),
        pytest.param("POST", CHAT, [], b'{"stream": false}', False, id="chat, no stream"),
        pytest.param("POST", CHAT, [], b'{"stream": "true"}', False, id="chat, stream a text"),
        pytest.param("POST", CHAT, [], b'{"stream": true', False, id="chat, no JSON"),
        pytest.param("POST", "/generate", [], b'{"stream": true}', False, id="NDJSON servers' stream"),
        pytest.param("POST", CHAT, [], b'{"stream": true, "x": "' + b"x" * (1 << 20) + b'"}', True, id="over 1 MiB"),
    ],
)
def test_only_a_request_that_asks_for_events_is_held(
    beating: Rig, method: str, path: str, headers: list[tuple[str, str]], body: bytes, held: bool
) -> None:
    beating.upstream.by_hand(path)
    connection = Connection(beating.port)
    connection.send(method, "/v1" + path, headers, body)
    ex = beating.upstream.next(path)
    if held:
        assert connection.read_head().read_exactly(len(HEARTBEAT)) == HEARTBEAT
    else:
        # Another one that is held shows that the hold has passed.
        other = beating.upstream.by_hand()
        beating.ask(other).read_head().read_exactly(len(HEARTBEAT))
        ex.reply(b"{}\n", 202, "Accepted")
        assert connection.read_head().status == 202
    connection.close()


# --- Clocks and ends ------------------------------------------------------------------------------------------------


def frame(body: bytes) -> dict[str, Any]:
    """The error in the frame at the end of a body."""
    head, _, data = body.rpartition(b"event: error\ndata: ")
    assert data.endswith(b"\n\n"), body[-200:]
    assert not head or head.endswith((b"\n\n", b"\r\r", b"\r\n\r\n", b": keep-alive\n")), "not at an event boundary"
    told = json.loads(data)
    assert told["type"] == "error"
    error: dict[str, Any] = told["error"]
    return error


def test_connect_timeout_is_504(tmp_path: Path) -> None:
    """A listener whose queue is full takes no connection, and refuses none."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        env = {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{port}", "RELAY_CONNECT_TIMEOUT": "0.4"}
        with servers.gunicorn(env) as relay:
            response = request(relay.port, "POST", "/v1/x", [("X-Request-ID", "no-connection")], b"{}")
            body = response.finish().data
            assert response.status == 504
            assert json.loads(body)["error"]["code"] == "connect_timeout"
            assert response.header("x-should-retry") is None, "nothing was sent, so it may be sent again"
            assert Rig(None, relay).ended("no-connection")["reason"] == "connect_timeout"  # type: ignore[arg-type]
        for filler in fillers:
            filler.close()


def test_what_must_not_be_sent_again_has_the_status_that_is_set() -> None:
    with Upstream() as upstream:
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_NO_RETRY_STATUS": "424",
            "RELAY_FIRST_BYTE_TIMEOUT": "0.4",
        }
        with servers.gunicorn(env) as relay:
            response = request(relay.port, "POST", "/v1" + upstream.serve(mute), [("X-Request-ID", "mute")], b"{}")
            assert (response.status, response.header("x-should-retry")) == (424, b"false")
            assert json.loads(response.finish().data)["error"]["code"] == "first_byte_timeout"
            assert Rig(upstream, relay).ended("mute")["status"] == 424


def test_first_byte_timeout_is_504_and_not_to_be_retried(hasty: Rig) -> None:
    path = hasty.upstream.serve(mute)
    response = hasty.ask(path, [("X-Request-ID", "mute")]).read_head()
    assert response.status == 504
    assert response.header("x-should-retry") == b"false"
    assert json.loads(response.finish().data)["error"]["code"] == "first_byte_timeout"
    assert hasty.ended("mute")["reason"] == "first_byte_timeout"
    gone(hasty.upstream.next(path))


def test_half_a_head_is_no_first_byte(hasty: Rig) -> None:
    path = hasty.upstream.by_hand()
    connection = hasty.ask(path)
    ex = hasty.upstream.next(path)
    ex.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/ev")
    assert connection.read_head().status == 504
    gone(ex)


@pytest.mark.parametrize(
    ("last", "framed"), [(b"data: 1\n\n", True), (b"data: 1\n", False)], ids=["boundary", "inside"]
)
@undisturbed(0.1)
def test_idle_timeout_is_not_put_off_by_heartbeats(hasty: Rig, last: bytes, framed: bool) -> None:
    path = hasty.upstream.by_hand()
    name = f"idle{path.replace('/', '-')}"
    connection = hasty.ask(path, [("Accept", "text/event-stream"), ("X-Request-ID", name)])
    ex = hasty.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(last)
    body = connection.read_head().finish()
    assert body.ended == "cut"
    if framed:
        assert body.data.startswith(last + HEARTBEAT + HEARTBEAT)
        assert frame(body.data)["code"] == "idle_timeout"
    else:
        assert body.data == last
    assert hasty.ended(name)["reason"] == "idle_timeout"
    gone(ex)


@undisturbed(0.2)
def test_an_upstream_that_pauses_for_less_than_the_idle_timeout_lives_on(hasty: Rig) -> None:
    path = hasty.upstream.by_hand()
    connection = hasty.ask(path)
    ex = hasty.upstream.next(path)
    ex.head(headers=EVENTS)
    response = connection.read_head()
    for i in range(5):
        ex.send(b"data: %d\n\n" % i)
        response.read_until(b"data: %d\n\n" % i)
        response.read_until(HEARTBEAT)  # 0.2 s of silence, five times: more than the 0.6 of the timeout together
    ex.end()
    assert response.finish().ended == "clean"


_SHOP = """
from flask import Flask
from relay import Relay

app = Flask("shop")
relay = Relay(app, url_prefix="/v1", settings=%r)
"""


@pytest.fixture(scope="module", params=["gevent", "gthread"])
def frozen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A relay with clocks of a second, for both kinds of waiting."""
    folder = tmp_path_factory.mktemp("shop")
    with Upstream() as upstream:
        settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_HEARTBEAT": "0"}
        settings |= {"RELAY_IDLE_TIMEOUT": "1", "RELAY_FIRST_BYTE_TIMEOUT": "1"}
        (folder / "shop.py").write_text(_SHOP % settings)
        args = ["-k", request.param, "--threads", "8"]
        with servers.gunicorn({"PYTHONPATH": str(folder)}, "shop:app", None, args, ready=None) as relay:
            yield Rig(upstream, relay)


@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "in a stream"])
@undisturbed(0.5)
def test_a_relay_that_stood_still_reads_what_has_come_before_it_believes_its_clocks(frozen: Rig, begun: bool) -> None:
    """As one does whose container is paused."""
    (worker,) = frozen.relay.workers()
    path = frozen.upstream.by_hand()
    connection = frozen.ask(path)
    ex = frozen.upstream.next(path)
    if begun:
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
        response = connection.read_head()
        response.read_until(b"data: 1\n\n")
    os.kill(worker, signal.SIGSTOP)
    try:
        if not begun:
            ex.head(headers=EVENTS)
            ex.send(b"data: 1\n\n")
        ex.send(b"data: 2\n\n")
        time.sleep(1.2)
    finally:
        os.kill(worker, signal.SIGCONT)
    if not begun:
        response = connection.read_head()
        assert response.status == 200
    response.read_until(b"data: 2\n\n")
    ex.end()
    body = response.finish()
    assert (body.data, body.ended) == (b"data: 1\n\ndata: 2\n\n", "clean")


def endless(ex: Exchange) -> None:
    ex.head(headers=EVENTS)
    event = b"data: " + b"x" * 8000 + b"\n\n"
    while True:
        ex.send(event)


def test_a_client_that_takes_nothing_is_gone_after_the_write_timeout(hasty: Rig) -> None:
    path = hasty.upstream.serve(endless)
    connection = hasty.ask(path, [("X-Request-ID", "stuck")])
    ex = hasty.upstream.next(path)
    gone(ex)
    assert hasty.ended("stuck")["reason"] == "write_timeout"
    hasty.no_stream_open()
    connection.wait_closed()  # which only a reset can say while bytes wait to be read
    with pytest.raises(EndedEarly, match="RST"):
        connection.read_head().read_until(b"never", deadline=20)


def test_one_look_at_a_write_says_nothing_however_late_it_comes() -> None:
    """It may be the relay that stood still, and not its client."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writes = Writes(ours, 0.01)
        began = time.monotonic() - 60
        assert not writes.stuck(began)
        time.sleep(0.02)
        assert writes.stuck(began)


@undisturbed(0.3)
def test_a_client_that_reads_what_waits_in_the_kernel_has_not_vanished(hasty: Rig) -> None:
    """No write is stuck; something always waits for an acknowledgement, for several times the write timeout."""
    path = hasty.upstream.by_hand()
    with Connection(hasty.port, rcvbuf=4096) as connection:
        connection.send("POST", f"/v1{path}", [("X-Request-ID", "no-hurry")], b"{}")
        ex = hasty.upstream.next(path)
        ex.head(headers=EVENTS)
        event = b"data: " + b"x" * 120_000 + b"\n\n"
        ex.send(event)
        response = connection.read_head()
        read = 0
        while read < 100_000:
            read += len(response.read_exactly(3000))
            ex.send(b": still here\n\n")
            time.sleep(0.1)
        ex.end()
        body = response.finish()
        assert body.ended == "clean"
        assert body.data.replace(b": keep-alive\n\n", b"")[: len(event)] == event
    assert hasty.ended("no-hurry")["reason"] == "done"


def test_a_client_that_reads_slowly_is_not_taken_for_gone(hasty: Rig) -> None:
    path = hasty.upstream.serve(endless)
    connection = hasty.ask(path)
    response = connection.read_head()
    ex = hasty.upstream.next(path)
    until = time.monotonic() + 2.5  # three times the write timeout
    while time.monotonic() < until:
        response.read_exactly(150_000)
        time.sleep(0.2)
    assert not ex.gone
    connection.close()
    gone(ex)


@pytest.mark.parametrize("how", ["abort", "reset"])
@pytest.mark.parametrize(
    ("sent", "framed"),
    [
        pytest.param(b"", True, id="before any event"),
        pytest.param(b"data: 1\n\n", True, id="at an event boundary"),
        pytest.param(b"data: 1\r\n\r", True, id="at a boundary whose LF never came"),
        pytest.param(b"data: 1\n\ndata: caf\xc3", False, id="inside a character"),
    ],
)
def test_a_cut_upstream_is_an_error_frame_where_one_fits_and_always_a_cut(
    quiet: Rig, sent: bytes, framed: bool, how: str
) -> None:
    path = quiet.upstream.by_hand()
    name = f"cut-{how}-{len(sent)}"
    connection = quiet.ask(path, [("X-Request-ID", name)])
    ex = quiet.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(sent)
    response = connection.read_head()
    response.read_exactly(len(sent))
    getattr(ex, how)()
    body = response.finish()
    assert body.ended == "cut"
    if framed:
        assert body.data.startswith(sent + b"event: error\n")
        assert (
            json.loads(body.data[len(sent) :].removeprefix(b"event: error\ndata: "))["error"]["code"] == "upstream_cut"
        )
    else:
        assert body.data == sent
    assert quiet.ended(name)["reason"] == "upstream_cut"


def test_every_end_is_one_count_of_the_metric_and_no_reason_is_new(hasty: Rig) -> None:
    """Of whatever has come before; of one stream at least."""
    path = hasty.upstream.serve(lambda ex: ex.abort())
    assert hasty.ask(path).read_head().status == 502
    hasty.no_stream_open()
    text = request(hasty.relay.admin_port, "GET", "/metrics").finish().data.decode()
    reasons = {
        line.partition('reason="')[2].partition('"')[0]
        for line in text.splitlines()
        if line.startswith("relay_streams_ended_total{")
    }
    assert reasons
    assert reasons <= {
        "done", "client_gone", "upstream_cut", "upstream_error", "connect_timeout", "first_byte_timeout",
        "idle_timeout", "write_timeout", "drained", "send_timeout", "relay_error",
    }  # fmt: skip
    assert hasty.metric("relay_streams_ended_total") == hasty.metric("relay_requests_total")


# --- Backpressure ---------------------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_stops_the_upstream_and_costs_little_memory(quiet: Rig) -> None:
    """20 of them, over an endless upstream: the relay's own memory grows by at most 1 MiB each."""
    (worker,) = quiet.relay.workers()
    path = quiet.upstream.serve(_endless_until_gone)
    before = _pss(worker)
    connections = [quiet.ask(path) for _ in range(20)]
    exchanges = [quiet.upstream.wait_for(i + 1, path) for i in range(20)]
    written = [-1] * 20

    def standing_still() -> bool:
        nonlocal written
        now = [ex.written for ex in exchanges]
        still = now == written and all(count > 0 for count in now)
        written = now
        return still

    eventually(standing_still, "the upstream stands still", every=0.3)
    grown = _pss(worker) - before
    print(f"20 clients that do not read: {grown / 20:.0f} KiB each, {max(written) / 1e6:.1f} MB in all buffers at most")
    assert grown < 20 * 1024
    for connection in connections:
        connection.reset()
    quiet.no_stream_open()


def _endless_until_gone(ex: Exchange) -> None:
    ex.head(headers=EVENTS)
    event = b"data: " + b"x" * 32_000 + b"\n\n"
    while True:
        ex.send(event)


def _pss(pid: int) -> int:
    """Proportional set size in KiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise AssertionError("no Pss")


# --- Admission ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[Rig]:
    yield from _rig(max_streams="3", queue="3", max_streams_per_client="0")


def test_a_full_relay_queues_then_says_503_and_its_health_goes_on_answering(narrow: Rig) -> None:
    path = narrow.upstream.serve(silent)
    before = narrow.metric('relay_refused_total{reason="full"}')
    held = [narrow.ask(path) for _ in range(3)]
    for connection in held:
        connection.read_head()
    refused = narrow.ask(path).read_head()
    assert refused.status == 503
    assert int(refused.header("Retry-After")) >= 1
    assert json.loads(refused.finish().data)["error"]["code"] == "full"
    for port in (narrow.port, narrow.relay.admin_port):
        assert request(port, "GET", "/health/live").status == 200
    # One that leaves makes room for one that waits.
    waiting = narrow.ask(path)
    held.pop().close()
    assert waiting.read_head().status == 200
    # One that gives up waiting takes no room.
    impatient = narrow.ask(path)
    impatient.close()
    for connection in [*held, waiting]:
        connection.close()
    narrow.no_stream_open()
    again = [narrow.ask(path) for _ in range(3)]
    assert [connection.read_head().status for connection in again] == [200, 200, 200]
    for connection in again:
        connection.close()
    narrow.no_stream_open()
    assert narrow.metric('relay_refused_total{reason="full"}') == before + 1


@pytest.mark.parametrize("how", ["error", "head", "gone", "unread"])
def test_a_lease_is_given_back_however_the_stream_ends(narrow: Rig, how: str) -> None:
    """Ten of each kind through three slots, one after another."""
    for _ in range(10):
        if how == "error":
            path = narrow.upstream.serve(lambda ex: ex.abort())
            assert narrow.ask(path).read_head().status == 502
        elif how == "head":
            path = narrow.upstream.serve(lambda ex: ex.reply(b"", framing="none"))
            connection = Connection(narrow.port)
            connection.send("HEAD", "/v1" + path)
            assert connection.read_head().status == 200
        elif how == "gone":
            path = narrow.upstream.serve(mute)
            connection = narrow.ask(path)
            ex = narrow.upstream.next(path)
            connection.reset()
            gone(ex)
        else:
            path = narrow.upstream.serve(endless)
            connection = narrow.ask(path)
            narrow.upstream.next(path)
            connection.reset()
    narrow.no_stream_open()


def test_one_client_may_have_only_so_many_streams() -> None:
    for rig in _rig(max_streams_per_client="2"):
        path = rig.upstream.serve(silent)
        mine = [rig.ask(path) for _ in range(2)]
        for connection in mine:
            connection.read_head()
        refused = rig.ask(path).read_head()
        assert refused.status == 429
        assert json.loads(refused.finish().data)["error"]["code"] == "too_many_streams"
        # Another address, in the word of a trusted proxy, has its own.
        other = rig.ask(path, [("X-Forwarded-For", "127.0.0.9"), ("Accept", "text/event-stream")])
        assert other.read_head().status == 200
        for connection in [*mine, other]:
            connection.close()
        rig.no_stream_open()
