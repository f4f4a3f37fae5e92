"""The page in a real browser: text as it comes, stopping, and answers that are not whole never looking so."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from harness import eventually, llm, servers
from harness.browser import new_page
from harness.trying import CHAT, DONE, Trying, piece, says
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Service
    from harness.browser import Console
    from harness.upstream import Exchange, Upstream
    from playwright.sync_api import Browser, Page

KEY = "a-key-for-the-page"


@pytest.fixture
def upstream(service: Service) -> Upstream:
    service.upstream.by_hand(CHAT)
    service.upstream.forget(CHAT)  # what others have asked for there
    service.upstream.by_hand(CHAT)
    return service.upstream


@pytest.fixture
def trying(page: Page, service: Service, upstream: Upstream) -> Iterator[Trying]:
    """The service's page, direct, with the scriptable upstream behind it."""
    opened = Trying(page, f"{service.relay.base_url}/")
    yield opened
    opened.check()


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The address of a service with nothing configured: the demo upstream answers."""
    with servers.gunicorn({}) as relay:
        yield relay.base_url


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """The same with client keys."""
    with servers.gunicorn({"RELAY_CLIENT_KEYS": KEY}) as relay:
        yield relay.base_url


def begun(trying: Trying, upstream: Upstream, prompt: str, *texts: str) -> Exchange:
    """Ask, and have these texts on the page."""
    trying.ask(prompt)
    exchange = upstream.next(CHAT)
    exchange.head(headers=llm.EVENTS)
    exchange.send(b"".join(map(piece, texts)))
    trying.shows("".join(texts))
    return exchange


def body(exchange: Exchange) -> Any:
    return json.loads(exchange.body)


# An answer


def test_text_arrives_piece_by_piece_and_is_whole_at_the_end(hop: Service, upstream: Upstream, page: Page) -> None:
    """Directly and through the shipped nginx; each piece is on the page before the next is sent."""
    trying = Trying(page, f"http://127.0.0.1:{hop.port}/")
    expect(trying["health-text"]).to_have_text("Upstream ok")
    exchange = begun(trying, upstream, "Hello?", "Every ")
    asked = body(exchange)
    assert asked["messages"] == [{"role": "user", "content": "Hello?"}]
    assert asked["stream"] is True
    assert trying.answer.get_attribute("aria-busy") == "true"
    expect(trying["send"]).to_have_text("Stop")
    exchange.send(piece("byte,\n  "))
    trying.shows("Every byte,\n  ")
    exchange.send(b": a heartbeat\n\n" + piece("at once."))
    trying.shows("Every byte,\n  at once.")
    exchange.send(DONE)
    exchange.end()
    trying.ends("complete")
    expect(trying["send"]).to_have_text("Send")
    assert trying.answer.get_attribute("aria-busy") is None
    assert trying["events"].inner_text() == "4"
    assert trying["heartbeats"].inner_text() == "1"
    assert trying["bytes"].inner_text().endswith(" B")
    assert trying["first-byte"].inner_text().endswith((" ms", " s"))
    assert float(trying["rate"].inner_text()) > 0
    assert "median" in trying["gaps"].inner_text()
    assert trying["bars"].get_attribute("d").count("M") == 3  # type: ignore[union-attr]
    assert [said.split(":")[0].rstrip(".") for said in trying.said] == [
        "Waiting for the answer",
        "Answer started",
        "Answer complete",
    ]
    trying.check()


def test_the_conversation_goes_along_until_it_is_cleared(trying: Trying, upstream: Upstream) -> None:
    for prompt, answer in (("One?", "1"), ("Two?", "2")):
        says_it = begun(trying, upstream, prompt, answer)
        says_it.send(DONE)
        says_it.end()
        trying.ends("complete")
    assert [message["content"] for message in body(says_it)["messages"]] == ["One?", "1", "Two?"]
    trying["clear"].click()
    assert trying.page.locator(".turn").count() == 0
    trying["options"].locator("summary").click()
    trying["model"].fill("made-up-2")
    trying.ask("Three?")
    exchange = upstream.next(CHAT)
    assert body(exchange)["messages"] == [{"role": "user", "content": "Three?"}]
    assert body(exchange)["model"] == "made-up-2"
    says(exchange, ["3"])
    trying.ends("complete")


def test_an_anthropic_answer_is_whole_at_message_stop(trying: Trying, upstream: Upstream) -> None:
    trying.ask("Hello?")
    exchange = upstream.next(CHAT)
    exchange.head(headers=llm.EVENTS)
    events = llm.message_events()
    exchange.send(b"".join(events[:-1]))
    trying.shows(llm.TEXT)
    assert trying.answer.get_attribute("data-state") == "streaming"
    exchange.send(events[-1])
    exchange.end()
    trying.ends("complete")


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(["<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"], id="html"),
        pytest.param(["  two\n\n\n   lines \t", "\n"], id="whitespace"),
        pytest.param(["\ud83d", "\udc18 👨‍👩", "‍👧"], id="split-emoji"),
        pytest.param(["سلام ", "دنیا\n", "hello"], id="right-to-left"),
        pytest.param(["&lt;b&gt; %3Cb%3E ${x} {{x}}"], id="escapes"),
    ],
)
def test_an_answer_is_text_and_nothing_else(trying: Trying, upstream: Upstream, pieces: list[str]) -> None:
    trying.ask(pieces[0].replace("\ud83d", "🐘"))
    says(upstream.next(CHAT), pieces)
    trying.ends("complete")
    whole = "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16")
    assert trying.text == whole
    assert trying.page.locator(".turn :is(img, script, b)").count() == 0
    assert trying.page.title() == "relay"
    direction = trying.page.evaluate("() => getComputedStyle(document.querySelector('.answer .text > div')).direction")
    assert direction == ("rtl" if whole.startswith("س") else "ltr")


def test_twenty_thousand_events_are_shown_in_frames_and_not_one_by_one(trying: Trying, upstream: Upstream) -> None:
    """200 KB as fast as they come: all of it is there, by far fewer changes of the page than there were events."""
    trying.page.evaluate("""() => {
        window.changes = 0;
        new MutationObserver((all) => (window.changes += all.length)).observe(
            document.getElementById("log"), {subtree: true, childList: true, characterData: true});
    }""")
    texts = [f"{n:09d}{' ' if n % 40 else chr(10)}" for n in range(20_000)]
    trying.ask("All of it")
    says(upstream.next(CHAT), texts)
    trying.ends("complete")
    assert trying.text == "".join(texts)
    assert trying["events"].inner_text() == "20,001"
    assert trying.page.evaluate("() => window.changes") < 4000
    assert trying["bars"].get_attribute("d").count("M") <= 120  # type: ignore[union-attr]


def test_it_follows_the_text_only_while_the_reader_is_at_its_end(trying: Trying, upstream: Upstream) -> None:
    top = "() => Math.round(document.getElementById('log').scrollTop)"
    left = """() => { const log = document.getElementById("log");
                      return log.scrollHeight - log.scrollTop - log.clientHeight; }"""
    exchange = begun(trying, upstream, "Long?", *["line\n"] * 80)
    eventually(lambda: trying.page.evaluate(left) < 2, "the end in view")
    before = trying.page.evaluate(top) - 600
    trying["log"].hover()
    trying.page.mouse.wheel(0, -600)
    expect(trying["to-end"]).to_be_visible()
    eventually(lambda: trying.page.evaluate(top) == before, "the end of the scrolling")
    exchange.send(piece("more\n" * 40))
    trying.shows("line\n" * 80 + "more\n" * 40)
    assert trying.page.evaluate(top) == before
    trying["to-end"].click()
    eventually(lambda: trying.page.evaluate(left) < 2, "the end in view again")
    exchange.send(piece("end\n" * 40) + DONE)
    exchange.end()
    trying.ends("complete")
    eventually(lambda: trying.page.evaluate(left) < 2, "the end in view still")
    expect(trying["to-end"]).to_be_hidden()


# Answers that are not whole


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_reaches_the_upstream(trying: Trying, upstream: Upstream, how: str) -> None:
    exchange = begun(trying, upstream, "Hello?", "Half of ")
    if how == "button":
        trying.page.wait_for_timeout(450)  # a double click on "Send" is not meant for "Stop"
        trying["send"].click()
    else:
        trying.page.keyboard.press("Escape")
    exchange.wait_gone()
    trying.ends("stopped")
    assert trying.text == "Half of "
    assert trying.answer.locator("h3").inner_text() == "Answer, incomplete"
    assert trying.note == "You stopped this answer."
    assert trying.said[-1].startswith("Answer stopped, incomplete")


def cut(exchange: Exchange) -> None:
    """The relay tells why in an error frame; a browser may drop what it has not yet read when the connection breaks."""
    exchange.abort()


def end_without_its_mark(exchange: Exchange) -> None:
    exchange.end()


def test_an_answer_that_has_said_why_it_stopped_is_complete_without_its_mark(
    trying: Trying, upstream: Upstream
) -> None:
    """The upstream keeps the connection open."""
    exchange = begun(trying, upstream, "Hello?", "All of ")
    exchange.send(
        llm.event(llm.as_json({"choices": [{"index": 0, "delta": {"content": "it"}, "finish_reason": "stop"}]}))
    )
    trying.ends("complete")
    assert trying.text == "All of it"
    exchange.wait_gone()


def report_an_error(exchange: Exchange) -> None:
    exchange.send(llm.event(llm.openai_error("<b>the model fell over</b>", "server_error", "server_error"), "error"))
    exchange.end()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        pytest.param(cut, r"cut off|the upstream", id="cut"),
        pytest.param(end_without_its_mark, r"end marker", id="no-mark"),
        pytest.param(report_an_error, r"<b>the model fell over</b>", id="error"),
    ],
)
def test_a_broken_answer_says_so_and_why(
    trying: Trying, upstream: Upstream, console: Console, end: Callable[[Exchange], None], reason: str
) -> None:
    console.expect("ERR_INCOMPLETE_CHUNKED_ENCODING")
    end(begun(trying, upstream, "Hello?", "Half of "))
    trying.ends("failed")
    assert trying.text == "Half of "
    assert trying.answer.locator("h3").inner_text() == "Answer, incomplete"
    assert trying.note.startswith("Incomplete, the answer broke off:")
    assert re.search(reason, trying.note)
    assert trying.said[-1] == "Answer failed, incomplete."
    trying.answer.get_by_role("button", name="Try again").click()
    exchange = upstream.next(CHAT)
    assert [message["content"] for message in body(exchange)["messages"]] == ["Hello?"]
    says(exchange, ["Whole."])
    trying.ends("complete")
    assert trying.page.locator(".answer").count() == 1


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_an_upstreams_refusal_is_shown_and_asked_once(
    trying: Trying, upstream: Upstream, console: Console, status: int
) -> None:
    console.expect(f"status of {status}")
    before = len(upstream.seen(CHAT))
    trying.ask("Hello?")
    upstream.next(CHAT).reply(llm.openai_error("not today", "some_error", "some_code"), status, "No", llm.JSON)
    trying.ends("failed")
    assert trying.answer.locator("h3").inner_text() == "No answer"
    assert trying.note.split("\n") == [f"The request failed (status {status}):", "not today"]
    assert trying.said[-1] == "Answer failed."
    assert len(upstream.seen(CHAT)) == before + 1


def test_an_answer_at_its_limit_of_tokens_says_so(trying: Trying, upstream: Upstream) -> None:
    exchange = begun(trying, upstream, "Hello?", "As much as")
    exchange.send(piece("", finish_reason="length") + DONE)
    exchange.end()
    trying.ends("complete")
    assert "limit of tokens" in trying.note


def test_a_relay_that_is_gone_is_said_to_be(browser: Browser) -> None:
    with servers.gunicorn({}) as relay, new_page(browser) as (page, console):
        console.expect("ERR_(CONNECTION_REFUSED|CONNECTION_RESET|EMPTY_RESPONSE)")
        trying = Trying(page, f"{relay.base_url}/")
        expect(trying["health-text"]).to_have_text("Upstream ok (the built-in demo)")
        relay.end()
        trying.ask("Hello?")
        trying.ends("failed")
        assert "connection failed" in trying.note
        page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        expect(trying["health-text"]).to_have_text("Relay not reachable")


# The demo, keys, health


def test_the_demo_answers_and_the_curl_line_is_the_same_call(demo: str, page: Page) -> None:
    """What a stranger does first. The line is run by a shell, with a quote and a dollar in the prompt."""
    trying = Trying(page, f"{demo}/")
    expect(trying["health-text"]).to_have_text("Upstream ok (the built-in demo)")
    trying.ask("What's $HOME?")
    trying.ends("complete")
    assert trying.text.startswith("Hello from the relay’s demo upstream")
    assert "You said: “What's $HOME?”" in trying.text
    ran = subprocess.run(["bash", "-c", trying["curl"].inner_text()], capture_output=True, timeout=40, check=True)
    assert ran.stdout.endswith(b"data: [DONE]\n\n")
    assert b"$HOME?" in ran.stdout, "the shell has left the prompt alone"
    trying.check()


def test_a_401_asks_for_the_key_which_is_kept_nowhere(guarded: str, page: Page, console: Console) -> None:
    console.expect("status of 401")
    trying = Trying(page, f"{guarded}/")
    trying.ask("Hello?")
    trying.ends("failed")
    assert "(status 401)" in trying.note
    expect(trying["key"]).to_be_focused()
    trying["key"].press_sequentially("wrong")
    page.keyboard.press("Enter")
    eventually(lambda: len([url for url in trying.asked if url.endswith("stream-chat")]) == 2, "a second request")
    trying.ends("failed")
    trying["key"].fill(KEY)
    trying["key"].press("Enter")
    trying.ends("complete")
    assert trying.text.startswith("Hello from the relay’s demo upstream")
    assert trying["key"].get_attribute("type") == "password"
    kept = page.evaluate("""async () => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie,
        location.href, history.state, document.documentElement.outerHTML, (await indexedDB.databases()).length,
        (await caches.keys()).length])""")
    assert KEY not in kept
    assert "Bearer $RELAY_CLIENT_KEY" in trying["curl"].inner_text()
    assert not any(KEY in url for url in trying.asked)
    page.reload()
    assert trying["key"].input_value() == ""
    trying.check()


def test_health_is_said_in_words_and_not_asked_for_while_nobody_looks(browser: Browser) -> None:
    nobody = f"http://127.0.0.1:{servers.free_port()}"
    with servers.gunicorn({"RELAY_UPSTREAM_URL": nobody}) as relay, new_page(browser) as (page, console):
        console.expect("status of 503")
        page.clock.install()
        trying = Trying(page, f"{relay.base_url}/")
        expect(trying["health-text"]).to_have_text("Upstream down: the relay cannot reach it")

        def asked() -> int:
            return len([url for url in trying.asked if url.endswith("/health")])

        before = asked()
        page.clock.fast_forward(11_000)
        eventually(lambda: asked() == before + 1, "asked again after ten seconds")
        page.evaluate("""() => { Object.defineProperty(document, "hidden", {get: () => true, configurable: true});
                                 document.dispatchEvent(new Event("visibilitychange")); }""")
        page.clock.fast_forward(60_000)
        page.evaluate("() => fetch('./health/live').then(() => 1)")  # a request that comes after those that must not
        assert asked() == before + 1
        page.evaluate("() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }")
        eventually(lambda: asked() == before + 2, "asked when somebody looks again")
