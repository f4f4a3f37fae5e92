"""`relay chat`: what it prints and when, how it ends, and that the upstream stops when it does."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from harness import DEADLINE, REPO, Deadline, llm, servers
from harness.calm import undisturbed
from harness.upstream import Upstream
from test_client import CHAT, DONE, HALF, KEY, chunk, cut_after, says

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.upstream import Exchange

ENV = servers.environment({"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""})
COMMAND = [sys.executable, "-m", "relay", "chat"]


@pytest.fixture(scope="module")
def _upstream() -> Iterator[Upstream]:
    with Upstream(base_path="/v1") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def base_url(_upstream: Upstream) -> Iterator[str]:
    """A real relay in front of the upstream."""
    with servers.gunicorn({"RELAY_UPSTREAM_URL": _upstream.base_url}) as relay:
        yield f"http://127.0.0.1:{relay.port}/v1"


@pytest.fixture
def upstream(_upstream: Upstream) -> Iterator[Upstream]:
    yield _upstream
    _upstream.forget(CHAT)
    _upstream.check()


def chat(*args: str, given: bytes | None = None, **env: str) -> tuple[int, str, str]:
    """Run it to its end; gives exit status, standard output and standard error."""
    stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if given is None else {"input": given}
    done = subprocess.run([*COMMAND, *args], env=ENV | env, capture_output=True, timeout=30, check=False, **stdin)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in out + err
    assert KEY not in out + err
    return done.returncode, out, err


@contextlib.contextmanager
def running(*args: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, *args],
        env=ENV,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **options},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def read(fd: int, length: int) -> bytes:
    """So many bytes, as they come."""
    clock, data = Deadline(DEADLINE, f"{length} bytes of output"), b""
    while len(data) < length:
        if select.select([fd], [], [], clock.left())[0]:
            piece = os.read(fd, length - len(data))
            if not piece:
                break
            data += piece
    return data


# --- The answer


def test_the_answer_and_then_how_fast_it_was(upstream: Upstream, base_url: str) -> None:
    upstream.serve(says(*llm.chat_events()), CHAT)
    status, out, err = chat("--base-url", base_url, "--model", "some-model", "Well?")
    assert (status, out) == (0, f"{llm.TEXT}\n")
    told = re.fullmatch(
        r"first byte after \d+ ms · (\d+) events \(\d+/s\) · (\d+) characters \(\d+/s\) · \d+\.\d\d s in all\n",
        err,
    )
    assert told, err
    assert [int(figure) for figure in told.groups()] == [len(llm.chat_events()), len(llm.TEXT)]
    (ex,) = upstream.seen(CHAT)
    assert json.loads(ex.body) == {
        "messages": [{"role": "user", "content": "Well?"}],
        "stream": True,
        "model": "some-model",
    }


@pytest.mark.parametrize("option", ["-q", "--quiet", "--no-stats"])
def test_quiet_says_nothing_but_the_answer(upstream: Upstream, base_url: str, option: str) -> None:
    upstream.serve(says(chunk("line\n"), DONE), CHAT)
    assert chat("--base-url", base_url, option, "Well?") == (0, "line\n", "")


def test_events_are_lines_of_json(upstream: Upstream, base_url: str) -> None:
    upstream.serve(says(llm.event(b"1\ndata: 2", "odd", number=4), DONE), CHAT)
    status, out, _ = chat("--base-url", base_url, "--events", "Well?")
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "odd", "data": "1\n2", "id": "4"},
        {"event": "message", "data": "[DONE]", "id": "4"},
    ]


def test_each_piece_is_printed_before_the_next_is_sent(upstream: Upstream, base_url: str) -> None:
    path = upstream.by_hand(CHAT)
    with running("--base-url", base_url, "Well?") as process:
        ex = upstream.next(path)
        ex.head(headers=llm.EVENTS)
        for word in llm.WORDS:
            ex.send(chunk(word))
            assert read(process.stdout.fileno(), len(word.encode())) == word.encode()  # type: ignore[union-attr]
        ex.send(DONE)
        ex.end()
        assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("args", [["-"], []], ids=["dash", "missing"])
def test_the_prompt_from_standard_input(upstream: Upstream, base_url: str, args: list[str]) -> None:
    upstream.serve(says(chunk("yes"), DONE), CHAT)
    assert chat("--base-url", base_url, "-q", *args, given="Grüße\nund Küsse\n".encode()) == (0, "yes\n", "")
    (ex,) = upstream.seen(CHAT)
    assert json.loads(ex.body)["messages"][0]["content"] == "Grüße\nund Küsse\n"


def test_the_key_and_headers_go_along_and_are_not_shown(upstream: Upstream, base_url: str) -> None:
    upstream.serve(says(chunk("yes"), DONE), CHAT)
    for args, env in ((["--key", KEY], {}), ([], {"RELAY_CLIENT_KEY": KEY})):
        status, _, _ = chat("--base-url", base_url, "-H", f"X-Login: {KEY}", *args, "Well?", **env)
        assert status == 0
    for ex in upstream.seen(CHAT):
        assert ex.all("Authorization") == [f"Bearer {KEY}".encode()]
        assert ex.all("X-Login") == [KEY.encode()]


def test_anthropics_path(upstream: Upstream, base_url: str) -> None:
    upstream.serve(says(*llm.message_events()), "/messages")
    assert chat("--base-url", base_url, "--path", "messages", "-q", "Well?") == (0, f"{llm.TEXT}\n", "")


def test_a_terminal_gets_no_control_characters(upstream: Upstream, base_url: str) -> None:
    """What an answer says must not move the cursor, nor do worse; a file gets it as it was."""
    upstream.serve(says(chunk("a\x1b]0;title\x07b\tc\r\nd\x9be"), DONE), CHAT)
    assert chat("--base-url", base_url, "-q", "Well?")[1] == "a\x1b]0;title\x07b\tc\r\nd\x9be\n"
    terminal, theirs = pty.openpty()
    try:
        with running("--base-url", base_url, "-q", "Well?", stdout=theirs) as process:
            assert process.wait(DEADLINE) == 0
        shown = b"a]0;titleb\tc\r\nde\r\n"  # the CRs are the terminal's own
        assert read(terminal, len(shown)) == shown
        assert select.select([terminal], [], [], 0)[0] == []
    finally:
        os.close(terminal)
        os.close(theirs)


# --- Ends


def _begin(upstream: Upstream, path: str) -> Exchange:
    ex = upstream.next(path)
    ex.head(headers=llm.EVENTS)
    ex.send(chunk("one"))
    return ex


def test_ctrl_c_stops_the_upstream(upstream: Upstream, base_url: str) -> None:
    path = upstream.by_hand(CHAT)
    with running("--base-url", base_url, "Well?") as process:
        ex = _begin(upstream, path)
        out = process.stdout.fileno()  # type: ignore[union-attr]
        assert read(out, 3) == b"one"
        process.send_signal(signal.SIGINT)
        ex.wait_gone()
        assert process.wait(DEADLINE) == 130
        assert read(out, 10) == b"\n"
        assert process.stderr.read() == b""  # type: ignore[union-attr]


def test_ctrl_c_before_the_answer_stops_the_upstream_too(upstream: Upstream, base_url: str) -> None:
    path = upstream.by_hand(CHAT)
    with running("--base-url", base_url, "Well?") as process:
        ex = upstream.next(path)
        process.send_signal(signal.SIGINT)
        ex.wait_gone()
        assert process.wait(DEADLINE) == 130
        assert process.stderr.read() == b""  # type: ignore[union-attr]


def test_a_closed_pipe_stops_the_upstream(upstream: Upstream, base_url: str) -> None:
    """As in `relay chat … | head -c 3`."""
    path = upstream.by_hand(CHAT)
    with running("--base-url", base_url, "Well?") as process:
        ex = _begin(upstream, path)
        assert read(process.stdout.fileno(), 3) == b"one"  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        ex.send(chunk("two"))
        ex.wait_gone()
        assert process.wait(DEADLINE) == 1
        assert process.stderr.read() == b""  # type: ignore[union-attr]


def test_an_error_in_the_stream(upstream: Upstream, base_url: str) -> None:
    """What had come, then a sentence with what to look for in the relay's log."""
    upstream.serve(cut_after(*HALF), CHAT)
    status, out, err = chat("--base-url", base_url, "-H", "X-Request-ID: look-for-me", "Well?")
    assert (status, out) == (1, "".join(llm.WORDS[:2]) + "\n")
    assert err.endswith("(request id look-for-me).\n")
    assert err.count("\n") == 1


def test_a_cut(upstream: Upstream) -> None:
    upstream.serve(cut_after(*HALF), CHAT)
    status, out, err = chat("--base-url", upstream.base_url, "Well?")
    assert (status, out) == (1, "".join(llm.WORDS[:2]) + "\n")
    assert "broke off" in err


@undisturbed(0.1)
def test_a_stall(upstream: Upstream) -> None:
    upstream.forget(CHAT)
    path = upstream.by_hand(CHAT)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(chat, "--base-url", upstream.base_url, "--timeout", "0.3", "Well?")
        ex = _begin(upstream, path)
        ex.wait_gone()
        status, out, err = done.result(DEADLINE)
    assert (status, out) == (1, "one\n")
    assert err == f"nothing came from 127.0.0.1:{upstream.port} for 0.3 s.\n"


@pytest.mark.parametrize("code", [401, 429, 500])
def test_a_refusal(upstream: Upstream, base_url: str, code: int) -> None:
    upstream.serve(lambda ex: ex.reply(llm.openai_error("not\n\x1b]0;\x07now", "t", "c"), code), CHAT)
    status, out, err = chat("--base-url", base_url, "Well?")
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"127\.0\.0\.1:\d+ answered {code}: not \]0;now \(request id \w+\)\.\n", err)


def test_no_event_stream(upstream: Upstream) -> None:
    upstream.serve(lambda ex: ex.reply(b"<html>", headers=[("Content-Type", "text/html")]), CHAT)
    status, out, err = chat("--base-url", upstream.base_url, "Well?")
    assert (status, out) == (2, "")
    assert "text/html, not with an event stream" in err


def test_nobody_there() -> None:
    port = servers.free_port()
    status, out, err = chat("--base-url", f"http://127.0.0.1:{port}/v1", "Well?")
    assert (status, out, err) == (2, "", f"127.0.0.1:{port} cannot be reached: Connection refused.\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        pytest.param(["--base-url", "127.0.0.1", "x"], "http://", id="url"),
        pytest.param(["--header", KEY, "x"], "NAME:VALUE", id="header"),
        pytest.param(["--key", f"{KEY}\x01", "x"], "'Authorization'", id="key"),
        pytest.param(["--timeout", "0", "x"], "--timeout", id="timeout"),
        pytest.param(["--ca", "/no/such/file", "x"], "--ca", id="ca"),
        pytest.param([""], "empty", id="empty"),
        pytest.param(["-"], "empty", id="empty-input"),
    ],
)
def test_a_wrong_command_is_a_sentence(args: list[str], says: str) -> None:
    status, out, err = chat(*args)
    assert (status, out) == (2, "")
    assert says in err


def test_input_that_is_no_text() -> None:
    status, _, err = chat(given=b"\xff\xfe")
    assert status == 2
    assert "not UTF-8" in err


def test_at_a_terminal_it_does_not_wait_for_a_prompt() -> None:
    terminal, theirs = pty.openpty()
    try:
        done = subprocess.run(COMMAND, env=ENV, stdin=theirs, capture_output=True, timeout=30, check=False)
    finally:
        os.close(terminal)
        os.close(theirs)
    assert done.returncode == 2
    assert b"there is no prompt" in done.stderr


def test_help_tells_the_exit_statuses() -> None:
    status, out, _ = chat("--help")
    assert status == 0
    assert [f"{code}:" in out for code in (0, 1, 2, 130)] == [True] * 4
