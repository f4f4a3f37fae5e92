"""Debian's Chromium, headless, driven through Playwright: real pages against real servers.

The browser finds no host but the loopback, whatever a page asks for. What a page writes to the console as an error, and
what it throws without catching it, fails its test, unless the test has said that it is coming.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page

#: Resolves nothing but the loopback; an attempt at more is an error on the page's console.
_LOOPBACK_ONLY = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost"
_PATIENCE = 20_000  # milliseconds that what is awaited on a page may take
expect.set_options(timeout=_PATIENCE)


@contextlib.contextmanager
def chromium(*names: str) -> Iterator[Browser]:
    """A browser. While it runs, this process has an asyncio loop: keep it to a module.

    `names`: further host names, which it finds on the loopback.
    """
    program = shutil.which("chromium")
    if program is None:
        raise AssertionError("these tests need Chromium (apt-get install chromium): it is not installed")
    rules = [*(f"MAP {name} 127.0.0.1" for name in names), _LOOPBACK_ONLY]
    arguments = [f"--host-resolver-rules={', '.join(rules)}"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments, timeout=40_000)
        try:
            yield browser
        finally:
            browser.close()


class Console:
    """What a context's pages complain of."""

    def __init__(self, context: BrowserContext) -> None:
        self.errors: list[str] = []
        self._expected: list[str] = []
        context.on("console", self._console)
        context.on("weberror", lambda error: self.errors.append(f"uncaught: {error.error}"))

    def _console(self, message: ConsoleMessage) -> None:
        where = message.location.get("url", "") if message.location else ""
        if message.type == "error" and not where.endswith("/favicon.ico"):  # which every page asks for that names none
            self.errors.append(f"{message.text} ({where})")

    def expect(self, pattern: str) -> None:
        """From now on an error in which this pattern is found is no failure."""
        self._expected.append(pattern)

    def check(self) -> None:
        """Raise what was not expected."""
        errors = [error for error in self.errors if not any(re.search(each, error) for each in self._expected)]
        assert errors == [], "the page complains:\n" + "\n".join(errors)


@contextlib.contextmanager
def new_page(browser: Browser, **options: Any) -> Iterator[tuple[Page, Console]]:
    """A page in a context of its own (`options` are Playwright's for one), and its console, checked at the end."""
    context = browser.new_context(**options)
    context.set_default_timeout(_PATIENCE)
    console = Console(context)
    try:
        page = context.new_page()
        yield page, console
        console.check()
    finally:
        context.close()
