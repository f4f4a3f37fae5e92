"""useStreamingChat with real React in Chromium, StrictMode on: what a page shows, and what the upstream is asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from harness import eventually
from harness.js import JS, build, pages
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.browser import Console
    from harness.servers import Gunicorn
    from harness.upstream import Exchange
    from playwright.sync_api import Page

EVENTS = [("Content-Type", "text/event-stream")]
DONE = b"data: [DONE]\n\n"

_APP = """async (path) => {
    const { createElement: h, createRoot, StrictMode } = await import("react");
    const { useStreamingChat } = await import("/static/use-streaming-chat.js");
    globalThis.renders = 0;
    globalThis.errors = [];
    function Chat({ more }) {
        const onError = (error) => errors.push(error.code);
        const chat = globalThis.chat = useStreamingChat({ url: "/v1" + path, model: "m-1", onError, ...more });
        globalThis.renders += 1;
        return h("section", { id: "chat", "aria-busy": chat.isStreaming },
            chat.messages.map(({ id, role, content, status = "whole" }) =>
                h("p", { key: id, "data-role": role, "data-status": status }, content)),
            h("output", null, chat.error?.code));
    }
    globalThis.root = createRoot(document.querySelector("#root"));
    globalThis.render = (more, key) => root.render(h(StrictMode, null, h(Chat, { more, key })));
    render();
}"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Upstream, Gunicorn]]:
    built = tmp_path_factory.mktemp("built")
    build(JS / "react.js", built / "react.js")
    with Upstream() as upstream, pages(upstream, built) as server:
        yield upstream, server


@dataclass
class Chat:
    """The page, and the upstream that the test plays."""

    page: Page
    upstream: Upstream
    path: str

    def send(self, prompt: str) -> None:
        """Without waiting for its end."""
        self.page.evaluate("(prompt) => { globalThis.sent = chat.sendMessage(prompt); }", prompt)

    def next(self) -> Exchange:
        """The upstream's side of the next message, its answer begun."""
        ex = self.upstream.next(self.path)
        ex.head(headers=EVENTS)
        return ex

    def said(self) -> list[tuple[str, str, str]]:
        """What the page shows: role, status and text."""
        script = "(all) => all.map((each) => [each.dataset.role, each.dataset.status, each.textContent])"
        return [tuple(each) for each in self.page.eval_on_selector_all("#chat p", script)]

    def shows(self, *said: tuple[str, str, str]) -> None:
        eventually(lambda: self.said() == list(said), f"the page shows {said}")

    def answer(self, prompt: str, *pieces: str) -> Exchange:
        """A message and its whole answer."""
        self.send(prompt)
        ex = self.next()
        for piece in pieces:
            ex.send(chunk(piece))
        ex.send(DONE)
        ex.end()
        assert self.page.evaluate("sent") is True
        return ex


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


def asked(ex: Exchange) -> Any:
    return json.loads(ex.body)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat(page: Page, shop: tuple[Upstream, Gunicorn]) -> Iterator[Chat]:
    upstream, server = shop
    path = upstream.by_hand()  # of this test: what was stopped in another may arrive late
    page.goto(server.base_url)
    page.evaluate(_APP, path)
    page.wait_for_selector("#chat", state="attached")
    yield Chat(page, upstream, path)
    upstream.check()
    upstream.forget(path)


def test_an_answer_appears_as_it_comes_and_the_whole_history_is_sent(chat: Chat) -> None:
    chat.send("Hi")
    ex = chat.next()
    chat.shows(("user", "whole", "Hi"), ("assistant", "streaming", ""))
    assert chat.page.get_attribute("#chat", "aria-busy") == "true"
    for piece, text in (("Ev", "Ev"), ("ery ", "Every "), ("🐘", "Every 🐘")):
        ex.send(chunk(piece))
        chat.shows(("user", "whole", "Hi"), ("assistant", "streaming", text))
    ex.send(DONE)
    ex.end()
    assert chat.page.evaluate("sent") is True
    chat.shows(("user", "whole", "Hi"), ("assistant", "whole", "Every 🐘"))  # rendered, with what is below
    assert chat.page.get_attribute("#chat", "aria-busy") == "false"
    second = chat.answer("And?", "No.")
    assert asked(ex) == {"messages": [user("Hi")], "model": "m-1"}
    assert asked(second) == {"messages": [user("Hi"), assistant("Every 🐘"), user("And?")], "model": "m-1"}
    assert len(chat.upstream.seen(chat.path)) == 2  # StrictMode or not


def test_stop_keeps_what_has_come_and_reaches_the_upstream(chat: Chat) -> None:
    chat.send("Hi")
    ex = chat.next()
    ex.send(chunk("Ever"))
    chat.shows(("user", "whole", "Hi"), ("assistant", "streaming", "Ever"))
    chat.page.evaluate("chat.stop()")
    ex.wait_gone()
    assert chat.page.evaluate("sent") is False
    chat.shows(("user", "whole", "Hi"), ("assistant", "stopped", "Ever"))
    assert chat.page.evaluate("[chat.isStreaming, chat.error, errors]") == [False, None, []]
    assert asked(chat.answer("Go on", "y."))["messages"] == [user("Hi"), assistant("Ever"), user("Go on")]


@pytest.mark.parametrize("how", ["cut", "without-marker", "error-frame", "refused"])
def test_a_broken_answer_stays_marked_and_its_turn_is_not_sent_again(chat: Chat, console: Console, how: str) -> None:
    console.expect("Failed to load resource|ERR_INCOMPLETE_CHUNKED_ENCODING")
    chat.answer("One", "1")
    chat.send("Hi")
    if how == "refused":
        body = b'{"error":{"message":"too long","code":"context_length_exceeded"}}'
        chat.upstream.next(chat.path).reply(body, 400, headers=[("Content-Type", "application/json")])
    else:
        ex = chat.next()
        ex.send(chunk("Ever"))
        chat.shows(
            ("user", "whole", "One"),
            ("assistant", "whole", "1"),
            ("user", "whole", "Hi"),
            ("assistant", "streaming", "Ever"),
        )
        if how == "cut":
            ex.send(b"data: {")
            ex.abort()
        elif how == "without-marker":
            ex.end()
        else:
            ex.send(b'data: {"error":{"message":"too much","code":"overloaded"}}\n\n')
            ex.end()
    assert chat.page.evaluate("sent") is False
    code = {"refused": "context_length_exceeded", "error-frame": "overloaded"}.get(how, "cut")
    text = "" if how == "refused" else "Ever"
    chat.shows(
        ("user", "whole", "One"), ("assistant", "whole", "1"), ("user", "whole", "Hi"), ("assistant", "failed", text)
    )
    assert chat.page.text_content("output") == code
    assert chat.page.evaluate("[chat.isStreaming, errors]") == [False, [code]]
    assert asked(chat.answer("Two", "2"))["messages"] == [user("One"), assistant("1"), user("Two")]
    eventually(lambda: chat.page.text_content("output") == "", "no error any more")


def test_an_answer_that_has_said_why_it_stopped_is_whole_without_its_mark(chat: Chat) -> None:
    """The upstream says so, and keeps the connection open."""
    chat.send("Hi")
    ex = chat.next()
    choice = {"index": 0, "delta": {"content": "All of it"}, "finish_reason": "stop"}
    ex.send(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    chat.shows(("user", "whole", "Hi"), ("assistant", "whole", "All of it"))
    ex.wait_gone()
    assert chat.page.evaluate("[chat.isStreaming, errors]") == [False, []]


def test_a_message_stops_the_answer_before_it(chat: Chat) -> None:
    chat.send("One")
    first = chat.next()
    first.send(chunk("Ev"))
    chat.shows(("user", "whole", "One"), ("assistant", "streaming", "Ev"))
    chat.send("Two")
    first.wait_gone()
    second = chat.next()
    second.send(chunk("2") + DONE)
    second.end()
    assert chat.page.evaluate("sent") is True
    chat.shows(
        ("user", "whole", "One"), ("assistant", "stopped", "Ev"), ("user", "whole", "Two"), ("assistant", "whole", "2")
    )
    assert asked(second)["messages"] == [user("One"), assistant("Ev"), user("Two")]


def test_of_several_messages_at_once_none_is_lost_and_the_last_is_answered(chat: Chat) -> None:
    ended = chat.page.evaluate_handle(
        "() => { globalThis.all = ['One', 'Two', 'Three'].map((prompt) => chat.sendMessage(prompt)); }"
    )
    assert ended is not None

    def last() -> list[Exchange]:
        return [ex for ex in chat.upstream.seen(chat.path) if asked(ex)["messages"][-1] == user("Three")]

    eventually(lambda: bool(last()), "the last message")
    (ex,) = last()
    assert asked(ex)["messages"] == [user("Three")]  # roles alternate: the others have no answer
    ex.head(headers=EVENTS)
    ex.send(chunk("3") + DONE)
    ex.end()
    assert chat.page.evaluate("Promise.all(all)") == [False, False, True]
    chat.shows(
        ("user", "whole", "One"),
        ("assistant", "stopped", ""),
        ("user", "whole", "Two"),
        ("assistant", "stopped", ""),
        ("user", "whole", "Three"),
        ("assistant", "whole", "3"),
    )
    for other in chat.upstream.seen(chat.path):
        if other is not ex:
            other.wait_gone()


def test_a_burst_renders_seldom_and_loses_nothing(chat: Chat) -> None:
    words = [f"{n} " for n in range(5000)]
    chat.page.evaluate("""() => {
        globalThis.renders = globalThis.frames_ = 0;
        const count = () => { frames_ += 1; requestAnimationFrame(count); };
        count();
    }""")
    chat.answer("Hi", *words)
    chat.shows(("user", "whole", "Hi"), ("assistant", "whole", "".join(words)))
    renders, frames = chat.page.evaluate("[renders, frames_]")
    assert renders <= 2 * (frames + 5)  # StrictMode renders twice; the beginning and the end are no frame's
    assert renders < len(words)


def test_the_options_of_the_latest_render_are_those_of_the_next_message(chat: Chat) -> None:
    """And an answer that streams keeps its own."""
    chat.send("Hi")
    ex = chat.next()
    chat.page.evaluate("() => { render({ model: 'm-2', headers: { 'X-Mine': '2' } }); }")
    ex.send(chunk("Every byte.") + DONE)
    ex.end()
    assert chat.page.evaluate("sent") is True
    second = chat.answer("And?", "No.")
    assert [(asked(each)["model"], each.header("X-Mine")) for each in (ex, second)] == [("m-1", None), ("m-2", b"2")]
    chat.shows(
        ("user", "whole", "Hi"), ("assistant", "whole", "Every byte."), ("user", "whole", "And?"),
        ("assistant", "whole", "No."),
    )  # fmt: skip


def test_a_conversation_goes_on_from_what_was_said_before(chat: Chat) -> None:
    """What was said has ids, given or not, and only initialMessages' roles and texts are sent."""
    chat.page.evaluate("""() => { render({ initialMessages: [
        { role: "system", content: "Be brief." }, { id: undefined, role: "user", content: "Hi", when: 1 },
        { id: "mine", role: "assistant", content: "Half", status: "stopped" },
    ] }, "another"); }""")
    chat.shows(("system", "whole", "Be brief."), ("user", "whole", "Hi"), ("assistant", "stopped", "Half"))
    ids = chat.page.evaluate("chat.messages.map(({ id }) => id)")
    assert len(set(ids)) == 3
    assert all(ids)
    assert ids[2] == "mine"
    ex = chat.answer("And?", "No.")
    assert asked(ex)["messages"] == [
        {"role": "system", "content": "Be brief."}, user("Hi"), assistant("Half"), user("And?"),
    ]  # fmt: skip


def test_clearing_stops_and_forgets(chat: Chat) -> None:
    chat.answer("One", "1")
    chat.send("Two")
    ex = chat.next()
    ex.send(chunk("Ev"))
    chat.page.evaluate("chat.clearMessages()")
    ex.wait_gone()
    assert chat.page.evaluate("sent") is False
    chat.shows()
    assert asked(chat.answer("Three", "3"))["messages"] == [user("Three")]
    chat.shows(("user", "whole", "Three"), ("assistant", "whole", "3"))


def test_unmounting_ends_the_stream_and_nothing_is_sent_afterwards(chat: Chat) -> None:
    chat.send("Hi")
    ex = chat.next()
    ex.send(chunk("Ev"))
    chat.shows(("user", "whole", "Hi"), ("assistant", "streaming", "Ev"))
    chat.page.evaluate("root.unmount()")
    ex.wait_gone()
    assert chat.page.evaluate("sent") is False
    assert chat.page.evaluate("chat.sendMessage('late')") is False
    assert len(chat.upstream.seen(chat.path)) == 1


def test_an_event_handed_over_for_a_prompt_is_named_and_a_blank_one_is_nothing(chat: Chat) -> None:
    said = chat.page.evaluate("chat.sendMessage(new Event('click')).catch((error) => [error.name, error.message])")
    assert said == ["TypeError", "sendMessage(prompt, model?): the prompt must be a string"]
    assert chat.page.evaluate("chat.sendMessage('  ')") is False
    chat.shows()
    assert chat.upstream.seen(chat.path) == []
