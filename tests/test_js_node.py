"""The client's pure parts, its types, and openai-node as an unchanged client of a relay: all of it in Node."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from harness import REPO, eventually, llm
from harness.js import JS, Node, Thrown, installed, node, program, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Service
    from harness.upstream import Exchange

STATIC = REPO / "relay/static"


def test_the_parser_and_the_text_in_messages() -> None:
    """The tests in tests/js/parser.test.mjs, a property test over random bytes and pieces among them."""
    command = [program("node"), "--test", "--test-reporter=tap", str(JS / "parser.test.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^# pass (\d+)$", done.stdout, re.MULTILINE)
    assert passed
    assert int(passed[1]) == (JS / "parser.test.mjs").read_text().count("\ntest(")


def test_the_types_allow_what_is_right_and_nothing_else() -> None:
    _tsc("--lib es2022,dom,dom.iterable,dom.asynciterable --exactOptionalPropertyTypes", JS / "types.ts")


def test_the_types_need_no_dom(tmp_path: Path) -> None:
    """A program for Node has the DOM's classes from Node's types, but not the names of what is given to them."""
    (tmp_path / "node.d.ts").write_text("""
declare class URL { constructor(url: string); }
declare class AbortSignal { static timeout(ms: number): AbortSignal; }
declare class Headers {
  constructor(init?: Record<string, string> | [string, string][] | Headers);
  get(name: string): string | null;
}
declare class Request { readonly credentials: "omit" | "same-origin" | "include"; }
declare function fetch(url: string | URL | Request): Promise<unknown>;
""")
    (tmp_path / "program.mts").write_text(f"""
/// <reference path="./node.d.ts" />
import {{ ChatStream, stream }} from "{STATIC}/relay-client.js";
import type {{ StreamingChatOptions }} from "{STATIC}/use-streaming-chat.js";
const signal = AbortSignal.timeout(1);
const opened = stream("http://127.0.0.1/", {{ headers: {{ "X-Mine": "1" }}, signal }});
for await (const {{ data }} of opened) data.trim();
export const end = await new ChatStream({{ credentials: "include", headers: new Headers() }}).stream("Hi");
export const options: StreamingChatOptions = {{ headers: undefined, credentials: undefined, model: undefined }};
// @ts-expect-error: a header has a text
void stream("/", {{ headers: {{ "X-Mine": 1 }} }});
""")
    _tsc("--lib es2022 --exactOptionalPropertyTypes", tmp_path / "program.mts")


def _tsc(options: str, file: Path) -> None:
    always = "--noEmit --strict --target es2022 --module nodenext"
    command = [str(installed() / ".bin/tsc"), *always.split(), *options.split(), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_modules_import_nothing_but_react_and_each_other() -> None:
    """No dependency and no build step; and every export has its type."""
    imports = {
        name: re.findall(r'^(?:import|export) .*?from "([^"]+)";$', (STATIC / name).read_text(), re.MULTILINE)
        for name in ("relay-client.js", "use-streaming-chat.js")
    }
    assert imports == {"relay-client.js": [], "use-streaming-chat.js": ["react", "./relay-client.js"]}
    exported = r"^export (?:async )?(?:function|class|const) (\w+)"
    for name in imports:
        types = (STATIC / name.replace(".js", ".d.ts")).read_text()
        assert set(re.findall(exported, (STATIC / name).read_text(), re.MULTILINE)) == set(
            re.findall(exported, types, re.MULTILINE)
        )


def test_what_the_tests_install_is_pinned_and_names_no_registry() -> None:
    wanted = json.loads((JS / "package.json").read_text())["devDependencies"]
    assert [version for version in wanted.values() if not re.fullmatch(r"\d+\.\d+\.\d+", version)] == []
    packages = json.loads((JS / "package-lock.json").read_text())["packages"]
    assert len(packages) > len(wanted)
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if name and "integrity" not in package] == []


# --- openai-node


_OPENAI = """
const {default: OpenAI} = await import(openai);
const client_ = new OpenAI({baseURL, apiKey: "of-the-client", maxRetries: 2});
const messages = [{role: "user", content: "Hi"}];
let text = "";
try {
    const stream = await client_.chat.completions.create({model: "made-up-1", stream: true, messages});
    for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
} catch (error) {
    return [text, error.constructor.name, error.code ?? null, error.message];
}
return [text];
"""


@pytest.fixture(scope="module")
def in_node() -> Iterator[Node]:
    with node() as running:
        yield running


def openai_node(in_node: Node, service: Service, handler: Any) -> tuple[list[Any], list[Exchange]]:
    """What openai-node makes of an answer to a chat, and the requests that reached the upstream."""
    path = "/chat/completions"
    service.upstream.forget(path)
    service.upstream.serve(handler, path)
    try:
        module = (installed() / "openai/index.mjs").as_uri()
        said = run(in_node, _OPENAI, openai=module, baseURL=f"{service.relay.base_url}{service.mount}")
        return said, service.upstream.seen(path)
    finally:
        service.upstream.forget(path)


def test_openai_node_gets_the_stream(in_node: Node, service: Service) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in llm.chat_events():
            ex.send(event)
        ex.end()

    said, (ex,) = openai_node(in_node, service, handler)
    assert said == [llm.TEXT]
    assert ex.header("Authorization") == b"Bearer of-the-client"


@pytest.mark.parametrize("end", ["clean", "abort"])
def test_openai_node_raises_the_upstreams_error_frame(in_node: Node, service: Service, end: str) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        ex.send(llm.chat_events()[1])
        ex.send(b'event: error\ndata: {"error":{"message":"too much","code":"overloaded"}}\n\n')
        ex.end() if end == "clean" else ex.abort()

    said, seen = openai_node(in_node, service, handler)
    assert said[1:3] == ["APIError", "overloaded"]
    assert "too much" in said[3]
    assert len(seen) == 1


def test_openai_node_raises_the_relays_error_frame_of_a_cut(in_node: Node, service: Service) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        ex.send(llm.chat_events()[1])
        ex.abort()

    said, seen = openai_node(in_node, service, handler)
    assert said[1:3] == ["APIError", "upstream_cut"]
    assert len(seen) == 1


def test_openai_node_raises_a_cut_in_an_event(in_node: Node, service: Service) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        ex.send(llm.chat_events()[1] + b'data: {"cho')
        ex.abort()

    said, seen = openai_node(in_node, service, handler)
    assert said[1:] == ["TypeError", None, "terminated"]
    assert len(seen) == 1


@pytest.mark.parametrize("marker", ['endMarker: "[DONE]"', ""], ids=["marker", "end"])
def test_an_answer_that_was_read_to_its_end_counts_as_done(in_node: Node, service: Service, marker: str) -> None:
    """Not as `client_gone`: behind its end marker the client waits for the end of the body."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        # The end comes with the marker: the client waits a quarter of a second for it, and a busy machine may for more.
        ex.raw(b"17\r\ndata: a\n\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        ex.finished.set()

    url = f"{service.relay.base_url}{service.mount}{service.upstream.serve(handler)}"
    request_id = run(in_node, f"return (await client.stream(url, {{body: {{}}, {marker}}})).requestId", url=url)

    def reasons() -> list[str]:
        lines = (json.loads(line) for line in service.relay.log().splitlines() if request_id in line)
        return [line["reason"] for line in lines if "reason" in line]

    eventually(lambda: bool(reasons()), "the log line")
    assert reasons() == ["done"]


def test_a_script_that_throws_is_told_apart(in_node: Node) -> None:
    with pytest.raises(Thrown, match="mine"):
        run(in_node, "throw new Error('mine')")
