"""The log: JSON lines for programs, a short line for people at a terminal, and nothing lost without a word."""

from __future__ import annotations

import json
import os
import pty

import pytest

from relay.observe import log
from relay.record import Record


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
