"""In Chromium and in Node the client gives the events that Chromium's own EventSource gives for the same bytes.

Every recorded stream, every edge case and our own, in several splits, relayed.
"""

from __future__ import annotations

import re
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from harness import cases
from harness.js import Node, Tab, node, pages, run
from harness.own_cases import OWN
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.cases import Case
    from harness.upstream import Exchange
    from playwright.sync_api import Browser

BYTE_BY_BYTE = 600  # the longest body that is sent so
APART = 0.001  # seconds between pieces, or the kernel joins them; fewer pieces only
MANY = 700  # pieces that are sent without

# What the relay says of a cut has the request's id in it; a long text is compared by its length and a hash.
_BRIEF = """
const brief = ({event, data, id}) => {
    let text = data.replace(/"request_id": "[^"]*"/, "");
    if (text.length > 2000) {
        let hash = 0;
        for (let n = 0; n < text.length; n += 1) hash = (Math.imul(hash, 31) + text.charCodeAt(n)) | 0;
        text = `${text.length} ${hash}`;
    }
    return [event, text, id];
};
const kept = [];
"""
_EVENT_SOURCE = (
    _BRIEF
    + """
const source = new EventSource(url);
await new Promise((resolve) => {
    const keep = (event) => {
        if (event instanceof MessageEvent) {
            kept.push(brief({event: event.type, data: event.data, id: event.lastEventId}));
        } else if (event.type === "error") {
            source.close();
            resolve();
        }
    };
    for (const name of new Set([...names, "message", "error"])) source.addEventListener(name, keep);
});
return kept;
"""
)
_CLIENT = (
    _BRIEF
    + """
const options = {errorFrames: false, onMessage: (message) => kept.push(brief(message))};
const code = await client.stream(url, options).then(() => null, (error) => error.code);
return [kept, code];
"""
)


@dataclass
class Places:
    upstream: Upstream
    base_url: str
    page: Tab
    node: Node


@pytest.fixture(scope="module")
def places(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    with Upstream() as upstream, pages(upstream, tmp_path_factory.mktemp("built")) as server, node() as running:
        page = browser.new_page()
        page.goto(server.base_url)
        yield Places(upstream, f"{server.base_url}/v1", Tab(page), running)
        page.context.close()


def splits(case: Case) -> Iterator[list[bytes]]:
    yield list(case.pieces)
    if len(case.body) > 1:
        yield cases.at_random(case.body, zlib.crc32(case.name.encode()))
    if 1 < len(case.body) <= BYTE_BY_BYTE:
        yield cases.by_bytes(case.body)


def names(body: bytes) -> list[str]:
    """What EventSource must be told to listen for: every event name there might be."""
    lines = re.split(r"\r\n|\r|\n", body.decode("utf-8", "replace").removeprefix("\ufeff"))
    return sorted({re.sub(r"^event: ?", "", line) for line in lines if line.startswith("event:")})


def table(found: list[Case], missing: str = "") -> list[Any]:
    if not found:
        return [pytest.param(None, id="missing", marks=pytest.mark.skip(reason=f"needs {missing}"))]
    return [pytest.param(case, id=case.name) for case in found]


def play(places: Places, case: Case, pieces: list[bytes]) -> dict[str, Any]:
    """What each of the three makes of it; `code` is that of the client's error in page and Node."""

    def handler(ex: Exchange) -> None:
        ex.head(case.status, "So", case.headers)
        for piece in pieces:
            ex.send(piece)
            if len(pieces) < MANY:
                time.sleep(APART)
        ex.end() if case.end == "clean" else ex.abort()

    path = places.upstream.serve(handler)
    url = places.base_url + path
    jobs = {
        "EventSource": places.page.start(_EVENT_SOURCE, url=url, names=names(case.body)),
        "page": places.page.start(_CLIENT, url=url),
        "node": places.node.start(_CLIENT, url=url),
    }
    results = {name: job.result() for name, job in jobs.items()}
    places.upstream.forget(path)
    return results


def check(places: Places, case: Case) -> None:
    for pieces in splits(case):
        results = play(places, case, pieces)
        by_source, (in_page, code), (in_node, code_in_node) = results.values()
        if case.end == "clean":
            assert in_page == by_source
            assert in_node == by_source
            assert (code, code_in_node) == (None, None)
        else:
            # What came together with the break may be lost with it, in a browser above all.
            longest = max(results["EventSource"], in_page, in_node, key=len)
            for kept in (by_source, in_page, in_node):
                assert kept == longest[: len(kept)]
            assert (code, code_in_node) == ("cut", "cut")


def readable(case: Case) -> bool:
    return case.is_event_stream and case.status == 200


@pytest.mark.parametrize("case", table([case for case in OWN if readable(case)]))
def test_our_own_cases_give_eventsources_events(places: Places, case: Case) -> None:
    check(places, case)


@pytest.mark.parametrize("case", table(cases.edge_cases(), "../shared/edge-cases"))
def test_every_edge_case_gives_eventsources_events(places: Places, case: Case) -> None:
    check(places, case)


@pytest.mark.parametrize("case", table([case for case in cases.recorded() if readable(case)], "../shared/streams"))
def test_every_recorded_stream_gives_eventsources_events(places: Places, case: Case) -> None:
    check(places, case)


@pytest.mark.parametrize(
    "case",
    table([case for case in [*OWN, *cases.recorded()] if not (case.is_event_stream and case.status < 300)]),
)
def test_what_is_no_event_stream_gives_an_error_and_no_events(places: Places, case: Case) -> None:
    by_source, (in_page, code), (in_node, code_in_node) = play(places, case, list(case.pieces)).values()
    assert by_source == in_page == in_node == []
    if case.status == 200:
        assert (code, code_in_node) == ("not_events", "not_events")
    else:
        assert code is not None
        assert code_in_node is not None


def test_the_cases_are_not_empty(places: Places) -> None:
    """EventSource does give events here, so that equal lists are more than equally empty."""
    (case,) = (case for case in OWN if case.name == "mixed-ends")
    results = play(places, case, cases.by_bytes(case.body))
    assert [data for _, data, _ in results["EventSource"]] == ["1\n2\n3", "4", "5"]
    assert run(places.page, "return location.protocol") == "http:"
