"""Vercel's AI SDK as an unchanged client of a relay: what it makes of a cut, a silence and a failure after the hold.

It checks each event against a schema, and what does not fit is an AI_TypeValidationError without a word of the relay's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from harness import llm, servers
from harness.js import Node, installed, node, run
from harness.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.servers import Gunicorn
    from harness.upstream import Exchange, Handler

_ASK = """
globalThis.AI_SDK_LOG_WARNINGS = false;  // on standard output
const {streamText} = await import(ai);
const {createOpenAI} = await import(openai);
const {createAnthropic} = await import(anthropic);
const options = {baseURL, apiKey: "of-the-client"};
const model = {
    chat: () => createOpenAI(options).chat("made-up-1"),
    responses: () => createOpenAI(options).responses("made-up-1"),
    messages: () => createAnthropic(options)("made-up-1"),
}[api]();
let text = "";
const errors = [];
const note = (error) => {
    const text = JSON.stringify(error, Object.getOwnPropertyNames(Object(error)));
    errors.push({name: error?.name ?? null, text: `${text} ${error?.message}`});
};
try {
    const {fullStream} = streamText({model, prompt: "Well?", maxRetries: tries, onError: () => {}});
    for await (const part of fullStream) {
        if (part.type === "text-delta") text += part.text;
        if (part.type === "error") note(part.error);
    }
} catch (error) {
    note(error);
}
return {text, errors};
"""

PATHS = {"chat": "/chat/completions", "responses": "/responses", "messages": "/messages"}
APIS = pytest.mark.parametrize("api", PATHS)
IDLE = 1.5


@pytest.fixture(scope="module")
def in_node() -> Iterator[Node]:
    with node() as running:
        yield running


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def relay(upstream: Upstream) -> Iterator[Gunicorn]:
    """Its hold is short, and so is its patience with an answer that is silent."""
    env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_HOLD": "0.3", "RELAY_HEARTBEAT": "0.3"}
    with servers.gunicorn(env | {"RELAY_IDLE_TIMEOUT": str(IDLE)}) as running:
        yield running


def events(api: str) -> list[bytes]:
    """A whole answer."""
    found = {"chat": llm.chat_events, "responses": llm.response_events, "messages": llm.message_events}[api]()
    if api == "responses":  # it wants to be told of the item that a text belongs to
        item = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}
        added = {"type": "response.output_item.added", "sequence_number": 0, "output_index": 0, "item": item}
        found.insert(1, llm.event(llm.as_json(added), "response.output_item.added"))
    return found


def ask(
    in_node: Node, relay: Gunicorn, upstream: Upstream, api: str, handler: Handler, tries: int = 2
) -> tuple[Any, int]:
    """What the SDK makes of it, and how many requests reached the upstream."""
    path = PATHS[api]
    upstream.forget(path)
    upstream.serve(handler, path)
    modules = installed()
    said = run(
        in_node,
        _ASK,
        api=api,
        tries=tries,
        baseURL=f"{relay.base_url}/v1",
        ai=(modules / "ai/dist/index.mjs").as_uri(),
        openai=(modules / "@ai-sdk/openai/dist/index.mjs").as_uri(),
        anthropic=(modules / "@ai-sdk/anthropic/dist/index.mjs").as_uri(),
    )
    return said, len(upstream.seen(path))


@APIS
def test_a_whole_answer_is_read(in_node: Node, relay: Gunicorn, upstream: Upstream, api: str) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in events(api):
            ex.send(event)
        ex.end()

    said, asked = ask(in_node, relay, upstream, api, handler)
    assert said == {"text": llm.TEXT, "errors": []}
    assert asked == 1


def cut(ex: Exchange) -> None:
    ex.abort()


def silent(ex: Exchange) -> None:
    ex.wait_gone()


@APIS
@pytest.mark.parametrize(
    ("then", "word"), [(cut, "before its answer was complete"), (silent, "has sent nothing for")], ids=["cut", "silent"]
)
def test_an_answer_that_breaks_off_is_an_error_with_the_relays_words(
    in_node: Node, relay: Gunicorn, upstream: Upstream, api: str, then: Handler, word: str
) -> None:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in events(api)[:4]:
            ex.send(event)
        then(ex)

    said, asked = ask(in_node, relay, upstream, api, handler)
    assert said["errors"], "it was taken for whole"
    assert [error for error in said["errors"] if error["name"] == "AI_TypeValidationError"] == []
    assert word in said["errors"][0]["text"]
    assert asked == 1, "it would be paid for twice"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param([b": PROCESSING\n\n"] * 4, id="comments"),
        pytest.param([*events("responses")[:1], *[b'data: {"type":"response.queued"}\n\n'] * 4], id="no text yet"),
    ],
)
def test_a_cut_before_any_text_of_a_response_is_not_asked_again(
    in_node: Node, relay: Gunicorn, upstream: Upstream, before: list[bytes]
) -> None:
    """It would ask again for an error that it can read: so it gets one that it cannot."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in before:
            ex.send(event)
        ex.abort()

    said, asked = ask(in_node, relay, upstream, "responses", handler)
    assert said["errors"]
    assert asked == 1, "it would be paid for twice"


@APIS
def test_a_refusal_after_the_hold_is_an_error_with_the_upstreams_words(
    in_node: Node, relay: Gunicorn, upstream: Upstream, api: str
) -> None:
    """And it asks no more, as it would not with the refusal's status; of responses it makes a schema's fault."""

    def handler(ex: Exchange) -> None:
        time.sleep(1.0)  # longer than the hold
        refusal = llm.openai_error("so and no further", "invalid_request_error", "invalid_value")
        ex.reply(refusal, 400, headers=llm.JSON)

    said, asked = ask(in_node, relay, upstream, api, handler)
    assert "so and no further" in said["errors"][0]["text"]
    assert (said["errors"][0]["name"] == "AI_TypeValidationError") == (api == "responses")
    assert asked == 1


@pytest.mark.parametrize(("api", "tries"), [("chat", 0), ("responses", 2), ("messages", 2)])
def test_a_failure_after_the_hold_is_not_paid_for_twice(
    in_node: Node, relay: Gunicorn, upstream: Upstream, api: str, tries: int
) -> None:
    """A chat needs `maxRetries: 0`: it asks again whatever the relay says of a failure before any text."""

    def handler(ex: Exchange) -> None:
        time.sleep(1.0)  # longer than the hold
        ex.reset()

    said, asked = ask(in_node, relay, upstream, api, handler, tries=tries)
    assert "the upstream hung up before it answered" in said["errors"][0]["text"]
    assert asked == 1
