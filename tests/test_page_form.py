"""The page's form: for the keyboard, a screen reader, a small screen, other colours, and without JavaScript."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness import llm, servers
from harness.browser import new_page
from harness.js import installed
from harness.trying import CHAT, Trying, piece, says
from harness.upstream import Upstream
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.servers import Gunicorn
    from playwright.sync_api import Browser

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 320, "height": 568}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
_TOO_WIDE = """() => [document.documentElement, ...document.querySelectorAll("body, body *:not(.unseen)")]
    .filter((each) => each.clientWidth > 0 && each.scrollWidth > each.clientWidth + 1
        && each.tagName !== "INPUT" && getComputedStyle(each).display !== "inline")
    .map((each) => `${each.tagName}#${each.id}.${each.className}: ${each.scrollWidth} > ${each.clientWidth}`)"""
_TOO_SMALL = """() => [...document.querySelectorAll("button, summary, input, textarea")]
    .filter((each) => each.checkVisibility())
    .map((each) => [each.id || each.textContent, each.getBoundingClientRect()])
    .filter(([, box]) => box.height < 44 || box.width < 44).map(([name]) => name)"""
_FOCUSED = """() => { const at = document.activeElement, seen = getComputedStyle(at).outlineStyle !== "none";
    return [at === document.body ? "" : at.id || at.textContent.trim(), seen]; }"""
_LIVE = """() => [...document.querySelectorAll("[aria-live], [role=status], [role=log], [role=alert]")]
    .map((each) => [each.id, each.getAttribute("aria-live") ?? "polite"])"""
_SHIFTS = """window.shifted = 0; new PerformanceObserver((list) => {
    for (const each of list.getEntries()) window.shifted += each.value;
}).observe({type: "layout-shift", buffered: true});"""
_LAST_LINE = """(text) => { const lines = [...text.querySelectorAll("*")].pop(), range = document.createRange();
    const node = lines.firstChild, at = node.data.lastIndexOf("E");
    const left = (from, to) => { range.setStart(node, from); range.setEnd(node, to);
        return range.getBoundingClientRect().left - text.getBoundingClientRect().left; };
    return [left(at, at + 1), left(node.length - 1, node.length)]; }"""
LONG = ["A line of words that is longer than a small screen is wide. ", "averylongwordwithoutanyend" * 8, "\nmore" * 30]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Upstream, Gunicorn]]:
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url}) as relay:
        upstream.by_hand(CHAT)
        yield upstream, relay


@pytest.fixture
def upstream(served: tuple[Upstream, Gunicorn]) -> Iterator[Upstream]:
    yield served[0]
    for exchange in served[0].seen(CHAT):
        if not exchange.finished.is_set():
            exchange.wait_gone()  # its page is closed


@pytest.fixture
def url(served: tuple[Upstream, Gunicorn]) -> str:
    return f"{served[1].base_url}/"


# States to look at


def empty(trying: Trying, upstream: Upstream) -> None:
    expect(trying["health-text"]).to_have_text("Upstream ok")


def streaming(trying: Trying, upstream: Upstream) -> None:
    trying.ask("Hello?")
    exchange = upstream.next(CHAT)
    exchange.head(headers=llm.EVENTS)
    exchange.send(b"".join(map(piece, LONG)))
    trying.shows("".join(LONG))


def done(trying: Trying, upstream: Upstream) -> None:
    trying.ask("Hello?")
    says(upstream.next(CHAT), LONG)
    trying.ends("complete")


def failed(trying: Trying, upstream: Upstream) -> None:
    done(trying, upstream)
    trying.ask("And then?")
    exchange = upstream.next(CHAT)
    exchange.head(headers=llm.EVENTS)
    exchange.send(piece("Half of "))
    exchange.end()
    trying.ends("failed")


def refused(trying: Trying, upstream: Upstream) -> None:
    trying.ask("Hello?")
    upstream.next(CHAT).reply(llm.openai_error("no such key", "auth", "invalid_api_key"), 401, "No", llm.JSON)
    trying.ends("failed")
    expect(trying["key"]).to_be_focused()


STATES = [empty, streaming, done, failed, refused]
state = pytest.mark.parametrize("state", [pytest.param(each, id=each.__name__) for each in STATES])


def everything_open(trying: Trying) -> None:
    for name in ("numbers", "elsewhere", "options"):
        trying.page.evaluate("(name) => { document.getElementById(name).open = true; }", name)


@state
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(DESKTOP | {"color_scheme": "light"}, id="light"),
        pytest.param(DESKTOP | {"color_scheme": "dark"}, id="dark"),
        pytest.param(PHONE | {"color_scheme": "dark"}, id="phone"),
    ],
)
def test_axe_finds_nothing(
    browser: Browser, upstream: Upstream, url: str, options: dict[str, Any], state: Callable[[Trying, Upstream], None]
) -> None:
    """Neither in WCAG's rules, contrast included, nor in its own best practices; folded out and not."""
    with new_page(browser, reduced_motion="reduce", **options) as (page, console):
        console.expect("status of 401")
        trying = Trying(page, url)
        state(trying, upstream)
        page.evaluate((installed() / "axe-core" / "axe.min.js").read_text())
        for prepare in (lambda _: None, everything_open):
            prepare(trying)
            found = page.evaluate("() => axe.run()")
            assert found["passes"], "it has looked"
            faults = [
                (fault["id"], fault["impact"], [node["html"] for node in fault["nodes"]])
                for fault in found["violations"]
            ]
            assert faults == []


@state
@pytest.mark.parametrize("size", ["100%", "200%"])
def test_a_phone_shows_all_of_it_and_scrolls_only_down(
    browser: Browser, upstream: Upstream, url: str, state: Callable[[Trying, Upstream], None], size: str
) -> None:
    """At 320 px, and with the text twice as large; and what is to be touched is 44 px or more."""
    with new_page(browser, **PHONE) as (page, console):
        console.expect("status of 401")
        trying = Trying(page, url)
        page.evaluate("(size) => { document.documentElement.style.fontSize = size; }", size)
        state(trying, upstream)
        for prepare in (lambda _: None, everything_open):
            prepare(trying)
            assert page.evaluate(_TOO_WIDE) == []
            assert page.evaluate(_TOO_SMALL) == []


def test_on_a_phone_the_prompt_is_in_view_even_with_a_keyboard(browser: Browser, upstream: Upstream, url: str) -> None:
    with new_page(browser, **PHONE) as (page, _):
        trying = Trying(page, url)
        done(trying, upstream)
        expect(trying["prompt"]).to_be_in_viewport(ratio=1)
        expect(trying["send"]).to_be_in_viewport(ratio=1)
        page.set_viewport_size({"width": 320, "height": 300})  # what a keyboard leaves
        trying["prompt"].tap()
        expect(trying["prompt"]).to_be_in_viewport(ratio=1)
        expect(trying["send"]).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
@pytest.mark.parametrize("options", [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")])
def test_nothing_jumps_when_it_loads_or_an_answer_comes(
    browser: Browser, upstream: Upstream, url: str, options: dict[str, Any], motion: Any
) -> None:
    """By the browser's own count of what has moved, of which 0.1 is good; and the prompt stays where it is."""
    top = "() => document.getElementById('prompt').getBoundingClientRect().top"
    with new_page(browser, reduced_motion=motion, **options) as (page, _):
        page.add_init_script(_SHIFTS)
        trying = Trying(page, url)
        empty(trying, upstream)
        before = page.evaluate(top)
        trying.ask("Hello?")
        says(upstream.next(CHAT), ["One ", "two."])
        trying.ends("complete")
        expect(trying["status"]).to_contain_text("Answer complete")
        assert page.evaluate(top) == before
        assert page.evaluate("() => window.shifted") < 0.1


def test_each_line_has_the_direction_of_its_own_words(browser: Browser, upstream: Upstream, url: str) -> None:
    with new_page(browser) as (page, _):
        trying = Trying(page, url)
        trying.ask("שלום?")
        says(upstream.next(CHAT), ["שלום! זוהי שורה.\n", "English."])
        trying.ends("complete")
        first, last = trying.answer.locator(".text").evaluate(_LAST_LINE)
        assert first < 20, "it begins at the left"
        assert last > first, "its full stop is behind it"


def test_everything_can_be_done_with_the_keyboard(browser: Browser, upstream: Upstream, url: str) -> None:
    """The prompt has the focus; Tab goes through everything in the order of reading and out again; focus is seen."""
    with new_page(browser, **DESKTOP) as (page, _):
        trying = Trying(page, url)
        expect(trying["prompt"]).to_be_focused()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        assert trying["prompt"].input_value() == "one\ntwo"
        page.keyboard.press("Enter")
        exchange = upstream.next(CHAT)
        assert b"one\\ntwo" in exchange.body
        assert trying["prompt"].input_value() == ""
        page.keyboard.type("next")
        page.keyboard.press("Enter")  # not while an answer comes
        exchange.head(headers=llm.EVENTS)
        exchange.send(piece("Half of "))
        trying.shows("Half of ")
        assert trying["prompt"].input_value() == "next"
        page.keyboard.press("Escape")
        exchange.wait_gone()
        trying.ends("stopped")
        expect(trying["prompt"]).to_be_focused()
        assert len(upstream.seen(CHAT)) == exchange_number(upstream, exchange)

        order, unseen = [], []
        for _step in range(30):
            page.keyboard.press("Tab")
            name, seen = page.evaluate(_FOCUSED)
            if name in order:
                break
            order.append(name)
            if name and not seen:
                unseen.append(name)
        assert unseen == []
        ends = order.index("")  # the browser's own controls come there
        in_order = [*order[ends + 1 :], *order[:ends]]
        assert in_order == [
            "Skip to the prompt", "log", "Copy what came", "prompt", "send", "Options", "clear",
            "Measured", "With curl", "curl", "copy-curl",
        ]  # fmt: skip


def exchange_number(upstream: Upstream, exchange: object) -> int:
    return 1 + upstream.seen(CHAT).index(exchange)  # type: ignore[arg-type]


def test_an_input_methods_enter_does_not_send(browser: Browser, upstream: Upstream, url: str) -> None:
    with new_page(browser) as (page, _):
        trying = Trying(page, url)
        trying["prompt"].fill("にほ")
        page.evaluate("""() => document.getElementById("prompt").dispatchEvent(
            new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))""")
        assert trying["prompt"].input_value() == "にほ"
        assert trying.page.locator(".turn").count() == 0
        trying["prompt"].press("Enter")
        says(upstream.next(CHAT), ["はい"])
        trying.ends("complete")


def test_a_screen_reader_hears_of_answers_and_not_of_tokens(browser: Browser, upstream: Upstream, url: str) -> None:
    with new_page(browser) as (page, _):
        trying = Trying(page, url)
        done(trying, upstream)
        assert len(trying.said) == 3
        tree = page.locator("body").aria_snapshot()
        for part in ("banner", "main", "complementary", 'heading "relay" [level=1]', 'log "Conversation"', "status"):
            assert part in tree
        assert sorted(page.evaluate(_LIVE)) == [["health", "polite"], ["log", "off"], ["status", "polite"]]
        image = page.get_by_role("img", name="median")
        expect(image).to_have_count(1)


def test_colours_and_motion_follow_the_system(browser: Browser, upstream: Upstream, url: str) -> None:
    shade = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    moving = "() => document.getAnimations().length"
    with new_page(browser, color_scheme="light") as (page, _):
        trying = Trying(page, url)
        streaming(trying, upstream)
        assert min(page.evaluate(shade)) > 200
        assert page.evaluate(moving) == 1
        page.emulate_media(color_scheme="dark", reduced_motion="reduce")
        assert max(page.evaluate(shade)) < 50
        assert page.evaluate(moving) == 0


def test_copying_gives_the_answers_own_text(browser: Browser, upstream: Upstream, url: str) -> None:
    texts = ["  one\n\n", "<b>two</b>\t", "\n" * 3 + "🐘"]
    # "Copied" stands there for a second and a half: for fifteen seconds here, in which the test gets round to looking.
    slower = "const later = setTimeout; window.setTimeout = (call, ms) => later(call, ms === 1500 ? 15_000 : ms);"
    for permissions in (["clipboard-read", "clipboard-write"], []):
        with new_page(browser, permissions=permissions) as (page, _):
            page.add_init_script(slower)
            trying = Trying(page, url)
            trying.ask("Hello?")
            says(upstream.next(CHAT), texts)
            trying.ends("complete")
            if not permissions:  # as over plain HTTP on a network
                page.evaluate("() => Object.defineProperty(navigator, 'clipboard', {value: undefined})")
            button = trying.answer.locator("button")
            button.click()
            expect(button).to_have_text("Copied")
            if permissions:
                assert page.evaluate("() => navigator.clipboard.readText()") == "".join(texts)
            else:
                trying["prompt"].focus()
                page.keyboard.press("Control+V")
                assert trying["prompt"].input_value() == "".join(texts)


def test_clearing_stops_what_still_comes(browser: Browser, upstream: Upstream, url: str) -> None:
    with new_page(browser) as (page, _):
        trying = Trying(page, url)
        trying.ask("Hello?")
        exchange = upstream.next(CHAT)
        exchange.head(headers=llm.EVENTS)
        exchange.send(piece("Half of "))
        trying.shows("Half of ")
        trying["clear"].click()
        exchange.wait_gone()
        assert page.locator(".turn").count() == 0
        expect(trying["status"]).to_have_text("Conversation cleared.")
        expect(trying["send"]).to_have_text("Send")
        expect(trying["empty"]).to_be_visible()


@pytest.mark.parametrize("how", ["off", "not-loaded"])
def test_without_its_script_a_sentence_says_so(browser: Browser, url: str, how: str) -> None:
    with new_page(browser, java_script_enabled=how != "off", reduced_motion="reduce") as (page, console):
        console.expect("ERR_FAILED")
        page.route("**/relay-client.js", lambda route: route.abort())
        page.goto(url)
        expect(page.get_by_text("This page needs JavaScript")).to_be_visible()
        page.get_by_text("With curl", exact=True).click()
        expect(page.locator("#curl")).to_be_visible()
        expect(page.locator("#send")).to_be_disabled()
