"""RELAY_INCLUDE_USAGE: the one setting with which a relayed request is not as it came, and where it leaves it so."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest
from harness import eventually, servers
from harness.client import request
from harness.upstream import Upstream

from relay.settings import Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn
    from harness.upstream import Exchange

EVENTS = [("Content-Type", "text/event-stream")]
WISH = b'"stream_options":{"include_usage":true},'
JSON = ("Content-Type", "application/json")


def chat(ex: Exchange) -> None:
    """As OpenAI's: usage for those who ask for it."""
    ex.head(headers=EVENTS)
    ex.send(b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n')
    if WISH[1:-1] in ex.body:
        ex.send(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n')
    ex.send(b"data: [DONE]\n\n")
    ex.end()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(chat) as running:
        yield running


@pytest.fixture(scope="module")
def relay(upstream: Upstream) -> Iterator[Gunicorn]:
    with servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_INCLUDE_USAGE": "on"}) as running:
        yield running


def sent(
    relay: Gunicorn, upstream: Upstream, body: bytes, path: str = "/chat/completions", *headers: tuple[str, str]
) -> bytes:
    """What the upstream gets of this body."""
    given = [] if any(name == "Content-Type" for name, _ in headers) else [JSON]
    response = request(relay.port, "POST", f"/v1{path}", [*given, *headers], body)
    assert response.finish().ended == "clean"
    got = bytes(upstream.seen(path)[-1].body)
    assert upstream.seen(path)[-1].header("Content-Length") == b"%d" % len(got)
    return got


LONG = b'{"messages":[{"role":"user","content":"' + b"x" * 1_000_000 + b'"}], "stream" : true}'


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/openai/deployments/gpt/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"stream":true}', id="short"),
        pytest.param(b' {\n "stream": true, "model": "m"}\n', id="with space"),
        pytest.param(b'\xef\xbb\xbf{"stream":true}', id="behind a byte order mark"),
        pytest.param(b'{"stream":true,"messages":[{"stream_options":{}}]}', id="one that stands deeper"),
        pytest.param('{"stream":true,"a":"ü \\u00e9"}'.encode(), id="beyond ASCII"),
        pytest.param(LONG, id="long"),
    ],
)
def test_a_streamed_completion_is_asked_for_its_usage(
    body: bytes, path: str, relay: Gunicorn, upstream: Upstream
) -> None:
    at = body.index(b"{") + 1
    assert sent(relay, upstream, body, path) == body[:at] + WISH + body[at:]
    assert json.loads(body[:at].lstrip(b"\xef\xbb\xbf") + WISH + body[at:])["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param(b'{"stream":true,"stream_options":{"include_usage":false}}', [], id="the client says it"),
        pytest.param(b'{"stream":true,"stream_options":null}', [], id="the client says nothing of it"),
        pytest.param(LONG[:-1] + b',"stream_options":{}}', [], id="far behind"),
        pytest.param(b'{"stream":true,"stream\\u005foptions":{}}', [], id="with an escape"),
        pytest.param(b'{"stream":false}', [], id="no stream"),
        pytest.param(b'{"stream":true,"stream":false}', [], id="no stream in the end"),
        pytest.param(b'{"a":{"stream":true}}', [], id="a stream that stands deeper"),
        pytest.param(b'[{"stream":true}]', [], id="a list"),
        pytest.param(b'{"stream":true', [], id="broken"),
        pytest.param(b'{"stream":true}{"stream":true}', [], id="two"),
        pytest.param(b"stream=true", [("Content-Type", "application/x-www-form-urlencoded")], id="a form"),
        pytest.param(b'{"stream":true}', [("Content-Type", "application/x-ndjson")], id="another type"),
        pytest.param(gzip.compress(b'{"stream":true}'), [("Content-Encoding", "gzip")], id="compressed"),
        pytest.param(b'{"stream":true}', [("Content-Digest", "sha-256=:x:")], id="with a digest"),
        pytest.param(b'{"stream":true}', [("Signature", "sig=:x:")], id="signed"),
    ],
)
def test_what_is_in_doubt_goes_as_it_came(
    body: bytes, headers: list[tuple[str, str]], relay: Gunicorn, upstream: Upstream
) -> None:
    assert sent(relay, upstream, body, "/chat/completions", *headers) == body


@pytest.mark.parametrize("path", ["/responses", "/messages", "/embeddings", "/chat/completions/x", "/mycompletions"])
def test_other_paths_are_left_alone(path: str, relay: Gunicorn, upstream: Upstream) -> None:
    assert sent(relay, upstream, b'{"stream":true}', path) == b'{"stream":true}'


def test_the_tokens_are_counted(relay: Gunicorn, upstream: Upstream) -> None:
    def counted() -> float:
        text = request(relay.admin_port, "GET", "/metrics").finish().data.decode()
        line = next(line for line in text.splitlines() if line.startswith("relay_tokens_total") and '"input"' in line)
        return float(line.split()[-1])

    before = counted()
    sent(relay, upstream, b'{"stream":true}')
    eventually(lambda: counted() == before + 7, "its tokens")


def test_a_transparent_relay_changes_no_request() -> None:
    with pytest.raises(SettingsError, match="RELAY_INCLUDE_USAGE"):
        Settings.from_mapping(
            {"RELAY_UPSTREAM_URL": "http://h", "RELAY_TRANSPARENT": "on", "RELAY_INCLUDE_USAGE": "on"}
        )
