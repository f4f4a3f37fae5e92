"""Request bodies: a slot before the body, clocks while it comes, a bound on what is held, and an app that waits for
none of it."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask, request
from harness import REPO, eventually, servers
from harness.client import Connection
from harness.client import request as ask
from harness.upstream import Upstream
from werkzeug.serving import make_server

from relay import Relay
from relay.gate.bodies import Memory
from relay.web.intake import Intake
from relay.web.request import Expected

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.client import Response
    from harness.servers import Gunicorn

MIB = 1024 * 1024
BODY = b'{"input": "' + b"x" * 100_000 + b'"}'


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(lambda ex: ex.reply(b"{}")) as running:
        yield running


def begin_upload(port: int, announced: int, sent: int, **headers: str) -> Connection:
    """A POST that stops in the middle of its body."""
    connection = Connection(port)
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}Content-Length: {announced}\r\n\r\n"
    connection.raw(head.encode() + bytes(sent))
    return connection


def receive(connection: Connection) -> bytes:
    """What comes next, before any head of an answer."""
    got: bytes = connection._sock.recv(1000)
    return got


def code(response: Response) -> tuple[int, str]:
    return response.status, json.loads(response.finish().data)["error"]["code"]


def open_streams(server: Gunicorn) -> list[dict[str, Any]]:
    streams: list[dict[str, Any]] = json.loads(ask(server.admin_port, "GET", "/streams").finish().data)
    return streams


def resident(pid: int) -> int:
    """Bytes of memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_client_without_a_slot_fills_no_memory(upstream: Upstream) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_MAX_STREAMS_PER_CLIENT": "1"}
    with servers.gunicorn(env) as server, contextlib.ExitStack() as stack:
        assert ask(server.port, "POST", "/v1/x", {}, b"warm").finish()
        (worker,) = server.workers()
        before = resident(worker)
        first = stack.enter_context(begin_upload(server.port, 32 * MIB, 4 * MIB))
        eventually(lambda: [s["bytes"] for s in open_streams(server)] == [4 * MIB], "the first upload")
        assert open_streams(server)[0]["state"] == "uploading"
        others = [stack.enter_context(begin_upload(server.port, 32 * MIB, 64)) for _ in range(40)]
        for other in others:
            assert code(other.read_head()) == (429, "too_many_streams")
        for other in others:
            with contextlib.suppress(OSError):
                other.raw(bytes(MIB))
        assert resident(worker) - before < 24 * MIB
        first.close()
        eventually(lambda: not open_streams(server), "the slot")
        assert ask(server.port, "POST", "/v1/x", {}, BODY).status == 200


def test_slow_uploads_take_no_slots_from_others(upstream: Upstream) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_MAX_STREAMS": "1"}
    with servers.gunicorn(env) as server, contextlib.ExitStack() as stack:
        uploads = [stack.enter_context(begin_upload(server.port, 2000, 1000)) for _ in range(3)]
        eventually(lambda: len(open_streams(server)) == 3, "the uploads")
        assert ask(server.port, "POST", "/v1/x", {}, BODY).status == 200
        for upload in uploads:
            upload.raw(bytes(1000))
            response = upload.read_head()
            assert response.status == 200
            response.finish()
        eventually(lambda: not open_streams(server), "their end")
        assert ask(server.port, "POST", "/v1/x", {}, BODY).status == 200


def test_bodies_of_a_worker_are_bounded_together(upstream: Upstream) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_BODY_MEMORY": "2MiB", "RELAY_MAX_BODY": "2MiB"}
    with servers.gunicorn(env) as server:
        with begin_upload(server.port, 2 * MIB, 3 * MIB // 2) as first:
            eventually(lambda: [s["bytes"] for s in open_streams(server)] == [3 * MIB // 2], "the first upload")
            refused = ask(server.port, "POST", "/v1/x", {}, bytes(MIB))
            assert refused.header("Retry-After") is not None
            assert code(refused) == (503, "full")
            assert ask(server.port, "POST", "/v1/x", {}, bytes(MIB // 4)).status == 200  # announcing takes nothing
            first.raw(bytes(MIB // 2))
            assert first.read_head().status == 200
        for body in (bytes(2 * MIB), iter([bytes(MIB), bytes(MIB)])):  # it is free again, for chunks too
            assert ask(server.port, "POST", "/v1/x", {}, body).status == 200
        for broken in range(3):
            with begin_upload(server.port, 2 * MIB, MIB) as leaver:
                eventually(lambda: len(open_streams(server)) == 1, "the upload")
                leaver.reset() if broken else leaver.half_close()
            eventually(lambda: not open_streams(server), "the end of the upload")
        assert ask(server.port, "POST", "/v1/x", {}, bytes(2 * MIB)).status == 200


def test_a_client_that_asks_first_is_told_to_go_on_once_it_has_a_slot(upstream: Upstream) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_MAX_STREAMS_PER_CLIENT": "1"}
    with servers.gunicorn(env) as server:
        with begin_upload(server.port, 5, 0, Expect="100-continue") as first:
            assert receive(first) == b"HTTP/1.1 100 Continue\r\n\r\n"
            with begin_upload(server.port, 5, 0, Expect="100-continue") as second:
                assert code(second.read_head()) == (429, "too_many_streams")
                second.wait_closed()  # what it may send now is no request
            first.raw(b"hello")
            assert first.read_head().status == 200
            assert upstream.seen()[-1].body == b"hello"
        assert ask(server.port, "POST", "/v1/x", {}, b"next").status == 200


@pytest.mark.parametrize("sent", [1000, 300_000])
def test_a_restart_ends_an_upload_with_a_word(upstream: Upstream, sent: int) -> None:
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_DRAIN": "1s"}
    with servers.gunicorn(env) as server, begin_upload(server.port, MIB, sent) as connection:
        eventually(lambda: len(open_streams(server)) == 1, "the upload")
        server.send_signal(signal.SIGTERM)
        response = connection.read_head()
        assert response.header("x-should-retry") is None
        assert code(response) == (503, "drained")


@contextlib.contextmanager
def gevent(upstream: Upstream) -> Iterator[int]:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as server:
        yield server.port


@contextlib.contextmanager
def gthread(upstream: Upstream) -> Iterator[int]:
    env = {"PYTHONPATH": str(REPO / "tests"), "SHOP_FIRST_URL": upstream.base_url, "SHOP_SECOND_URL": upstream.base_url}
    options = ["-k", "gthread", "--threads", "8"]
    with servers.gunicorn(env, "test_uploads:plain()", None, options, ready=None) as server:
        yield server.port


def plain() -> Flask:
    import os

    app = Flask("plain")
    Relay(app, url_prefix="/v1", settings={"RELAY_UPSTREAM_URL": os.environ["SHOP_FIRST_URL"]})
    return app


@contextlib.contextmanager
def werkzeug(upstream: Upstream) -> Iterator[int]:
    app = Flask("plain")
    Relay(app, url_prefix="/v1", settings={"RELAY_UPSTREAM_URL": upstream.base_url})
    with served(app) as port:
        yield port


@contextlib.contextmanager
def served(app: Flask) -> Iterator[int]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_uploads_that_are_too_slow_end_under_every_server(upstream: Upstream) -> None:
    """One that stops, and one that dribbles; the clocks of all run at the same time."""
    with contextlib.ExitStack() as stack:
        uploads = []
        for server in (gevent, gthread, werkzeug):
            port = stack.enter_context(server(upstream))
            stopped = stack.enter_context(begin_upload(port, MIB, 300_000))
            dribbles = stack.enter_context(begin_upload(port, MIB, 0))
            uploads.append((stopped, dribbles))
        over = threading.Event()

        def dribble() -> None:
            while not over.wait(0.3):
                for _, connection in uploads:
                    with contextlib.suppress(OSError):
                        connection.raw(bytes(20))

        dribbler = threading.Thread(target=dribble)
        dribbler.start()
        try:
            for stopped, dribbles in uploads:
                assert code(stopped.read_head(40)) == (408, "request_timeout")
                assert code(dribbles.read_head(40)) == (408, "request_timeout")
        finally:
            over.set()
            dribbler.join()


class Clock:
    """An upload without sockets: what has come by when."""

    def __init__(self) -> None:
        self.intake = Intake({"wsgi.input": None}, Expected(MIB, MIB, ""), MIB, lambda _: iter(()))  # type: ignore[arg-type,return-value]
        self.intake.start(0.0)

    def late(self, now: float, received: int) -> bool:
        self.intake.received = received
        return self.intake.overdue(now)


@pytest.mark.parametrize(
    ("looks", "late"),
    [
        pytest.param([(14.9, 0)], False, id="silent-for-less"),
        pytest.param([(15.1, 0)], True, id="silent"),
        pytest.param([(9.9, 8192)], False, id="slow-for-less"),
        pytest.param([(10.1, 8192)], True, id="slow"),
        pytest.param([(10.1, 50_000), (20.2, 100_000), (30.3, 150_000)], False, id="steady"),
        pytest.param([(10.1, 500_000), (20.3, 508_192)], True, id="slower-later"),
        pytest.param([(10.1, 500_000), (25.0, 500_000)], False, id="pause"),
        pytest.param([(10.1, 500_000), (25.2, 500_000)], True, id="stopped-later"),
    ],
)
def test_the_clocks(looks: list[tuple[float, int]], late: bool) -> None:
    clock = Clock()
    assert [clock.late(*look) for look in looks] == [False] * (len(looks) - 1) + [late]


def test_others_have_their_turn_while_a_body_is_read() -> None:
    body = bytes(MIB)
    finished: list[object] = []

    def finish(body: object) -> Iterator[None]:
        finished.append(body)
        yield from ()

    environ = {"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True}
    intake = Intake(environ, Expected(MIB, MIB, ""), MIB, finish)  # type: ignore[arg-type]
    came = [0, *(intake.received for _ in intake.steps())]
    intake.release()
    assert finished == [body]
    assert max(after - before for before, after in itertools.pairwise([*came, MIB])) <= 128 * 1024


def test_memory_is_counted_as_it_is_taken() -> None:
    memory = Memory()
    assert memory.take(6, 10)
    assert not memory.take(5, 10)
    assert memory.take(4, 10)
    memory.give_back(10)
    assert memory.held == 0


# --- in an app ------------------------------------------------------------------------------------------------------


def test_slow_uploads_hold_nothing_of_the_apps(upstream: Upstream) -> None:
    """A pool of two, from which each request of the app takes one before its view."""
    app = Flask("pool")
    pool = threading.BoundedSemaphore(2)
    Relay(app, url_prefix="/v1", settings={"RELAY_UPSTREAM_URL": upstream.base_url})

    @app.before_request
    def take() -> Any:
        return None if pool.acquire(timeout=5) else ("the pool is empty", 500)

    @app.teardown_request
    def give_back(_: object) -> None:
        pool.release()

    app.add_url_rule("/page", view_func=lambda: "page")
    with served(app) as port, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(begin_upload(port, MIB, 1000))
        assert ask(port, "GET", "/page").status == 200


READERS: dict[str, Callable[[], object]] = {
    "get_data": lambda: request.get_data(cache=True),
    "get_data without a cache": lambda: request.get_data(cache=False),
    "json": lambda: request.get_json(force=True, silent=True),
    "form": lambda: request.form,
    "some of the stream": lambda: request.stream.read(10),
    "all of the stream": lambda: request.stream.read(-1),
    "a line": lambda: request.environ["wsgi.input"].readline(100),
    "nothing": lambda: None,
}
FORM = "application/x-www-form-urlencoded"
PARTS = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--b--\r\n'


@pytest.fixture(scope="module")
def hooked(upstream: Upstream) -> Iterator[int]:
    app = Flask("hooked")
    app.config["MAX_CONTENT_LENGTH"] = 200_000
    app.before_request(lambda: [None, READERS[request.headers["X-Reader"]]()][0])
    Relay(app, url_prefix="/v1", settings={"RELAY_UPSTREAM_URL": upstream.base_url})
    with served(app) as port:
        yield port


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        pytest.param("application/json", BODY, id="json"),
        pytest.param(FORM, b"a=1&b=%20&" * 1000, id="form"),
        pytest.param("multipart/form-data; boundary=b", PARTS, id="parts"),
        pytest.param("text/plain", b"one\ntwo\n", id="lines"),
    ],
)
def test_a_body_that_a_hook_has_read_goes_upstream(
    upstream: Upstream, hooked: int, reader: str, kind: str, body: bytes
) -> None:
    before = len(upstream.seen())
    assert ask(hooked, "POST", "/v1/x", {"Content-Type": kind, "X-Reader": reader}, body).status == 200
    (seen,) = upstream.seen()[before:]
    assert seen.body == body


def test_the_apps_own_limit_counts(hooked: int) -> None:
    response = ask(hooked, "POST", "/v1/x", {"X-Reader": "nothing"}, bytes(200_001))
    error = json.loads(response.finish().data)["error"]
    assert (response.status, error["code"]) == (413, "body_too_large")
    assert "MAX_CONTENT_LENGTH" in error["message"]


# --- how a body is framed -------------------------------------------------------------------------------------------


def test_bodies_in_a_row_on_one_connection(upstream: Upstream) -> None:
    """What follows a body is the next request's, whether it came along with it or not."""
    env = {"RELAY_UPSTREAM_URL": upstream.base_url}
    with servers.gunicorn(env) as server, Connection(server.port) as connection:
        before = len(upstream.seen())
        one = b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s"
        chunks = b"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        connection.raw(one % (3, b"abc") + chunks + one % (len(BODY), BODY) + one % (0, b""))
        for _ in range(4):
            response = connection.read_head()
            assert response.status == 200
            response.read_exactly(2)  # and not more: the next answer may be there already
        assert [ex.body for ex in upstream.seen()[before:]] == [b"abc", b"hello", BODY, b""]
        with socket.create_connection(("127.0.0.1", server.port)) as old:
            old.sendall(b"POST /v1/x HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc")
            assert b" 200 " in old.recv(100)
