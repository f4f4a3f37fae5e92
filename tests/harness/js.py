"""Places where the JavaScript client runs: a Node process and a page. Both take the body of an async function.

The code has `client` (the module), `unhandled` (codes of rejections that nobody handled) and the values that come with
it as names. What it returns goes through JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from harness import DEADLINE, REPO, DeadlineExceeded, servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Page

    from harness.servers import Gunicorn
    from harness.upstream import Upstream

JS = REPO / "tests/js"
MODULE = REPO / "relay/static/relay-client.js"


class Thrown(AssertionError):
    """What the code threw. `code`, `status`, `requestId`, `retryAfter` are in `error`."""

    def __init__(self, error: dict[str, Any], stack: str) -> None:
        super().__init__(stack or str(error))
        self.error = error

    @property
    def code(self) -> str | None:
        code: str | None = self.error.get("code")
        return code


@dataclass
class Job:
    """Code that runs; `result()` waits for what it returns, or raises Thrown."""

    result: Callable[[], Any]


class Place(Protocol):
    def start(self, code: str, **values: Any) -> Job: ...


def run(place: Place, code: str, **values: Any) -> Any:
    """Start it, and wait for what it returns."""
    return place.start(code, **values).result()


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise AssertionError(f"these tests need {name}: it is not installed")
    return found


def installed() -> Path:
    """The folder of the packages in tests/js/package-lock.json."""
    folder = JS / "node_modules"
    if not folder.is_dir():
        raise AssertionError("tests/js/node_modules is missing: `npm ci --prefix tests/js`, which `make test` does")
    return folder


class Node:
    """A Node process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            with self._changed:
                self._answers[answer["id"]] = answer
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def start(self, code: str, **values: Any) -> Job:
        number = next(self._numbers)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "code": code, "values": values}) + "\n")
        self._process.stdin.flush()

        def result() -> Any:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or number in self._answers, 2 * DEADLINE)
                if number not in self._answers:
                    raise DeadlineExceeded(
                        f"Node {'ended' if self._ended else 'still runs'} without an answer to {code}"
                    )
                return _value(self._answers.pop(number))

        return Job(result)

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        self._process.stdin.close()
        self._process.stdout.close()


@contextlib.contextmanager
def node() -> Iterator[Node]:
    command = [program("node"), str(JS / "runner.mjs"), str(MODULE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    running = Node(process)
    try:
        yield running
    finally:
        running.stop()


_START = """async ({number, code, values, module}) => {
    globalThis.jobs ??= {};
    if (!globalThis.unhandled) {
        globalThis.unhandled = [];
        addEventListener("unhandledrejection", (event) => {
            event.preventDefault();
            unhandled.push(event.reason?.code ?? String(event.reason));
        });
    }
    const client = await import(module);
    const Code = (async () => {}).constructor;
    const said = ({name, message, code, status, requestId, retryAfter}) =>
        ({name, message, code, status, requestId, retryAfter});
    jobs[number] = new Code("client", "unhandled", ...Object.keys(values), code)(
        client, unhandled, ...Object.values(values),
    ).then((value) => ({value: value ?? null}), (error) => ({error: said(error), stack: error.stack}));
}"""


class Tab:
    """A page that is open; `module` is where it finds the client."""

    def __init__(self, page: Page, module: str = "/static/relay-client.js") -> None:
        self.page = page
        self._module = module
        self._numbers = itertools.count()

    def start(self, code: str, **values: Any) -> Job:
        number = next(self._numbers)
        about = {"number": number, "code": code, "values": values, "module": self._module}
        self.page.evaluate(_START, about)
        return Job(lambda: _value(self.page.evaluate("(number) => jobs[number]", number)))


def _value(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise Thrown(answer["error"], answer.get("stack", ""))
    return answer["value"]


@contextlib.contextmanager
def pages(upstream: Upstream, built: Path, env: dict[str, str] | None = None) -> Iterator[Gunicorn]:
    """tests/shops/pages.py, run as the service is; `built` is the folder of what it serves below /built/."""
    settings = {"PYTHONPATH": str(REPO / "tests"), "BUILT": str(built), "RELAY_UPSTREAM_URL": upstream.base_url}
    with servers.gunicorn({**settings, **(env or {})}, "shops.pages:app", ready="/") as server:
        yield server


def build(source: Path, to: Path) -> None:
    """Bundle a module for a page, JSX and CommonJS turned into an ES module; React as in development."""
    options = ["--bundle", "--format=esm", "--jsx=automatic", '--define:process.env.NODE_ENV="development"']
    command = [str(installed() / ".bin/esbuild"), str(source), *options, f"--outfile={to}", "--log-level=warning"]
    subprocess.run(command, check=True, timeout=50, env={**os.environ, "NODE_PATH": str(installed())})
