"""The client in pages that are not of the relay's own origin, and over the shipped TLS configuration with HTTP/2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from harness import eventually, servers
from harness.browser import new_page
from harness.js import Tab, Thrown, pages, run
from harness.upstream import Upstream
from test_nginx_tls import front as front  # noqa: PLC0414 - the fixture, for this module too

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.browser import Console
    from harness.servers import Gunicorn
    from harness.upstream import Exchange
    from playwright.sync_api import Browser, Page
    from test_nginx_tls import Front

EVENTS = [("Content-Type", "text/event-stream")]
JSON = [("Content-Type", "application/json")]
DONE = b"data: [DONE]\n\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def shop(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """Pages, and a relay of their own origin."""
    with pages(upstream, tmp_path_factory.mktemp("built")) as server:
        yield server


# --- Across origins


@pytest.fixture(scope="module")
def elsewhere(upstream: Upstream, shop: Gunicorn) -> Iterator[Gunicorn]:
    """A relay that lets the shop's pages call it, by one of the shop's two names."""
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_CORS_ORIGINS": shop.base_url}
    with servers.gunicorn({**env, "RELAY_CLIENT_KEYS": "client-key-1"}) as relay:
        yield relay


_WITH_KEY = 'const headers = {Authorization: "Bearer client-key-1"};'


def test_a_page_of_a_named_origin_streams_with_its_key(
    page: Page, shop: Gunicorn, elsewhere: Gunicorn, upstream: Upstream
) -> None:
    path = upstream.by_hand()
    page.goto(shop.base_url)
    tab = Tab(page, f"{elsewhere.base_url}/relay-client.js")  # the module may come from the relay, too
    job = tab.start(
        _WITH_KEY
        + """
        const kept = [];
        const s = client.stream(url, {headers, body: {stream: true}, credentials: "include", endMarker: "[DONE]"});
        for await (const {data} of s) { kept.push(data); globalThis.kept = kept; }
        return [kept, (await s).requestId];
        """,
        url=f"{elsewhere.base_url}/v1{path}",
    )
    ex = upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\n")
    eventually(lambda: page.evaluate("globalThis.kept?.length") == 1, "the first event")
    ex.send(DONE)
    ex.end()
    assert job.result() == [["a", "[DONE]"], ex.header("X-Request-ID").decode()]
    assert ex.header("Authorization") is None


def test_it_may_read_why_a_call_failed(
    page: Page, console: Console, shop: Gunicorn, elsewhere: Gunicorn, upstream: Upstream
) -> None:
    def refuse(ex: Exchange) -> None:
        headers = [*JSON, ("Retry-After", "7"), ("x-should-retry", "false")]
        ex.reply(b'{"error":{"message":"M","code":"C"}}', 503, headers=headers)

    path = upstream.serve(refuse)
    console.expect("status of (503|401)")
    page.goto(shop.base_url)
    tab = Tab(page)
    code = _WITH_KEY + "await client.stream(url, {headers, body: {}, maxReconnectAttempts: 5})"
    with pytest.raises(Thrown) as caught:
        run(tab, code, url=f"{elsewhere.base_url}/v1{path}")
    (ex,) = upstream.seen(path)  # x-should-retry was seen
    error = caught.value.error
    assert (error["code"], error["status"], error["retryAfter"]) == ("C", 503, 7)
    assert error["requestId"] == ex.header("X-Request-ID").decode()
    with pytest.raises(Thrown) as caught:
        run(tab, "await client.stream(url)", url=f"{elsewhere.base_url}/v1{path}")
    assert (caught.value.code, caught.value.error["status"]) == ("invalid_api_key", 401)


def test_it_goes_on_with_the_last_id(page: Page, shop: Gunicorn, elsewhere: Gunicorn, upstream: Upstream) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        ex.send(b"id: 2\ndata: b\n\n" + DONE if ex.header("Last-Event-ID") else b"retry: 1\nid: 1\ndata: a\n\n")
        ex.end()

    path = upstream.serve(handler)
    page.goto(shop.base_url)
    kept = run(
        Tab(page),
        _WITH_KEY
        + """
        const kept = [];
        const onMessage = ({id}) => kept.push(id);
        await client.stream(url, {headers, endMarker: "[DONE]", maxReconnectAttempts: 1, onMessage});
        return kept;
        """,
        url=f"{elsewhere.base_url}/v1{path}",
    )
    assert kept == ["1", "2", "2"]
    assert [ex.header("Last-Event-ID") for ex in upstream.seen(path)] == [None, b"1"]


def test_eventsource_across_origins_needs_a_ticket_only(
    page: Page, shop: Gunicorn, elsewhere: Gunicorn, upstream: Upstream
) -> None:
    path = upstream.serve(lambda ex: ex.reply(b"data: a\n\n", headers=EVENTS))
    page.goto(shop.base_url)
    data = run(
        Tab(page),
        _WITH_KEY
        + """
        const ticket = async () => (await (await fetch(base + "/ticket", {method: "POST", headers})).json()).ticket;
        const source = new EventSource(`${url}?ticket=${encodeURIComponent(await ticket())}`);
        const data = await new Promise((resolve) => { source.onmessage = (event) => resolve(event.data); });
        source.close();
        return [data, (await client.stream(url, {ticket})).events];
        """,
        base=elsewhere.base_url,
        url=f"{elsewhere.base_url}/v1{path}",
    )
    assert data == ["a", 1]


def test_a_page_of_another_origin_gets_nothing_and_reaches_nobody(
    page: Page, console: Console, shop: Gunicorn, elsewhere: Gunicorn, upstream: Upstream
) -> None:
    path = upstream.serve(lambda ex: ex.reply(DONE, headers=EVENTS))
    console.expect("CORS policy|ERR_FAILED|status of 403")
    page.goto(shop.base_url.replace("127.0.0.1", "localhost"))
    url = f"{elsewhere.base_url}/v1{path}"
    for code in ("client.stream(url, {body: {}, headers})", "client.stream(url)", 'client.stream(url, {body: "x"})'):
        with pytest.raises(Thrown) as caught:
            run(Tab(page), f"{_WITH_KEY} await {code}", url=url)
        assert caught.value.code == "network"
    assert upstream.seen(path) == []


# --- Over HTTP/2


@pytest.fixture(scope="module")
def h2_page(browser: Browser, shop: Gunicorn, front: Front, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    plain: Path = tmp_path_factory.mktemp("plain") / "socket"
    with (
        front.up(SimpleNamespace(relay=shop), plain) as proxy,
        new_page(browser, ignore_https_errors=True) as (page, console),
    ):
        console.expect("ERR_HTTP2_PROTOCOL_ERROR")  # how Chromium calls a cut
        page.goto(f"https://127.0.0.1:{proxy.port}/")
        yield page


def test_ten_streams_at_once_over_http2(h2_page: Page, upstream: Upstream) -> None:
    path = upstream.by_hand()
    job = Tab(h2_page).start(
        """
        globalThis.got = [];
        const follow = async (n) => {
            const kept = [];
            for await (const {data} of client.stream(`/v1${path}`, {body: {n}, endMarker: "[DONE]"})) {
                kept.push(data);
                got.push(n);
            }
            return kept;
        };
        const all = await Promise.all([0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map(follow));
        return [all, performance.getEntriesByType("navigation")[0].nextHopProtocol];
        """,
        path=path,
    )
    open_at_once = [upstream.next(path) for _ in range(10)]  # HTTP/1.1 would stop at six
    for ex in open_at_once:
        ex.head(headers=EVENTS)
        ex.send(b"data: " + ex.body + b"\n\n")
    eventually(lambda: h2_page.evaluate("new Set(got).size") == 10, "an event of each while all are open")
    for ex in open_at_once:
        ex.send(DONE)
        ex.end()
    assert job.result() == [[[f'{{"n":{n}}}', "[DONE]"] for n in range(10)], "h2"]


def test_a_stop_reaches_the_upstream_over_http2_and_leaves_the_others_alone(h2_page: Page, upstream: Upstream) -> None:
    path = upstream.by_hand()
    tab = Tab(h2_page)
    job = tab.start(
        """
        globalThis.streams = [1, 2].map((n) => client.stream(`/v1${path}`, {body: {n}}));
        const settled = await Promise.allSettled(streams);
        return settled.map(({status, reason}) => reason?.code ?? status);
        """,
        path=path,
    )
    exchanges = {ex.body: ex for ex in (upstream.next(path), upstream.next(path))}
    first, second = exchanges[b'{"n":1}'], exchanges[b'{"n":2}']
    for ex in (first, second):
        ex.head(headers=EVENTS)
        ex.send(b"data: a\n\n")
    h2_page.evaluate("streams[0].abort()")
    first.wait_gone()
    second.send(b"data: b\n\n")
    second.end()
    assert job.result() == ["aborted", "fulfilled"]


def test_a_cut_over_http2_is_an_error_too(h2_page: Page, upstream: Upstream) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        ex.send(b"data: a\n\ndata: b")
        ex.abort()

    path = upstream.serve(handler)
    with pytest.raises(Thrown) as caught:
        run(Tab(h2_page), "await client.stream(url, {body: {}})", url=f"/v1{path}")
    assert caught.value.code == "cut"
