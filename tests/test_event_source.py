"""A real browser's EventSource on /chat/stream: the README's example, and one that nobody closes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from harness import REPO, eventually, llm, servers
from harness.client import request
from harness.upstream import Upstream
from test_prompts import CHAT, STREAM

if TYPE_CHECKING:
    from collections.abc import Iterator

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

_APP = """
from flask import Flask, request
from relay import Relay

app = Flask("shop")
relay = Relay(app, url_prefix="/ai", settings={"RELAY_UPSTREAM_URL": %r})
results = []

@app.get("/")
def page():
    return %r

@app.post("/result")
def result():
    results.append(request.get_json(force=True))
    return ""

@app.get("/results")
def all_results():
    return results
"""

_PAGE = """<!doctype html><meta charset="utf-8"><pre id="output"></pre><script type="module">
const output = document.getElementById("output");
%s
const careless = new EventSource("/ai/_relay/chat/stream?prompt=careless"), heard = [];
for (const name of ["message", "done"]) careless.addEventListener(name, (event) => heard.push([name, event.data]));
careless.onerror = () => {
  if (careless.readyState === EventSource.CLOSED)
    fetch("/result", {method: "POST", body: JSON.stringify({text: output.textContent, heard})});
};
</script>"""


@contextlib.contextmanager
def browser(url: str, profile: Path) -> Iterator[None]:
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-port=0", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def test_an_event_source_shows_the_text_and_never_asks_twice(tmp_path: Path) -> None:
    assert CHROMIUM, "this test needs Chromium (apt-get install chromium): it is not installed"
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```js\n(const source = new EventSource.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert '"/chat/stream?prompt="' in example
    page = _PAGE % example.replace('"/chat/stream?', '"/ai/_relay/chat/stream?')
    with Upstream() as upstream:
        upstream.serve(lambda ex: ex.reply(b"".join(llm.chat_events()), headers=STREAM, framing="chunked"), CHAT)
        (tmp_path / "shop.py").write_text(_APP % (upstream.base_url, page), encoding="utf-8")
        args = ["-k", "gthread", "--threads", "16"]
        with servers.gunicorn({"PYTHONPATH": str(tmp_path)}, "shop:app", None, args, ready=None) as shop:

            def results() -> list[dict[str, object]]:
                found: list[dict[str, object]] = json.loads(request(shop.port, "GET", "/results").finish().data)
                return found

            with browser(f"{shop.base_url}/", tmp_path / "profile"):
                eventually(lambda: results() != [], "an EventSource that has given up", 40, 0.1)
            (result,) = results()
    assert result["text"] == llm.TEXT
    *texts, done = result["heard"]  # type: ignore[misc]
    assert texts == [["message", word] for word in llm.WORDS]
    assert done[0] == "done"
    asked = [json.loads(ex.body)["messages"][0]["content"] for ex in upstream.seen(CHAT)]
    assert sorted(asked) == ["Hello", "careless"]  # though the careless one has connected again
