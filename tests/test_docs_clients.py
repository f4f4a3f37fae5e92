"""The README's examples for clients, each run as it stands there, but for the port."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from harness import REPO, llm, servers
from harness.upstream import Upstream
from test_client import says
from test_docs import SERVICE, block, first_cells, section

from relay import client

if TYPE_CHECKING:
    from collections.abc import Iterator

ENV = servers.environment({"PYTHONPATH": str(REPO)})


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """What `make run` starts with nothing configured; gives its host and port."""
    with servers.gunicorn({}) as relay:
        yield f"127.0.0.1:{relay.port}"


def run(example: str, service: str) -> str:
    """What the example prints, with warnings as errors in its process."""
    assert SERVICE in example
    code = example.replace(SERVICE, service)
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_langchain(demo: str) -> None:
    assert "You said: “Hello”." in run(block("from langchain_openai import ChatOpenAI"), demo)


def test_the_anthropic_sdk() -> None:
    """The demo speaks OpenAI's language only: here the upstream speaks Anthropic's."""
    with Upstream(base_path="/v1") as upstream:
        upstream.serve(says(*llm.message_events()), "/messages")
        with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
            assert run(block("from anthropic import Anthropic"), f"127.0.0.1:{relay.port}") == f"{llm.TEXT}\n"


def test_relay_client(demo: str) -> None:
    assert "You said: “Hello”." in run(block("from relay.client import", "stream_chat"), demo)


def test_relay_client_says_what_went_wrong() -> None:
    with Upstream(base_path="/v1") as upstream:
        upstream.serve(lambda ex: ex.reply(llm.openai_error("slowly", "t", "busy"), 429), "/chat/completions")
        with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
            said = run(block("from relay.client import", "stream_chat"), f"127.0.0.1:{relay.port}")
    assert re.fullmatch(r"\nbusy: 127\.0\.0\.1:\d+ answered 429: slowly \(request \w+\)\n", said)


def test_relay_chat(demo: str) -> None:
    words = shlex.split(block("-m relay chat"))
    assert words[0] == ".venv/bin/python"
    command = [sys.executable, *(word.replace(SERVICE, demo) for word in words[1:])]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True, timeout=50)
    assert "You said: “Hello”." in done.stdout
    assert done.stderr.startswith("first byte after ")


def test_the_table_of_what_is_raised_is_that_of_the_code() -> None:
    text = section("From Python")
    errors = [each for each in vars(client).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert set(first_cells(text)) == {each.__name__ for each in errors if each is not client.StreamError}


def test_the_options_that_are_named_exist() -> None:
    from relay.cli.chat import chat

    options = {option for parameter in chat.params for option in parameter.opts}
    assert set(re.findall(r"`(-[-a-z]+)", section("relay chat"))) <= options
