"""An upstream that takes no connections: after five failures nobody waits for it but one request at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from harness import eventually, servers
from harness.client import Connection, request
from harness.servers import free_port
from harness.upstream import Upstream
from test_life import EVENTS

from relay import errors
from relay.upstream import breaker as breaker_module
from relay.upstream.breaker import Breaker
from relay.upstream.pool import Connection as Pooled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.client import Response


# --- The breaker itself


class Socket:
    closed = False

    def close(self) -> None:
        self.closed = True


def refused() -> Pooled:
    raise errors.UpstreamUnreachable("the upstream cannot be reached: Connection refused")


def nothing() -> None:
    pass


def made() -> Pooled:
    return Pooled(Socket())


@pytest.fixture
def kept() -> list[Pooled]:
    return []


@pytest.fixture
def broken(kept: list[Pooled]) -> Breaker:
    breaker = Breaker(kept.append, nothing)
    for _ in range(5):
        with pytest.raises(errors.UpstreamUnreachable):
            breaker.connect(refused, 5.0)
    return breaker


def test_four_failures_and_a_connection_are_forgotten(kept: list[Pooled]) -> None:
    breaker = Breaker(kept.append, nothing)
    for _ in range(3):
        for _ in range(4):
            with pytest.raises(errors.UpstreamUnreachable, match=r"refused$"):
                breaker.connect(refused, 5.0)
        breaker.connect(made, 5.0)


def test_after_five_one_tries_and_the_others_are_refused_at_once(broken: Breaker, kept: list[Pooled]) -> None:
    go_on, tried = threading.Event(), []

    def slowly() -> Pooled:
        tried.append(True)
        assert go_on.wait(20)
        return made()

    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(broken.connect, slowly, 5.0)
        eventually(lambda: bool(tried), "it tries")
        for _ in range(3):
            with pytest.raises(errors.UpstreamUnreachable, match="refused, 5 times in a row") as failure:
                broken.connect(made, 5.0)
            assert failure.value.may_retry
            assert failure.value.retry_after == 1
        with pytest.raises(errors.UpstreamUnreachable, match="5 times in a row"):
            trying.result(10)  # it does not wait to the end either
    assert len(tried) == 1
    go_on.set()
    eventually(lambda: len(kept) == 1, "the connection is there for the next request")
    assert broken.connect(made, 5.0).sock is not None
    assert len(kept) == 1


def test_a_try_that_succeeds_has_its_connection(broken: Breaker, kept: list[Pooled]) -> None:
    connection = broken.connect(made, 5.0)
    assert not connection.sock.closed
    assert not kept
    with pytest.raises(errors.UpstreamUnreachable, match=r"refused$"):
        broken.connect(refused, 5.0)  # which counts from the start again


def test_a_try_that_fails_says_why_and_the_next_one_tries(broken: Breaker) -> None:
    def other() -> Pooled:
        raise errors.UpstreamUnreachable("the certificate has expired", code="upstream_certificate")

    for _ in range(3):
        with pytest.raises(errors.UpstreamUnreachable, match=r"^the certificate has expired$") as failure:
            broken.connect(other, 5.0)
        assert failure.value.code == "upstream_certificate"


def test_a_client_that_leaves_early_is_no_failure(kept: list[Pooled]) -> None:
    class Left(BaseException):
        pass

    def leaves() -> Pooled:
        raise Left

    breaker = Breaker(kept.append, nothing)
    for _ in range(10):
        with pytest.raises(Left):
            breaker.connect(leaves, 5.0)
    assert breaker.connect(made, 5.0) is not None
    for _ in range(5):
        with pytest.raises(Left):
            breaker.connect(leaves, 0.0)  # its time was over
    with pytest.raises(errors.UpstreamUnreachable):
        breaker.connect(refused, 5.0)


def test_a_try_that_does_not_end_keeps_nobody_from_trying(kept: list[Pooled]) -> None:
    """Such as a look-up whose resolver hangs."""
    stuck = []
    breaker = Breaker(kept.append, lambda: stuck.append(True))
    for _ in range(5):
        with pytest.raises(errors.UpstreamUnreachable):
            breaker.connect(refused, 0.1)
    hanging = threading.Event()

    def hangs() -> Pooled:
        assert hanging.wait(20)
        return made()

    with pytest.raises(errors.UpstreamUnreachable):
        breaker.connect(hangs, 0.1)

    def back() -> bool:
        with contextlib.suppress(errors.UpstreamUnreachable):
            return breaker.connect(made, 0.1) is not None
        return False

    eventually(back, "another tries")
    assert stuck == [True]
    hanging.set()
    eventually(lambda: len(kept) == 1, "what came of the first is kept")
    assert breaker.connect(made, 0.1) is not None


def test_a_try_that_cannot_begin_keeps_nobody_from_trying(broken: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(errors.UpstreamUnreachable, match="5 times in a row"):
            broken.connect(made, 5.0)
    assert broken.connect(made, 5.0) is not None


def test_a_process_that_was_forked_begins_anew(broken: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", nothing_starts)
        patch.setattr(breaker_module, "_PATIENCE", 0.0)
        with pytest.raises(errors.UpstreamUnreachable):
            broken.connect(made, 5.0)
    with pytest.raises(errors.UpstreamUnreachable, match="5 times in a row"):
        broken.connect(made, 5.0)  # one tries, for ever
    here = os.getpid()
    monkeypatch.setattr(breaker_module.os, "getpid", lambda: here + 1)
    assert broken.connect(made, 5.0) is not None


def nothing_starts(_: threading.Thread) -> None:
    """A thread that is in another process."""


def test_what_is_long_ago_is_forgotten(broken: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all but one of the first requests in the morning are refused for what was in the evening."""
    then = time.monotonic()
    monkeypatch.setattr(breaker_module.time, "monotonic", lambda: then + 31)
    with pytest.raises(errors.UpstreamUnreachable, match=r"refused$"):
        broken.connect(refused, 5.0)
    with pytest.raises(errors.UpstreamUnreachable, match=r"refused$"):
        broken.connect(refused, 5.0)


def test_a_failure_that_began_before_the_last_connection_says_nothing(kept: list[Pooled]) -> None:
    breaker = Breaker(kept.append, nothing)
    go_on = threading.Event()

    def late() -> Pooled:
        assert go_on.wait(20)
        return refused()

    with ThreadPoolExecutor(10) as pool:
        begun = [pool.submit(breaker.connect, late, 5.0) for _ in range(10)]
        breaker.connect(made, 5.0)
        go_on.set()
        for each in begun:
            with pytest.raises(errors.UpstreamUnreachable):
                each.result(10)
    with pytest.raises(errors.UpstreamUnreachable, match=r"refused$"):
        breaker.connect(refused, 5.0)


# --- In the service


@contextlib.contextmanager
def nobody() -> Iterator[int]:
    """A port that takes no connection and refuses none: its queue is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port: int = full.getsockname()[1]
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield port


def ask(port: int, headers: list[tuple[str, str]] | None = None) -> Response:
    connection = Connection(port)
    connection.send("POST", "/v1/x", headers or [], b"{}")
    return connection.read_head()


def code(response: Response) -> str:
    return str(json.loads(response.finish().data)["error"]["code"])


def test_nobody_waits_for_an_upstream_that_does_not_answer_to_a_connection() -> None:
    with (
        nobody() as port,
        servers.gunicorn(
            {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{port}", "RELAY_CONNECT_TIMEOUT": "3", "RELAY_HEALTH_TTL": "0"}
        ) as relay,
    ):
        with ThreadPoolExecutor(8) as pool:
            first = [(each.status, code(each)) for each in pool.map(ask, [relay.port] * 8)]
        assert first == [(504, "connect_timeout")] * 8
        began = time.monotonic()
        for _ in range(30):
            response = ask(relay.port)
            assert response.status == 502
            assert response.header("x-should-retry") is None, "nothing was sent"
            assert response.header("Retry-After") in (b"1", b"2")
            assert code(response) == "upstream_unreachable"
        assert time.monotonic() - began < 30, "most of them at once"
        report = json.loads(request(relay.admin_port, "GET", "/health").finish().data)
        assert (report["status"], report["upstream"]["reachable"]) == ("down", False)
        metrics = request(relay.admin_port, "GET", "/metrics").finish().data
        assert b'relay_upstream_reachable{mount="relay"} 0.0' in metrics


def test_the_first_request_after_it_is_back_is_served() -> None:
    port = free_port()
    with servers.gunicorn({"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{port}"}) as relay:
        for _ in range(12):
            response = ask(relay.port)
            assert (response.status, code(response)) == (502, "upstream_unreachable")
        with socket.create_server(("127.0.0.1", port)) as listener:
            threading.Thread(target=_answer_one, args=(listener,), daemon=True).start()
            response = ask(relay.port)
            assert (response.status, response.finish().data) == (200, b"{}")


def _answer_one(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


def test_requests_without_an_answer_are_told_by_health_though_probes_are_answered() -> None:
    with Upstream() as upstream:
        upstream.serve(lambda ex: ex.reply(b"{}", 200, "OK", [("Content-Type", "application/json")]), "/models")
        path = upstream.serve(lambda ex: ex.wait_gone(30))
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_FIRST_BYTE_TIMEOUT": "0.3",
            "RELAY_HEALTH_TTL": "60",
        }
        with servers.gunicorn(env) as relay:

            def report() -> dict[str, object]:
                found: dict[str, object] = json.loads(request(relay.admin_port, "GET", "/health").finish().data)
                return found

            assert report()["status"] == "ok"
            for _ in range(5):
                assert request(relay.port, "POST", "/v1" + path).status == 504
            told = report()
            assert told["status"] == "degraded"
            assert told["upstream"]["reachable"] is True  # type: ignore[index]
            assert "none of the last 5 requests was answered" in told["upstream"]["error"]  # type: ignore[index]
            good = upstream.serve(lambda ex: ex.reply(b"data: 1\n\n", 200, "OK", EVENTS))
            assert request(relay.port, "POST", "/v1" + good).status == 200
            assert report()["status"] == "ok"
