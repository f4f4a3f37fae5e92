"""The log: JSON lines for programs, a short line for people at a terminal, and nothing lost without a word."""

from __future__ import annotations

import json
import os
import pty
import select
from typing import TYPE_CHECKING

import pytest
from harness import eventually, servers
from harness.client import request
from harness.upstream import Upstream

from relay.observe import log
from relay.record import Record

if TYPE_CHECKING:
    from collections.abc import Iterator


def a_record() -> Record:
    record = Record("the-id", "POST", "relay.relay", "127.0.0.1", "127.0.0.1", "relay")
    record.status, record.reason, record.first_byte, record.seconds, record.bytes = 200, "done", 0.25, 1.5, 1000
    record.admitted = True
    return record


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_emit", log._emit)


def test_a_program_gets_json() -> None:
    reading, writing = os.pipe()
    log._emit = log._Output(writing)
    log.ended(a_record())
    line = json.loads(os.read(reading, 4096))
    assert (line["event"], line["request_id"], line["reason"], line["total_ms"]) == (
        "request",
        "the-id",
        "done",
        1500.0,
    )
    os.close(reading)
    os.close(writing)


def test_a_person_gets_a_short_line() -> None:
    reading, writing = pty.openpty()
    log._emit = log._Output(writing)
    log.ended(a_record())
    line = os.read(reading, 4096).decode()
    assert "POST    200 done: 1.5 s, first byte 250 ms, 0 events, 1000 bytes  (the-id)" in line
    log.event("demo", message="what is relayed is the demo")
    assert "demo: what is relayed is the demo" in os.read(reading, 4096).decode()
    os.close(reading)
    os.close(writing)


def test_lines_that_a_full_disk_has_swallowed_are_counted_and_told() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    output = log._Output(full)
    log._emit = output
    log.ended(a_record())
    log.ended(a_record())
    reading, writing = os.pipe()
    os.dup2(writing, full)  # there is room again
    log.ended(a_record())
    lost, line = map(json.loads, os.read(reading, 4096).splitlines())
    assert lost == {"event": "log_lines_lost", "lines": 2}
    assert line["event"] == "request"
    for descriptor in (full, reading, writing):
        os.close(descriptor)


LONG = "x" * 6000
JSON = [("Content-Type", "application/json")]
WITH_A_LONG = {
    "request id": lambda port: request(port, "POST", "/v1/x", [("X-Request-ID", LONG)], b"{}"),
    "path": lambda port: request(port, "POST", f"/v1/{LONG}", JSON, b"{}"),
    "query": lambda port: request(port, "POST", f"/v1/x?a={LONG}", JSON, b"{}"),
    "method": lambda port: request(port, LONG.upper()[:15], "/v1/x", JSON, b"{}"),
    "no method": lambda port: request(port, LONG.upper(), "/v1/x", JSON, b"{}"),
    "host": lambda port: request(port, "POST", "/v1/x", [("Host", LONG)], b"{}"),
    "origin": lambda port: request(port, "POST", "/v1/x", [("Origin", f"https://{LONG}.example")], b"{}"),
    "model": lambda port: request(port, "POST", "/v1/chat/completions", JSON, json.dumps({"model": LONG}).encode()),
    "model of a kind that is none": lambda port: request(
        port, "POST", "/v1/chat/completions", JSON, json.dumps({"model": [LONG] * 30}).encode()
    ),
    "key": lambda port: request(port, "POST", "/v1/x", [("Authorization", f"Bearer {LONG}")], b"{}"),
    "address": lambda port: request(port, "POST", "/v1/x", [("X-Forwarded-For", LONG)], b"{}"),
    "content type": lambda port: request(port, "POST", "/v1/x", [("Content-Type", LONG)], b"{}"),
}


@pytest.mark.parametrize("what", WITH_A_LONG)
def test_whatever_a_client_makes_long_its_line_is_not(calm: servers.Gunicorn, what: str) -> None:
    calm.mark()
    WITH_A_LONG[what](calm.port).finish()
    request(calm.port, "POST", "/v1/x", [("X-Request-ID", f"after-{what.replace(' ', '-')}")], b"{}").finish()
    eventually(lambda: "after-" in calm.log_since_mark(), "its line")
    lines = calm.log_since_mark().splitlines()
    assert lines
    assert max(map(len, lines)) < select.PIPE_BUF


def test_whatever_an_upstream_makes_long_its_line_is_not() -> None:
    headers = [("X-Request-ID", LONG * 5), ("Content-Type", LONG), ("Server", LONG)]
    with (
        Upstream(lambda ex: ex.reply(b"{}", 500, LONG, headers)) as upstream,
        servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay,
    ):
        request(relay.port, "POST", "/v1/x", [("X-Request-ID", "this-one")], b"{}").finish()
        relay.wait_log("this-one")
        assert max(map(len, relay.log().splitlines())) < select.PIPE_BUF


@pytest.fixture(scope="module")
def calm() -> Iterator[servers.Gunicorn]:
    with (
        Upstream(lambda ex: ex.reply(b"{}")) as upstream,
        servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay,
    ):
        yield relay
