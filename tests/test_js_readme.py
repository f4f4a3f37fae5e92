"""The JavaScript examples of the README run as they stand, against the service with its demo upstream."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE, REPO, eventually, servers
from harness.js import MODULE, build, installed, program
from test_docs import SERVICE, block

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from harness.servers import Gunicorn
    from playwright.sync_api import Page

SAID = "You said: “Hello”."


@pytest.fixture(scope="module")
def demo() -> Iterator[Gunicorn]:
    with servers.gunicorn({}) as relay:
        yield relay


def open_page(page: Page, demo: Gunicorn, html: str) -> None:
    """A page of the relay's own origin."""
    url = f"{demo.base_url}/example"
    page.route(url, lambda route: route.fulfill(content_type="text/html; charset=utf-8", body=html))
    page.goto(url)


def in_node(code: str, demo: Gunicorn, folder: Path) -> str:
    """What it prints as a module in a folder where the client and the packages are."""
    assert SERVICE in code
    (folder / "example.mjs").write_text(code.replace(SERVICE, f"127.0.0.1:{demo.port}"), encoding="utf-8")
    (folder / "package.json").write_text('{"type": "module"}')
    shutil.copy(MODULE, folder)
    (folder / "node_modules").symlink_to(installed())
    command = [program("node"), "example.mjs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_shows_the_answer_as_it_comes(page: Page, demo: Gunicorn) -> None:
    # What the page sees itself, since the test may be looking elsewhere for as long as an answer takes.
    watch = """
    window.added = [];
    new MutationObserver((all) => {
        for (const each of all) if (each.target.id === "answer") added.push(performance.now());
    }).observe(document, {subtree: true, childList: true});
    """
    page.add_init_script(watch)
    open_page(page, demo, block("<script type", "/relay-client.js"))
    eventually(lambda: SAID in (page.text_content("#answer") or ""), "the answer", 2 * DEADLINE, every=0.05)
    assert page.evaluate("added.at(-1) - added[0]") > 300, "of an answer of two seconds: it came at once"
    assert "broken off" not in (page.text_content("#answer") or "")


def test_the_chat_in_node_prints_the_answer(demo: Gunicorn, tmp_path: Path) -> None:
    said = in_node(block("new ChatStream"), demo, tmp_path)
    assert SAID in said
    assert " bytes, the first after " in said


def test_openai_node_prints_the_answer(demo: Gunicorn, tmp_path: Path) -> None:
    assert SAID in in_node(block("import OpenAI from"), demo, tmp_path)


def test_eventsource_shows_the_answer_and_asks_once(page: Page, demo: Gunicorn) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/chat/stream" in request.url else None)
    example = block("new EventSource")
    open_page(
        page, demo, f"<pre id=output></pre><script>const output = document.querySelector('pre');{example}</script>"
    )
    eventually(lambda: page.evaluate("source.readyState") == 2, "the end", 2 * DEADLINE)
    assert SAID in page.inner_text("pre")
    assert not page.inner_text("pre").endswith("cut")
    assert len(asked) == 1


def test_the_react_component_chats_under_strict_mode(page: Page, demo: Gunicorn, tmp_path: Path) -> None:
    (tmp_path / "Chat.jsx").write_text(block("useStreamingChat", "<form"), encoding="utf-8")
    for name in ("relay-client.js", "use-streaming-chat.js"):
        shutil.copy(REPO / "relay/static" / name, tmp_path)
    (tmp_path / "main.jsx").write_text(
        """
        import { StrictMode } from "react";
        import { createRoot } from "react-dom/client";
        import { Chat } from "./Chat.jsx";
        createRoot(document.querySelector("main")).render(<StrictMode><Chat /></StrictMode>);
        """
    )
    build(tmp_path / "main.jsx", tmp_path / "main.js")
    script = (tmp_path / "main.js").read_text(encoding="utf-8").replace("</script", "<\\/script")
    # An answer takes less time than a test may be kept from its next step: the page notes its buttons by itself, and
    # presses one as soon as it is there.
    watch = """
    window.buttons = []; window.press = "";
    new MutationObserver(() => {
        const button = document.querySelector("button");
        if (button && button.textContent !== buttons.at(-1)) buttons.push(button.textContent);
        if (button?.textContent === press) { window.press = ""; setTimeout(() => button.click()); }
    }).observe(document, {subtree: true, childList: true, characterData: true});
    """
    page.add_init_script(watch)
    open_page(page, demo, f'<main></main><script type="module">{script}</script>')
    page.fill("input", "Hello")
    page.keyboard.press("Enter")
    eventually(lambda: page.evaluate("buttons") == ["Send", "Stop", "Send"], "a whole answer", 2 * DEADLINE)
    question, answer = page.eval_on_selector_all("p", "(all) => all.map((each) => [each.className, each.innerText])")
    assert question == ["user", "Hello"]
    assert answer[0] == "assistant"
    assert SAID in answer[1]
    page.evaluate("window.press = 'Stop'")
    page.fill("input", "More")
    page.keyboard.press("Enter")
    page.wait_for_selector("em:text('(stopped)')")
    assert page.query_selector("[role=alert]") is None
