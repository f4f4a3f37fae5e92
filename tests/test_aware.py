"""Streams for clients that report in: through real gunicorn with several workers, and mounted under plain threads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import DeadlineExceeded, eventually, llm, servers
from harness.calm import undisturbed
from harness.client import request
from harness.upstream import Upstream
from test_prompts import CHAT, DONE, JSON, STREAM, Place, chunk, events, said

from relay.shared import reports

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.client import Response
    from harness.upstream import Exchange

_SHOP = """
import tempfile
tempfile.tempdir = %r
from flask import Flask
from relay import Relay

app = Flask("shop")
relay = Relay(app, url_prefix="/ai", settings=%r)
"""
_SETTINGS = {"RELAY_HEARTBEAT": "400ms"}  # reports are missed after 1.2 s


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module", params=["service", "gthread"])
def place(
    upstream: Upstream, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """The service with three workers, and a mounted relay with two under plain threads."""
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url, **_SETTINGS}
    if request.param == "service":
        with servers.gunicorn({**settings, "WEB_CONCURRENCY": "3"}) as relay:
            eventually(lambda: len(relay.workers()) == 3, "all workers")
            yield Place(upstream, relay.port, "", relay)
        return
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(_SHOP % (str(folder), settings))
    args = ["-k", "gthread", "--threads", "8", "-w", "2"]
    with servers.gunicorn({"PYTHONPATH": str(folder)}, "shop:app", None, args, ready=None) as relay:
        yield Place(upstream, relay.port, "/ai/_relay", relay)


def begin(place: Place, **how: Any) -> tuple[Response, str, Exchange]:
    """A stream that has told its id; the upstream has not answered."""
    place.by_hand()
    before = len(place.upstream.seen(CHAT))
    connection = place.post("/stream/aware", prompt="Hello", **how)
    response = connection.read_head()
    assert response.status == 200
    first = response.read_event()
    ((name, stream_id),) = events(first)
    assert name == "stream_id"
    assert reports.is_id(stream_id)
    ex = place.upstream.wait_for(before + 1, CHAT)
    place.upstream.next(CHAT)
    return response, stream_id, ex


def report(place: Place, stream_id: str, headers: dict[str, str] | None = None) -> int:
    response = request(place.port, "POST", f"{place.at}/stream/heartbeat?stream_id={stream_id}", headers or {})
    data = response.finish().data
    assert response.status != 204 or data == b""
    return response.status


def test_the_id_comes_before_the_upstream_has_answered_and_the_text_after(place: Place) -> None:
    response, _, ex = begin(place)
    ex.head(headers=STREAM)
    for each in llm.chat_events():
        ex.send(each)
    ex.end()
    body = response.finish()
    assert body.ended == "clean"
    found = [each for each in events(body.data) if each[0] not in ("ping", "stream_id")]
    assert said(found) == llm.TEXT
    assert found[-1][0] == "done"


def test_pings_stand_for_heartbeats(place: Place) -> None:
    response, stream_id, ex = begin(place)
    for _ in range(2):
        ((name, data),) = events(response.read_event())
        assert name == "ping"
        ping = json.loads(data)
        assert ping["stream_id"] == stream_id
        assert ping["silent_s"] >= 0.4
    ex.head(headers=STREAM)
    ex.send(chunk("x", "stop") + DONE)
    ex.end()
    assert b": keep-alive" not in response.finish().data


def test_a_client_that_has_never_reported_need_not(place: Place) -> None:
    response, _, ex = begin(place)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        assert events(response.read_event())[0][0] == "ping"
    ex.head(headers=STREAM)
    ex.send(chunk("x", "stop") + DONE)
    ex.end()
    assert response.finish().ended == "clean"


@undisturbed(0.5)
def test_a_client_that_reports_in_at_any_worker_keeps_its_stream_and_one_that_stops_to_loses_it(place: Place) -> None:
    response, stream_id, ex = begin(place)
    ex.head(headers=STREAM)
    (file,) = files(place, stream_id)
    owner = int(file.read_text().split()[0])
    until = time.monotonic() + 3
    while time.monotonic() < until:
        os.kill(owner, signal.SIGSTOP)  # so that another worker takes the report
        try:
            reported = time.monotonic()
            assert report(place, stream_id) == 204
        finally:
            os.kill(owner, signal.SIGCONT)
        assert not ex.gone
        ex.send(chunk("x"))
        time.sleep(0.2)
    assert ex.wait_gone() - reported > 1.2
    body = response.finish()
    assert body.ended == "cut"
    (error,) = [json.loads(data)["error"] for name, data in events(body.data) if name == "error"]
    assert error["code"] == "heartbeat_missed"
    eventually(lambda: '"reason": "client_gone"' in place.relay.log() or bool(place.at), "the reason in the log")
    eventually(lambda: report(place, stream_id) == 404, "the stream's id is known no more")


def test_reports_hold_while_a_pace_is_waited_for(place: Place) -> None:
    response, stream_id, ex = begin(place, max_events_per_second=0.1)
    ex.head(headers=STREAM)
    ex.send(b"".join(map(chunk, "abc")))
    response.read_until(b"data: a\n\n")
    assert report(place, stream_id) == 204
    ex.wait_gone(8)
    assert response.finish().ended == "cut"


def test_an_id_that_is_none_is_refused(place: Place) -> None:
    for stream_id, status in (
        ("", 400), ("x", 400), ("../../etc/passwd", 400), ("%2e%2e%2fx", 400), ("A" * 32, 400), ("0" * 31, 400),
        ("0" * 33, 400), ("0" * 32 + "%0a", 400), ("streams-1.sock", 400), ("0" * 32, 404),
    ):  # fmt: skip
        assert report(place, stream_id) == status, stream_id
    response = request(place.port, "POST", f"{place.at}/stream/heartbeat", JSON, b"{}")
    assert response.status == 400
    assert "stream_id is missing" in json.loads(response.finish().data)["error"]["message"]


def test_an_upstreams_error_is_told_with_all_its_words(place: Place) -> None:
    response, _, ex = begin(place)
    ex.reply(llm.openai_error("slow down", "t", "c"), 429, headers=llm.JSON)
    body = response.finish()
    assert body.ended == "clean"
    found = [each for each in events(body.data) if each[0] not in ("ping", "stream_id")]
    assert [name for name, _ in found] == ["error"]
    error = json.loads(found[0][1])["error"]
    assert (error["message"], error["status"]) == ("slow down", 429)


def test_a_client_that_leaves_ends_it_and_its_file_goes(place: Place) -> None:
    response, stream_id, ex = begin(place)
    (file,) = files(place, stream_id)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    response.close()
    ex.wait_gone()
    eventually(lambda: not file.exists(), "the file's end")
    assert report(place, stream_id) == 404


def files(place: Place, stream_id: str) -> list[Path]:
    """Where the servers under test keep their notes."""
    found = [path for root in ("/dev/shm", "/tmp") for path in Path(root).glob(f"relay-run-*/{stream_id}")]
    for root in Path("/tmp").glob("pytest-of-*"):
        for process in ("*", "*/popen-*"):  # with several test processes each has a folder of its own
            found += root.glob(f"{process}/shop*/flask-sse-relay-*/{stream_id}")
    return [path for path in found if not any(parent.is_symlink() for parent in path.parents)]


def test_what_a_killed_worker_has_left_goes(upstream: Upstream) -> None:
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "WEB_CONCURRENCY": "2", **_SETTINGS}
    with servers.gunicorn(settings) as relay:
        eventually(lambda: len(relay.workers()) == 2, "all workers")
        place = Place(upstream, relay.port, "", relay)
        left = {}
        streams = []
        for _ in range(2):
            response, stream_id, ex = begin(place)
            streams.append((response, ex))  # one that is let go is closed, and its file goes with it
            (left[stream_id],) = files(place, stream_id)
        owners = {int(file.read_text().split()[0]) for file in left.values()}
        before = relay.workers()
        assert owners <= set(before)
        for worker in before:
            os.kill(worker, 9)
        eventually(lambda: len(set(relay.workers()) - set(before)) == 2, "other workers", 20)
        for response, ex in streams:
            with contextlib.suppress(AssertionError):
                response.finish()
            ex.wait_gone()
        first, second = left
        assert report(place, first) == 404
        assert not left[first].exists()
        response, _, ex = begin(place)  # a worker's first such stream sweeps
        assert not left[second].exists()
        response.close()
        ex.wait_gone()


def test_only_the_owner_may_report(upstream: Upstream) -> None:
    settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_CLIENT_KEYS": "key-a,key-b"}
    with servers.gunicorn(settings) as relay:
        place = Place(upstream, relay.port, "", relay)
        place.by_hand()
        mine, other = ({"Authorization": f"Bearer key-{name}"} for name in "ab")
        connection = place.post("/stream/aware", mine, prompt="Hello")
        response = connection.read_head()
        ((_, stream_id),) = events(response.read_event())
        assert report(place, stream_id) == 401
        assert report(place, stream_id, other) == 404
        assert report(place, stream_id, {**mine, "Origin": "https://evil.example"}) == 403
        assert report(place, stream_id, mine) == 204
        ticket = json.loads(request(relay.port, "POST", "/ticket", mine).finish().data)["ticket"]
        assert report(place, f"{stream_id}&ticket={ticket}") == 204
        connection.close()
        place.next().wait_gone()


def test_without_heartbeats_there_are_no_pings(upstream: Upstream) -> None:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_HEARTBEAT": "0"}) as relay:
        place = Place(upstream, relay.port, "", relay)
        response, stream_id, ex = begin(place)
        assert report(place, stream_id) == 204
        with pytest.raises(DeadlineExceeded):
            response.read_some(1.5)
        ex.abort()
        body = response.finish()
        assert [name for name, _ in events(body.data)] == ["stream_id", "error"]
        assert body.ended == "cut"


def test_a_folder_that_others_can_write_to_is_not_used(upstream: Upstream, tmp_path: Path) -> None:
    """The name of a mounted relay's folder is known, so that somebody else may have made it."""
    (tmp_path / "shop.py").write_text(_SHOP % (str(tmp_path), {"RELAY_UPSTREAM_URL": upstream.base_url}))
    folder = tmp_path / f"flask-sse-relay-{os.geteuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    args = ["-k", "gthread", "--threads", "4"]
    with servers.gunicorn({"PYTHONPATH": str(tmp_path)}, "shop:app", None, args, ready=None) as relay:
        place = Place(upstream, relay.port, "/ai/_relay", relay)

        def refused() -> None:
            before = len(upstream.seen())
            response = place.ask("/stream/aware", prompt="Hello")
            assert response.status == 500
            assert json.loads(response.finish().data)["error"]["code"] == "relay_error"
            assert report(place, "0" * 32) == 500
            assert len(upstream.seen()) == before

        folder.mkdir(mode=0o755)
        folder.chmod(0o777)
        refused()
        folder.rmdir()
        folder.symlink_to(elsewhere)
        refused()
        folder.unlink()
        folder.write_text("")
        refused()
        assert "must be a folder that belongs to this user alone" in relay.log()
        folder.unlink()
        response, _, ex = begin(place)
        response.close()
        ex.wait_gone()


def test_failures_before_the_stream_are_plain_errors(place: Place) -> None:
    response = place.ask("/stream/aware", prompt="")
    assert (response.status, response.header("Content-Type")) == (400, b"application/json")
    response.finish()


def test_a_cut_is_an_error(place: Place) -> None:
    response, _, ex = begin(place, batch_size=100)
    ex.head(headers=STREAM)
    ex.send(chunk("one"))
    ex.abort()
    body = response.finish()
    assert body.ended == "cut"
    found = [each for each in events(body.data) if each[0] not in ("ping", "stream_id")]
    assert [name for name, _ in found] == ["batch", "error"]
    assert json.loads(found[1][1])["error"]["code"] == "upstream_cut"


def test_pings_come_however_fast_an_upstream_sends_what_is_no_text(place: Place) -> None:
    def thinks(ex: Exchange) -> None:
        ex.head(headers=STREAM)
        thought = llm.event(llm.as_json({"choices": [{"delta": {"reasoning_content": "hm " * 100}}]})) * 50
        while True:
            ex.send(thought)

    place.upstream.serve(thinks, CHAT)
    before = len(place.upstream.seen(CHAT))
    response = place.ask("/stream/aware", prompt="Hello")
    assert events(response.read_event())[0][0] == "stream_id"
    for _ in range(2):
        assert events(response.read_event())[0][0] == "ping"
    response.close()
    ex = place.upstream.wait_for(before + 1, CHAT)
    eventually(lambda: ex.gone, "the end of the request upstream")
