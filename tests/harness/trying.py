"""The relay's own page, driven as a person does, and watched: what it asks for, and what its policy forbids it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from playwright.sync_api import expect

from harness import DEADLINE, eventually, llm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from playwright.sync_api import Locator, Page

    from harness.upstream import Exchange

CHAT = "/chat/completions"  # where the page's prompts arrive, below the upstream's base URL

_WATCH = """
window.violations = []; window.said = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`));
document.addEventListener("DOMContentLoaded", () => {
  const status = document.getElementById("status");
  new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true});
});
"""


#: Seconds for what a page does: the demo's answer alone takes four.
_PATIENCE = 2 * DEADLINE


class Trying:
    """A page open at `url`."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self._asked: list[str] = []
        page.on("request", lambda request: self._asked.append(request.url))
        page.add_init_script(_WATCH)
        page.goto(url)
        self["send"].and_(page.locator(":enabled")).wait_for()

    def __getitem__(self, name: str) -> Locator:
        """The element with this id."""
        return self.page.locator(f"#{name}")

    @property
    def answer(self) -> Locator:
        """The latest answer."""
        return self.page.locator(".answer").last

    @property
    def text(self) -> str:
        """The latest answer's text, each character of it."""
        return self.answer.locator(".text").text_content() or ""

    @property
    def note(self) -> str:
        """What stands below the latest answer."""
        return self.answer.locator(".note").inner_text()

    @property
    def asked(self) -> list[str]:
        """The addresses of all its requests so far."""
        self.page.evaluate("() => 0")  # Playwright tells of what has happened only while it is called
        return list(self._asked)

    @property
    def said(self) -> list[str]:
        """What was announced, in order."""
        said: list[str] = self.page.evaluate("() => window.said")
        return said

    def ask(self, text: str) -> None:
        """Type it and press Enter."""
        self["prompt"].fill(text)
        self["prompt"].press("Enter")

    def shows(self, text: str) -> None:
        """Wait until the latest answer's text is this, and no more."""
        eventually(lambda: self.text == text, f"the text {text!r}, not {self.text!r}", _PATIENCE, every=0.02)

    def ends(self, state: str) -> None:
        """Wait until the latest answer is marked "complete", "stopped" or "failed"."""
        expect(self.answer).to_have_attribute("data-state", state, timeout=_PATIENCE * 1000)

    def check(self) -> None:
        """Nothing that the policy forbids was tried, and nobody else was asked for anything."""
        assert self.page.evaluate("() => window.violations") == []
        here = urlsplit(self.url).netloc
        assert [url for url in self.asked if urlsplit(url).netloc != here] == []


def piece(text: str, **more: Any) -> bytes:
    """An event of a chat completion with this text."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    return llm.event(json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode())


DONE = llm.event(b"[DONE]")


def says(exchange: Exchange, texts: Sequence[str]) -> None:
    """Answer with these pieces of text, and whole."""
    exchange.head(headers=llm.EVENTS)
    exchange.send(b"".join(map(piece, texts)) + DONE)
    exchange.end()
