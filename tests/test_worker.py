"""The gunicorn worker with no proxy in front: heads that dribble or never end, codings, drains, a log nobody reads."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream

from relay import errors
from relay.observe import log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.upstream import Exchange

EVENTS = [("Content-Type", "text/event-stream")]


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Upstream, servers.Gunicorn]]:
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
        yield upstream, relay


def answer_to(port: int, *pieces: bytes) -> tuple[int, dict[str, str]]:
    """The status and the error of what is said to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        for piece in pieces:
            try:
                sock.sendall(piece)
            except OSError:
                break
        data = b""
        try:
            while part := sock.recv(65536):
                data += part
        except ConnectionResetError:
            pass
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_head_that_comes_byte_by_byte_is_served(service: tuple[Upstream, servers.Gunicorn]) -> None:
    upstream, relay = service
    path = upstream.serve(lambda ex: ex.reply(ex.body))
    with Connection(relay.port) as connection:
        for byte in f"POST /v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello".encode():
            connection.raw(bytes([byte]))
        assert connection.read_head().finish().data == b"hello"
        connection.raw(f"GET /v1{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.read_head().finish().data == b""


@pytest.mark.parametrize("cut", [1, 2, 3, 10])
@pytest.mark.parametrize("before", [b"GET", b"POST"])
def test_a_head_whose_beginning_came_with_the_request_before_is_served(
    service: tuple[Upstream, servers.Gunicorn], before: bytes, cut: int
) -> None:
    """gunicorn holds that beginning already, and the end of it lies in what it holds and in what comes."""
    upstream, relay = service
    path = upstream.serve(lambda ex: ex.reply(ex.body or b"none"))
    target = f"/v1{path}".encode()
    first = before + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\n"
    first += b"Content-Length: 4\r\n\r\nbody" if before == b"POST" else b"\r\n"
    second = b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with Connection(relay.port) as connection:
        connection.raw(first + second[:-cut])
        assert connection.read_head().finish().data == (b"body" if before == b"POST" else b"none")
        connection.raw(second[-cut:])
        assert connection.read_head().finish().data == b"none"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"".join(b"X-%d: %s\r\n" % (n, b"x" * 8000) for n in range(20)), id="large-headers"),
        pytest.param(b"X: " + b"x" * 100_000, id="one-that-does-not-end"),
        pytest.param(b"a:b\r\n" * 20_000, id="many"),
    ],
)
def test_a_head_has_a_size(service: tuple[Upstream, servers.Gunicorn], head: bytes) -> None:
    status, error = answer_to(service[1].port, b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n" + head)
    assert (status, error["code"]) == (431, "bad_request")


@pytest.mark.slow
def test_a_head_that_dribbles_has_a_time(service: tuple[Upstream, servers.Gunicorn]) -> None:
    """No byte of it puts the clock back, and others are served meanwhile."""
    _, relay = service
    with socket.create_connection(("127.0.0.1", relay.port), timeout=DEADLINE) as sock:
        sock.sendall(b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        began = time.monotonic()
        sock.settimeout(0.2)
        data = b""
        while not data:
            try:
                sock.sendall(b"x")
                data = sock.recv(65536)
            except TimeoutError:
                assert time.monotonic() - began < DEADLINE + 15
        assert data.startswith(b"HTTP/1.1 408 ")
        assert request(relay.port, "GET", "/health/live").status == 200


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip,chunked", b"identity", b"chunked, gzip", b"x"])
def test_no_other_coding_than_chunked_is_taken(service: tuple[Upstream, servers.Gunicorn], coding: bytes) -> None:
    lines = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: " + coding
    status, _ = answer_to(service[1].port, lines + b"\r\n\r\n0\r\n\r\n")
    assert status in (400, 501)


def test_the_commands_variable_may_stand_in_the_environment() -> None:
    with servers.gunicorn({"RELAY_CLIENT_KEY": "a-key-of-a-client"}) as relay:
        assert request(relay.port, "GET", "/health/live").status == 200


def test_every_series_is_there_from_the_start(service: tuple[Upstream, servers.Gunicorn]) -> None:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": service[0].base_url}) as relay:
        told = request(relay.admin_port, "GET", "/metrics").finish().data.decode()
        for series in (
            'relay_open_streams{mount="relay"} 0.0',
            'relay_streams_ended_total{mount="relay",reason="done"} 0.0',
            'relay_streams_ended_total{mount="relay",reason="drained"} 0.0',
            'relay_refused_total{reason="full"} 0.0',
            'relay_tokens_total{kind="output",mount="relay"} 0.0',
            'relay_relayed_bytes_total{mount="relay"} 0.0',
        ):
            assert series in told
        for worker in relay.workers():
            os.kill(worker, signal.SIGKILL)

        def again() -> bool:
            try:
                found = request(relay.admin_port, "GET", "/metrics").finish().data
            except OSError:
                return False
            return b'relay_open_streams{mount="relay"} 0.0' in found

        eventually(again, "the gauge of the new workers", 20)


# --- Drains


def open_stream(upstream: Upstream, relay: servers.Gunicorn) -> tuple[Connection, Exchange]:
    path = upstream.by_hand()
    connection = Connection(relay.port)
    connection.send("POST", "/v1" + path, {"Accept": "text/event-stream"}, b"{}")
    ex = upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: 1\n\n")
    return connection, ex


def test_a_worker_whose_master_is_gone_drains() -> None:
    with Upstream() as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_DRAIN": "1s", "WEB_CONCURRENCY": "1"}
        with servers.gunicorn(env) as relay:
            connection, _ = open_stream(upstream, relay)
            response = connection.read_head()
            response.read_until(b"data: 1\n\n")
            os.kill(relay.pid, signal.SIGKILL)
            body = response.finish()
            assert b'"code": "drained"' in body.data
            assert body.ended == "cut"


def test_a_worker_that_has_served_its_requests_drains() -> None:
    with Upstream() as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_DRAIN": "1s", "WEB_CONCURRENCY": "1"}
        with servers.gunicorn(env, args=["--max-requests", "2"]) as relay:
            connection, _ = open_stream(upstream, relay)
            response = connection.read_head()
            response.read_until(b"data: 1\n\n")
            for _ in range(3):
                with_retry(relay.port)
            body = response.finish()
            assert b'"code": "drained"' in body.data
            eventually(lambda: '"reason": "drained"' in relay.log(), "the reason in the log")


def with_retry(port: int) -> None:
    def served() -> bool:
        try:
            return request(port, "GET", "/health/live").status == 200
        except OSError:
            return False

    eventually(served, "an answer", 20)


# --- The log


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    """Its pipe is full: lines are lost, counted, and the count is told once there is room again."""
    read, write = os.pipe()
    try:
        output = log._Output(write)
        for number in range(2000):  # more than a pipe holds; a write that waits would not come back
            output({"event": "request", "number": number, "text": "x" * 100})
        first = os.read(read, 1 << 20)
        output({"event": "request", "number": 2000})
        lines = [json.loads(line) for line in (first + os.read(read, 1 << 20)).splitlines()]
    finally:
        os.close(read)
        os.close(write)
    assert [line["event"] for line in lines[-2:]] == ["log_lines_lost", "request"]
    assert lines[-2]["lines"] + len(lines) - 1 == 2001


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "\u20ac" * 10_000, "\n\x00" * 5000], ids=["plain", "beyond ASCII", "control"]
)
@pytest.mark.parametrize("fields", [1, 12])
def test_the_fields_of_a_line_that_would_not_fit_are_cut(text: str, fields: int) -> None:
    said = {"event": "request", "request_id": "its-id", **{f"text-{n}": text for n in range(fields)}}
    read, write = os.pipe()
    try:
        output = log._Output(write)
        output._lost = 7
        output(dict(said))
        lost, line = os.read(read, 1 << 20).splitlines()
    finally:
        os.close(read)
        os.close(write)
    assert json.loads(lost)["lines"] == 7
    told = json.loads(line)
    assert len(line) <= select.PIPE_BUF - 200
    assert (told["event"], told["request_id"], set(told)) == ("request", "its-id", set(said))
    assert all(text.startswith(told[f"text-{n}"]) and len(told[f"text-{n}"]) >= 20 for n in range(fields))


def test_a_mounted_relays_lines_are_cut_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "relay"):
        log.refused(errors.BadRequest("no"), "its-id", "A" * 100_000, "127.0.0.1", "relay.relay")
    (record,) = caplog.records
    assert len(record.getMessage()) < 4096
    assert json.loads(record.getMessage())["method"] == "A" * 200
