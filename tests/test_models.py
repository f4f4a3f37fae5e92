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
    "null, and named elsewhere": said(model=None, request={"model": CHEAP}),
    "a schema may have a property of that name": said(model=CHEAP, tools=[{"properties": {"model": {"type": "x"}}}]),
    "in the text": said(model=CHEAP, messages=[{"content": f'{{"model": "{DEAR}"}}'}]),
    "among several": said(model=CHEAP, models=[CHEAP, "other/model:2"]),
    "long": said(input="x" * 3_000_000, model=CHEAP),
    "lines of a batch": said(body={"model": CHEAP}) + b"\n" + said(body={"model": "other/model:2"}),
    "Gemini's": said(model=f"models/{CHEAP}"),
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
    "no model": said(input="x"),
    "no model but null": said(model=None),
    "a list": b'["model", "dear-1"]',
    "a list of pairs": b'[["model", "dear-1"]]',
    "bytes": bytes(range(256)),
    "nothing": b"",
    "a comment before": b'/* */{"model": "dear-1"}',
    "a comment after the allowed one": b'{"model": "cheap-1"}//{"model": "dear-1"}',
    "a line comment": b'# x\n{"model": "dear-1"}',
    "a space that is none in JSON": b'\xc2\xa0{"model": "dear-1"}',
    "another such space": b'\x0b{"model": "dear-1"}',
    "one in front of a name": b'{\xc2\xa0"model": "dear-1", "model": "cheap-1"}',
    "a string in single quotes": b"{'model': 'dear-1', \"model\": \"cheap-1\"}",
    "a name without quotes": b'{model: "dear-1", "model": "cheap-1"}',
    "a callback": b'f({"model": "dear-1"})',
    "fallbacks": said(model=CHEAP, models=[CHEAP, DEAR]),
    "fallbacks in objects": said(model=CHEAP, fallbacks=[{"x": 1}, DEAR]),
    "only fallbacks": said(models=[DEAR]),
    "another name for it": said(model=CHEAP, model_id=DEAR),
    "a request inside": said(request={"model": DEAR}),
    "an input inside": said(model=CHEAP, input={"model": DEAR}),
    "deep inside": said(model=CHEAP, a=[[{"b": [{"Model": DEAR}]}]]),
    "a line of a batch": said(body={"model": CHEAP}) + b"\n" + said(body={"model": DEAR}),
    "a name that is not UTF-8": b'{"mod\xffel": "dear-1", "model": "cheap-1"}',
    "much space after the name": b'{"model": "cheap-1", "model"' + b" " * 300_000 + b': "dear-1"}',
    "much space before the model": b'{"model": "cheap-1", "model":' + b" " * 300_000 + b'"dear-1"}',
    "very many parts": b'{"model": "cheap-1", "x": [' + b'"",' * 500_000 + b'{"model": "dear-1"}]}',
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


FORM, PARTS = "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"


def parts(*heads: str, value: str = CHEAP) -> bytes:
    """A part with each of these names and whatever follows them."""
    made = (f"--b\r\nContent-Disposition: form-data; name={head}\r\n\r\n{value}\r\n" for head in heads)
    return ("".join(made) + "--b--\r\n").encode()


ELSEWHERE = [
    pytest.param("openai/deployments/cheap-1/chat/completions", "", b"{}", True, id="azure"),
    pytest.param("openai/deployments/dear-1/chat/completions", "", b"{}", False, id="azure-other"),
    pytest.param("openai/deployments/dear-1/chat/completions", "", said(model=CHEAP), False, id="azure-and-body"),
    pytest.param("openai/deployments/dear%2D1/x", "", said(model=CHEAP), False, id="azure-encoded"),
    pytest.param("v1beta/models/cheap-1:generateContent", "", b"{}", True, id="gemini"),
    pytest.param("v1beta/models/dear-1:streamGenerateContent", "", b"{}", False, id="gemini-other"),
    pytest.param("v1beta/%6dodels/dear-1:generateContent", "", said(model=CHEAP), False, id="gemini-encoded"),
    pytest.param("model/cheap-1/converse", "", b"{}", True, id="bedrock"),
    pytest.param("model/dear-1/converse", "", said(model=CHEAP), False, id="bedrock-other"),
    pytest.param("x?model=cheap-1", "", b"{}", True, id="query"),
    pytest.param("x?model=dear-1", "", said(model=CHEAP), False, id="query-other"),
    pytest.param("x?model=cheap-1&Model=dear-1", "", b"{}", False, id="query-twice"),
    pytest.param("x?%6dodel=dear-1", "", said(model=CHEAP), False, id="query-encoded"),
    pytest.param("x", FORM, b"a=1&model=cheap-1", True, id="form"),
    pytest.param("x", FORM, b"model=cheap-1&model=dear-1", False, id="form-twice"),
    pytest.param("x", FORM, b"model=cheap-1;model=dear-1", False, id="form-semicolon"),
    pytest.param("x", FORM, b"a=1", False, id="form-without"),
    pytest.param("x", FORM, said(model=DEAR) + b"&model=cheap-1", False, id="json-as-a-form"),
    pytest.param("x", PARTS, parts('"a"', '"model"'), True, id="parts"),
    pytest.param("x", PARTS, parts('"model"', value=DEAR), False, id="parts-other"),
    pytest.param("x", PARTS, parts('"a"'), False, id="parts-without"),
    pytest.param("x", PARTS, parts('"model"', '"model[]"; filename="x"', value=DEAR), False, id="parts-a-file"),
    pytest.param("x", PARTS, parts('"model"', 'model; name*="model"'), False, id="parts-not-plain"),
    pytest.param("x", PARTS, parts('"model"').replace(b"\r\n", b"\n"), False, id="parts-line-feeds"),
    pytest.param("x", PARTS, b'{"model": "dear-1"}\r\n' + parts('"model"'), False, id="parts-after-json"),
    pytest.param("x", PARTS + "; boundary=c", parts('"model"'), False, id="parts-two-boundaries"),
    pytest.param("listen?model=cheap-1", "audio/wav", bytes(range(256)), True, id="sound"),
    pytest.param("listen", "audio/wav", bytes(range(256)), False, id="sound-without"),
]


@pytest.mark.parametrize(("target", "kind", "body", "passes"), ELSEWHERE)
def test_wherever_the_model_is_named(
    relay: tuple[Upstream, Client], target: str, kind: str, body: bytes, passes: bool
) -> None:
    upstream, client = relay
    before = len(upstream.seen())
    response = client.request("POST", f"/v1/{target}", {"Content-Type": kind or "application/json"}, body)
    said_back = response.finish().data
    assert response.status == (200 if passes else 403), said_back
    assert len(upstream.seen()) - before == passes


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_a_request_without_a_body_passes(relay: tuple[Upstream, Client], method: str) -> None:
    _, client = relay
    assert client.request(method, "/v1/models/dear-1").status == 200


def test_a_body_in_chunks_is_read_too(relay: tuple[Upstream, Client]) -> None:
    _, client = relay
    response = client.request("POST", "/v1/x", {}, iter([b'{"mod', b'el": "dear-1"}']))
    assert json.loads(response.finish().data)["error"]["code"] == "model_not_allowed"
