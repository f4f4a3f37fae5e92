"""The benchmark works: it measures all that it says, and sees whether bytes are right. How fast anything is, is not
judged here.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from harness import REPO
from harness.calm import undisturbed

from bench import chart, check, compare, fairness, herd, measures, report, work
from bench.check import Answer
from bench.measures import Outcome
from bench.peers import PEERS
from bench.rig import Rig

if TYPE_CHECKING:
    from pathlib import Path

HEAD = work.HEAD + b"\r\n"


def stream(events: int) -> bytes:
    return HEAD + b"".join(work.event_chunk(number, 100 + number) for number in range(events)) + work.END_CHUNK


def read(raw: bytes, wanted: int, size: int, flood: bytes | None = None) -> tuple[Answer, list[int]]:
    answer = Answer(wanted, flood)
    times = []
    for at in range(0, len(raw), size):
        times += answer.feed(raw[at : at + size])
    return answer, times + answer.end()


def without(raw: bytes, number: int) -> bytes:
    return raw.replace(work.event_chunk(number, 100 + number), b"")


def twisted(raw: bytes) -> bytes:
    return raw.replace(b'xx"}', b'xy"}', 1)


SIZES = pytest.mark.parametrize("size", [1, 7, 333, 100_000])


@SIZES
def test_an_answer_that_is_what_was_sent_is_right(size: int) -> None:
    answer, times = read(stream(80), 80, size)
    assert (answer.verdict, answer.events, times) == (check.OK, 80, list(range(100, 180)))


@SIZES
@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        pytest.param(twisted(stream(80)), check.CHANGED, id="one byte differs"),
        pytest.param(without(stream(80), 40), check.LOST, id="one event is missing"),
        pytest.param(stream(79), check.LOST, id="the last event is missing"),
        pytest.param(stream(80)[:-5], check.CUT, id="the last chunk is missing"),
        pytest.param(stream(80)[:5000], check.CUT, id="it breaks off in an event"),
        pytest.param(stream(80).replace(work.END_CHUNK, b"0\r\n\r\n"), check.LOST, id="no DONE"),
        pytest.param(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", check.REFUSED, id="refused"),
        pytest.param(b"", check.FAILED, id="no answer"),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(raw: bytes, verdict: str, size: int) -> None:
    assert read(raw, 80, size)[0].verdict == verdict


@SIZES
def test_a_stream_that_is_too_short_to_judge_is_judged_at_its_end(size: int) -> None:
    raw = b"HTTP/1.1 200 OK\r\n\r\n" + work.END.replace(b"\n\n", b"\r\n\r\n")
    assert read(raw, 0, size)[0].verdict == check.CHANGED
    chunked = HEAD + b"%x\r\n%s \r\n0\r\n\r\n" % (len(work.END) + 1, work.END)
    assert read(chunked, 0, size)[0].verdict == check.CHANGED


@SIZES
def test_events_framed_anew_are_found_and_counted(size: int) -> None:
    body = b"".join(work.event_chunk(number, 100 + number)[5:-2] for number in range(80)) + work.END
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    answer, times = read(head + body.replace(b"\n\n", b"\r\n\r\n"), 80, size)
    assert (answer.verdict, answer.events, times) == (check.CHANGED, 80, list(range(100, 180)))


@SIZES
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        pytest.param(lambda raw: raw, check.OK, id="right"),
        pytest.param(twisted, check.CHANGED, id="one byte differs"),
        pytest.param(lambda raw: raw.replace(work.event_chunk(70, 0), b""), check.LOST, id="one event is missing"),
        pytest.param(lambda raw: raw[:9000], check.CUT, id="it breaks off"),
    ],
)
def test_a_stream_without_pauses_is_checked_too(change: object, verdict: str, size: int) -> None:
    raw = HEAD + b"".join(work.flood_chunks(90))
    answer, _ = read(change(raw), 90, size, work.flood_body(90))  # type: ignore[operator]
    assert answer.verdict == verdict
    assert verdict == check.CUT or answer.events >= 89


def test_events_are_told_from_the_size_of_a_body() -> None:
    body = work.flood_body(200)
    for _ in range(200):
        size = random.randrange(len(body))
        number = work.events_in(size)
        assert work.start_of(number) <= size < work.start_of(number + 1) or number >= 199


def runs(rounds: list[dict[str, float]]) -> report.Runs:
    """Runs of `events` in which nginx takes 10 µs, and the relay what is given."""
    found: report.Runs = {}
    for number, relay in enumerate(rounds):
        found[number, "events", "nginx"] = Outcome({"event_cpu_us": 10.0, "latency_p50_us": 30.0}, set(), {})
        found[number, "events", "relay"] = Outcome(relay, set(), {})
        found[number, "events", "direct"] = Outcome({"latency_p50_us": 20.0}, set(), {})
    return found


def test_ratios_are_within_rounds_and_latency_is_what_is_added() -> None:
    table = report.cells(
        runs([{"event_cpu_us": cpu, "latency_p50_us": 45.0} for cpu in (30.0, 18.0, 24.0)]), ["nginx", "relay"], 3
    )
    cell = table["event_cpu_us"]["relay"]
    assert (cell.median, cell.spread) == (24.0, 6.0)
    assert cell.ratio == pytest.approx(2.4)
    assert table["added_p50_us"]["relay"].ratio == pytest.approx(2.5)
    goals = report.goals(table)
    assert (goals["event_cpu_us"]["met"], goals["added_p50_us"]["met"]) == (False, True)


def test_a_round_that_failed_is_left_out() -> None:
    table = report.cells(runs([{}, {"event_cpu_us": 20.0}]), ["nginx", "relay"], 2)
    assert table["event_cpu_us"]["relay"].rounds == [20.0]
    assert "24" not in report.text(table, {"nginx": "nginx", "relay": "relay"}, measures.SMOKE)
    ET.fromstring(chart.svg(table, {"nginx": "nginx", "relay": "<relay>"}, "a & b"))


@pytest.mark.slow
@pytest.mark.watchdog(240)
@undisturbed(0.05, tries=3)  # its windows are so short here that nothing may happen in one
def test_the_benchmark_measures_everything_and_the_bytes_are_right(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--smoke", "--only", "nginx,relay", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=75, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["wrong_bytes"] == {"direct": {}, "nginx": {}, "relay": {}}
    for key, row in found["rows"].items():
        for peer in ("nginx", "relay"):
            assert isinstance(row["peers"][peer]["median"], float), f"{key} of {peer}"
        assert row["label"].split(",")[0] in done.stdout
    assert {run["measure"] for run in found["runs"]} == set(measures.MEASURES)
    ET.parse(tmp_path / "bench.svg")
    assert (tmp_path / "table.md").read_text() in done.stdout + "\n"


def test_a_relay_that_changes_a_byte_is_marked(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig, socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            for _ in range(5):
                client, _ = listener.accept()
                with client:
                    client.recv(4096)
                    client.sendall(twisted(stream(3)))

        thread = threading.Thread(target=relay)
        thread.start()
        steps = [{"do": "open", "group": "main", "count": 5, "rate": 100, "limit": 10}, {"do": "finish", "limit": 10}]
        result = rig.run(listener.getsockname()[1], [os.getpid()], [work.Plan("main", events=3, gap_us=1000)], steps)
        thread.join(10)
    assert result["verdicts"] == {check.CHANGED: 5}


def test_what_is_missing_is_said_and_left_out(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "bench", "--smoke", "--only", "litellm", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=55, env=env, check=False)
    assert "litellm is left out" in done.stderr
    assert done.returncode == 1


BASE = [100.0, 120.0, 95.0, 200.0, 105.0, 98.0]


@pytest.mark.parametrize(
    ("here", "worse"),
    [
        pytest.param(BASE, False, id="the same"),
        pytest.param([value * 1.03 for value in BASE], False, id="three percent are allowed"),
        pytest.param([value * 1.10 for value in BASE], True, id="ten percent in each pair"),
        pytest.param([value * 0.5 for value in BASE], False, id="twice as good"),
        pytest.param(
            [value * by for value, by in zip(BASE, (1.4, 0.9, 1.3, 0.95, 1.35, 0.9), strict=True)],
            False,
            id="noise alone",
        ),
    ],
)
def test_a_version_is_worse_only_when_the_whole_interval_says_so(here: list[float], worse: bool) -> None:
    found = compare.verdict(BASE, here)
    assert found.worse is worse
    assert found.low <= found.ratio <= found.high


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        compare.verdict([1.0], [1.0])


def test_rates_are_compared_the_other_way_round() -> None:
    runs = {
        (number, "flood", name): Outcome({"flood_per_cpu": rate}, set(), {})
        for number in range(3)
        for name, rate in (("base", 1000.0 + number), ("here", 500.0 + number))
    }
    found = compare.verdicts(runs, 3)
    assert set(found) == {"flood_per_cpu"}
    assert found["flood_per_cpu"].worse
    assert found["flood_per_cpu"].ratio == pytest.approx(2, rel=0.01)


def test_two_checkouts_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Which of two equal ones is faster is not judged: the pairs are too short for that."""
    compare.main([str(REPO), "--smoke", "--pairs", "2", "--measures", "short"])
    said = capsys.readouterr().out
    assert "in times of" in said
    assert "CPU for a stream of 3 events" in said


def test_what_is_no_checkout_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="neither a folder nor a revision"):
        compare.main(["no-such-revision", "--smoke", "--pairs", "2"])


def test_what_others_notice_is_measured_while_the_work_beside_them_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a bound holds is not judged: the windows are too short for that."""
    monkeypatch.setattr(fairness, "_SETTLE", 0.6)
    monkeypatch.setattr(fairness, "_WINDOW", 0.3)
    fairness.main(["--pairs", "1", "--only", "nested,prompt"])
    _, _, nested, prompt, *_ = capsys.readouterr().out.splitlines()
    assert "times 200" in nested
    assert "times 400" in prompt


@pytest.mark.parametrize("figures", [([2.0, 3.0], [4.0, 40.0], 4.4), ([1.0, 1.0], [4.9, 0.1], 1.0)])
def test_little_is_no_more_than_less(figures: tuple[list[float], list[float], float]) -> None:
    alone, beside, ratio = figures
    assert fairness.Found("text", alone, beside, {}, 0.5, "").ratio == ratio


@pytest.mark.parametrize("case", ["room for all", "room for a quarter"])
def test_of_a_herd_everybody_is_served_or_refused(tmp_path: Path, case: str) -> None:
    relay = next(peer for peer in PEERS if peer.name == "relay")
    with Rig(tmp_path) as rig:
        raw = herd.measure(rig, tmp_path, replace(relay, settings=herd.cases(80)[case]), None, 80)
    _, whole, _, refused, lost, _ = herd.row(case, raw, 80)
    if case == "room for all":
        assert (whole, refused, lost) == ("80", "0", "0")
    else:
        assert refused.startswith("70 (503) in ")  # one worker has an eighth
        assert "without" not in refused
        assert (whole, lost) == ("10", "0")
