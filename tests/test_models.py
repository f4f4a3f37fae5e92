"""RELAY_MODELS: only the listed models can be asked for, however a body is written."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest
from harness import servers
from harness.client import Client
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

CHEAP, DEAR = "cheap-1", "dear-1"


@pytest.fixture(scope="module")
def relay() -> Iterator[tuple[Upstream, Client]]:
    with Upstream(lambda ex: ex.reply(b"" if ex.method == b"HEAD" else b"{}")) as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_MODELS": f"{CHEAP}, other/model:2"}
        with servers.gunicorn(env) as server, Client(server.port) as client:
            yield upstream, client


def said(**fields: object) -> bytes:
    return json.dumps(fields).encode()


ALLOWED = {
    "a listed model": said(model=CHEAP, stream=False),
    "another": said(model="other/model:2"),
    "after white space": b" \r\n\t" + said(model=CHEAP),
    "with a byte order mark": b"\xef\xbb\xbf" + said(model=CHEAP),
    "no model": said(input="x"),
    "null": said(model=None),
    "deep inside it may say anything": said(model=CHEAP, tools=[{"model": DEAR}], metadata={"model": DEAR}),
    "in the text": said(messages=[{"content": f'{{"model": "{DEAR}"}}'}]),
    "a list": b'["model", "dear-1"]',
    "a list of pairs": b'[["model", "dear-1"]]',
    "no JSON": b"model=dear-1",
    "a form": b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ndear-1\r\n--b--\r\n',
    "bytes": bytes(range(256)),
    "nothing": b"",
}


@pytest.mark.parametrize("body", ALLOWED.values(), ids=ALLOWED)
def test_passes_as_it_came(relay: tuple[Upstream, Client], body: bytes) -> None:
    upstream, client = relay
    before = len(upstream.seen())
    response = client.request("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, body)
    response.finish()
    assert response.status == 200, bytes(response.body)
    (ex,) = upstream.seen()[before:]
    assert ex.body == body


REFUSED = {
    "another model": said(model=DEAR),
    "in other letters": said(model=CHEAP.upper()),
    "with a space": said(model=f"{CHEAP} "),
    "empty": said(model=""),
    "no text": said(model=7),
    "a list of models": said(model=[CHEAP]),
    "an object": said(model={CHEAP: CHEAP}),
    "twice": b'{"model": "dear-1", "model": "cheap-1"}',
    "twice, the other way": b'{"model": "cheap-1", "model": "dear-1"}',
    "a name in capitals": b'{"Model": "dear-1", "model": "cheap-1"}',
    "escaped": b'{"\\u006d\\u006fdel": "dear-1"}',
    "UTF-16": said(model=DEAR).decode().encode("utf-16"),
    "UTF-16 without a mark": said(model=DEAR).decode().encode("utf-16-le"),
    "UTF-32": said(model=DEAR).decode().encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + said(model=DEAR),
    "ill UTF-8": b'{"model": "dear-1", "input": "\xff\xfe"}',
    "ill UTF-8 in the model": b'{"model": "cheap-1\xff"}',
    "after white space": b"\n\n  " + said(model=DEAR),
    "unfinished": b'{"model": "dear-1", ',
    "two objects": said(model=CHEAP) + b"\n" + said(model=DEAR),
    "a comment": b'{"model": "dear-1" /* please */}',
    "very deep": b'{"model": "dear-1", "x": ' + b"[" * 100_000,
    "NaN": b'{"x": NaN, "model": "dear-1"}',
    "long": said(input="x" * 3_000_000, model=DEAR),
}


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED)
def test_is_refused(relay: tuple[Upstream, Client], body: bytes) -> None:
    upstream, client = relay
    before = len(upstream.seen())
    response = client.request("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, body)
    error = json.loads(response.finish().data)["error"]
    assert (response.status, error["code"], error["type"]) == (403, "model_not_allowed", "permission_error")
    assert DEAR not in error["message"]
    assert len(upstream.seen()) == before


def test_the_kind_that_the_client_claims_does_not_count(relay: tuple[Upstream, Client]) -> None:
    _, client = relay
    for kind in ("text/plain", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded", ""):
        response = client.request("POST", "/v1/x", {"Content-Type": kind} if kind else {}, said(model=DEAR))
        response.finish()
        assert response.status == 403, kind


def test_what_is_compressed_is_refused(relay: tuple[Upstream, Client]) -> None:
    _, client = relay
    body = gzip.compress(said(model=CHEAP))
    response = client.request("POST", "/v1/x", {"Content-Encoding": "gzip"}, body)
    assert json.loads(response.finish().data)["error"]["code"] == "model_not_allowed"
    assert client.request("POST", "/v1/x", {"Content-Encoding": "identity"}, said(model=CHEAP)).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_a_request_without_a_body_passes(relay: tuple[Upstream, Client], method: str) -> None:
    _, client = relay
    assert client.request(method, "/v1/models/dear-1").status == 200


def test_a_body_in_chunks_is_read_too(relay: tuple[Upstream, Client]) -> None:
    _, client = relay
    response = client.request("POST", "/v1/x", {}, iter([b'{"mod', b'el": "dear-1"}']))
    assert json.loads(response.finish().data)["error"]["code"] == "model_not_allowed"
