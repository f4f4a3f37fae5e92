"""The README's recipes for a shop that has other extensions: each block of code as it stands, under gevent workers."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import brotli
import pytest
from flask import Flask
from harness import eventually
from harness.client import Connection, request
from harness.redis import redis_server
from harness.upstream import Exchange, Upstream
from test_docs import PYTHON, block, shop

from relay import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.client import Response
    from harness.servers import Gunicorn

EVENTS = [("Content-Type", "text/event-stream")]
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
ASKED = b'{"stream": true, "messages": ["tell-me-a-secret"]}'
#: Bytes that a reader of lines, characters or events would change.
EACH = [b"data: 1\n\n", b"data: \xff\r\n\r\n", b": odd\r\r", b"data: " + b"x" * 5000 + b"\n\n"]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(base_path="/v1") as upstream:
        yield upstream


@contextlib.contextmanager
def recipe(package: str, folder: Path, upstream: Upstream, **env: str) -> Iterator[Gunicorn]:
    """The one file of the README that imports this."""
    (code,) = [code for code in PYTHON if re.search(rf"(?m)^(from|import) {package}\b", code)]
    with shop(code, folder, upstream, **env) as app:
        yield app


@contextlib.contextmanager
def opened(app: Gunicorn, upstream: Upstream, headers: dict[str, str]) -> Iterator[tuple[Exchange, Connection]]:
    """A stream that the upstream has been asked for and has not answered."""
    path = upstream.by_hand()
    with Connection(app.port) as connection:
        connection.send("POST", "/ai" + path, JSON | headers, ASKED)
        ex = upstream.next(path)
        try:
            assert ex.body == ASKED
            yield ex, connection
        finally:
            ex.finished.set()
            upstream.forget(path)


def carries(app: Gunicorn, upstream: Upstream, headers: dict[str, str] | None = None) -> Response:
    """Each piece arrives as it is before the next is sent, and a client that leaves takes the upstream with it; health
    answers a probe that knows nothing of the shop. Gives the response of the whole stream."""
    headers = {"Accept-Encoding": "gzip, br, zstd", **(headers or {})}
    with opened(app, upstream, headers) as (ex, connection):
        ex.head(headers=EVENTS)
        whole = connection.read_head()
        assert (whole.status, whole.header("Content-Type")) == (200, b"text/event-stream")
        assert whole.header("Content-Encoding") is None
        for piece in EACH:
            ex.send(piece)
            assert whole.read_exactly(len(piece)) == piece
        ex.end()
        assert whole.finish()[:2] == (b"".join(EACH), "clean")
    with opened(app, upstream, headers) as (ex, connection):
        connection.close()  # before the upstream has answered
        ex.wait_gone()
    with opened(app, upstream, headers) as (ex, connection):
        ex.head(headers=EVENTS)
        ex.send(EACH[0])
        connection.read_head().read_exactly(len(EACH[0]))
        connection.close()
        ex.wait_gone()
    for probe in ("health", "health/live", "health/ready"):
        assert request(app.port, "GET", f"/ai/_relay/{probe}").status == 200
    return whole


def refusal(response: Response) -> tuple[int, str]:
    """Status and code of an error of the relay's."""
    error: dict[str, Any] = json.loads(response.finish().data)["error"]
    assert response.header("X-Request-ID") == error["request_id"].encode()
    return response.status, error["code"]


def cookie(response: Response) -> dict[str, str]:
    response.finish()
    (session,) = [value for value in response.all("Set-Cookie") if value.startswith(b"session=")]
    return {"Cookie": session.partition(b";")[0].decode()}


def test_extensions_can_tell_the_views_of_relays_apart() -> None:
    """By module and name: an exemption for one relay's health is none for the other's, nor for what they relay."""
    app = Flask("shop")
    for name in ("relay", "second"):
        Relay(app, name=name, url_prefix=f"/{name}", settings={"RELAY_UPSTREAM_URL": "http://127.0.0.1:9"})
    names = [f"{view.__module__}.{view.__qualname__}" for view in app.view_functions.values()]
    assert len(names) > 10
    assert len(set(names)) == len(names)


def test_beside_talisman(tmp_path: Path, upstream: Upstream) -> None:
    """Its policy is on the shop's pages, the relay's on what is relayed; probes are not redirected, calls are."""
    https = {"X-Forwarded-Proto": "https"}
    with recipe("flask_talisman", tmp_path, upstream) as app:
        page = request(app.port, "GET", "/", https)
        assert page.status == 200
        assert page.all("Content-Security-Policy") == [b"default-src 'self'; object-src 'none'"]

        relayed = carries(app, upstream, https)
        assert relayed.all("Content-Security-Policy") == [b"default-src 'none'; sandbox"]
        assert relayed.all("X-Content-Type-Options") == [b"nosniff"]
        for name in ("Strict-Transport-Security", "X-Frame-Options", "Referrer-Policy"):
            assert relayed.all(name) == page.all(name) != []
        report = request(app.port, "GET", "/ai/_relay/health", https)
        assert report.all("Content-Security-Policy") == page.all("Content-Security-Policy")

        path = upstream.serve(lambda ex: ex.reply(b"{}"))
        for method, target in (("GET", "/"), ("POST", "/ai" + path)):
            redirected = request(app.port, method, target)
            assert redirected.status == 302
            assert redirected.header("Location") == f"https://127.0.0.1:{app.port}{target}".encode()
        assert upstream.seen(path) == []


def test_beside_csrfprotect(tmp_path: Path, upstream: Upstream) -> None:
    """The shop's forms need the token, the relay's calls do not, and a stranger's page is refused all the same."""
    with recipe("flask_wtf.csrf", tmp_path, upstream, SECRET_KEY="of the shop") as app:
        page = request(app.port, "GET", "/")
        token = re.search(rb'content="([^"]+)"', page.finish().data)[1].decode()
        session = cookie(page)
        assert request(app.port, "POST", "/order", session | FORM, b"").status == 400
        form = urlencode({"csrf_token": token}).encode()
        assert request(app.port, "POST", "/order", session | FORM, form).finish().data == b"ordered"

        carries(app, upstream, session)
        path = upstream.serve(lambda ex: ex.reply(b"{}"))
        for foreign in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            response = request(app.port, "POST", "/ai" + path, session | foreign | FORM, b"a=b")
            assert refusal(response) == (403, "origin_not_allowed")
        assert upstream.seen(path) == []
        form = urlencode({"purpose": "batch"}).encode()
        assert request(app.port, "POST", "/ai" + path, session | FORM, form).status == 200
        assert upstream.seen(path)[-1].body == form


def test_beside_csrfprotect_that_is_not_told_to_exempt_the_relay(tmp_path: Path, upstream: Upstream) -> None:
    """What the README says of leaving it out: a token in a header will do, and does not go upstream."""
    code, count = re.subn(r"(?m)^csrf\.exempt.*\n", "", block("from flask_wtf.csrf import"))
    assert count == 1
    with shop(code, tmp_path, upstream, SECRET_KEY="of the shop") as app:
        page = request(app.port, "GET", "/")
        token = re.search(rb'content="([^"]+)"', page.finish().data)[1].decode()
        session = cookie(page)
        path = upstream.serve(lambda ex: ex.reply(b"{}"))
        refused = request(app.port, "POST", "/ai" + path, session | JSON, ASKED)
        assert (refused.status, refused.header("Content-Type")) == (400, b"text/html; charset=utf-8")
        assert upstream.seen(path) == []
        carries(app, upstream, session | {"X-CSRFToken": token})
        assert request(app.port, "POST", "/ai" + path, session | JSON | {"X-CSRFToken": token}, ASKED).status == 200
        (ex,) = upstream.seen(path)
        assert ex.all("X-CSRFToken") == ex.all("Cookie") == []
        upload = request(app.port, "POST", "/ai" + path, session | FORM | {"X-CSRFToken": token}, b"purpose=batch")
        assert upload.status == 200
        assert upstream.seen(path)[-1].body == b"purpose=batch"  # though CSRFProtect has looked for a token in it


def test_beside_flask_login(tmp_path: Path, upstream: Upstream) -> None:
    """Pages redirect to the login, the relay says 401 in JSON, and the bill is the customer's."""
    with recipe("flask_login", tmp_path, upstream, SECRET_KEY="of the shop") as app:
        assert request(app.port, "GET", "/books").status == 302
        path = upstream.serve(lambda ex: ex.reply(b"{}"))
        assert refusal(request(app.port, "POST", "/ai" + path, JSON, ASKED)) == (401, "not_logged_in")
        assert upstream.seen(path) == []

        anna = cookie(request(app.port, "POST", "/login", FORM, b"name=anna"))
        assert request(app.port, "GET", "/books", anna).finish().data == b"three books for anna"
        carries(app, upstream, anna)
        app.wait_log("bill anna None")


def test_beside_flask_limiter(tmp_path: Path, upstream: Upstream) -> None:
    """Two workers share one count in Redis; pages have their own; health does not count."""
    with (
        redis_server() as redis,
        recipe(
            "flask_limiter",
            tmp_path,
            upstream,
            ready="/ai/_relay/health/live",  # a look at the page would count
            LIMITS=redis.url,
            WEB_CONCURRENCY="2",
        ) as app,
    ):
        assert [request(app.port, "GET", "/").status for _ in range(3)] == [200, 200, 429]
        whole = carries(app, upstream)  # three of twenty
        assert (whole.header("X-RateLimit-Limit"), whole.header("X-RateLimit-Remaining")) == (b"20", b"19")

        def busy(ex: Exchange) -> None:
            ex.reply(b"{}", 429, "Too Many Requests", [("Retry-After", "7777")])

        path = upstream.serve(busy)
        response = request(app.port, "POST", "/ai" + path, JSON, ASKED)
        assert (response.status, response.all("Retry-After")) == (429, [b"7777"])
        path = upstream.serve(lambda ex: ex.reply(b"{}"))
        for _ in range(16):
            assert request(app.port, "POST", "/ai" + path, JSON, ASKED).status == 200
        refused = request(app.port, "POST", "/ai" + path, JSON, ASKED)
        assert refusal(refused) == (429, "rate_limit_exceeded")
        assert 0 < int(refused.header("Retry-After") or b"0") <= 60
        assert len(upstream.seen(path)) == 16
        for _ in range(30):
            assert request(app.port, "GET", "/ai/_relay/health/live").status == 200


def test_beside_flask_compress(tmp_path: Path, upstream: Upstream) -> None:
    """Pages are compressed; what is relayed is left alone, though its types are among those to compress."""
    with recipe("flask_compress", tmp_path, upstream) as app:
        page = request(app.port, "GET", "/", {"Accept-Encoding": "gzip"})
        assert page.header("Content-Encoding") == b"gzip"
        assert gzip.decompress(page.finish().data) == b"<h1>Books</h1>" * 100
        carries(app, upstream)
        body = b'{"a": "%b"}' % (b"x" * 5000)
        path = upstream.serve(lambda ex: ex.reply(body, headers=[("Content-Type", "application/json")]))
        response = request(app.port, "POST", "/ai" + path, JSON | {"Accept-Encoding": "gzip, br"}, ASKED)
        assert (response.header("Content-Encoding"), response.finish().data) == (None, body)


class Sentry:
    """What a Sentry would have received, taken by an upstream of ours."""

    def __init__(self) -> None:
        self.server = Upstream(lambda ex: ex.reply(b"{}"))

    @property
    def dsn(self) -> str:
        return self.server.base_url.replace("://", "://key@") + "/1"

    def items(self, kind: str) -> list[dict[str, Any]]:
        """The items of a kind in all envelopes; https://develop.sentry.dev/sdk/data-model/envelopes/"""
        found = []
        for ex in self.server.seen("/api/1/envelope/"):
            decode = {b"gzip": gzip.decompress, b"br": brotli.decompress}[ex.all("Content-Encoding")[0]]
            lines = decode(ex.body).splitlines()
            heads = zip(lines[1::2], lines[2::2], strict=False)
            found += [json.loads(body) for head, body in heads if json.loads(head)["type"] == kind]
        return found


def test_beside_sentry(tmp_path: Path, upstream: Upstream) -> None:
    """The shop's errors are reported; streams that are cut, refused or left are not, and no prompt is."""
    sentry = Sentry()
    pages = {"sentry-trace": "771a43a4192642f0b136d5159a501700-1234567890abcdef-1", "baggage": "sentry-sample_rate=1"}
    with sentry.server, recipe("sentry_sdk", tmp_path, upstream, SENTRY_DSN=sentry.dsn) as app:
        app.tracebacks_expected = True
        carries(app, upstream, pages)

        def cut(ex: Exchange) -> None:
            ex.head(headers=EVENTS)
            ex.send(b"data: x\n\n")
            ex.abort()

        path = upstream.serve(cut)
        received = request(app.port, "POST", "/ai" + path, JSON | pages, ASKED).finish()
        assert received.ended == "cut"
        assert b"upstream_cut" in received.data
        (ex,) = upstream.seen(path)
        assert ex.all("sentry-trace") == ex.all("baggage") == []
        path = upstream.serve(lambda ex: ex.abort())
        assert refusal(request(app.port, "POST", "/ai" + path, JSON, ASKED)) == (502, "upstream_error")

        assert request(app.port, "POST", "/order", JSON, ASKED).status == 500
        eventually(lambda: bool(sentry.items("event")), "the report of the shop's error")
        # Those before it would have come before it.
        (report,) = sentry.items("event")
        (fault,) = report["exception"]["values"]
        assert (fault["type"], fault["value"]) == ("RuntimeError", "the shop's own fault")
        eventually(lambda: len(sentry.items("transaction")) >= 5, "the transactions")
        assert "tell-me-a-secret" not in json.dumps([report, *sentry.items("transaction")])
    sentry.server.check()
