"""Answers in the shapes of OpenAI's and Anthropic's APIs, of our own making and as short as SDKs take them.

Nothing but bytes: who sends them, in what pieces, with what silences and to what end is for the test to say. Each
streamed answer is a list of events, and says WORDS, one an event and in a row.
"""

from __future__ import annotations

import json
from typing import Any

MODEL = "made-up-1"
# Characters of two to four bytes, a line end, and a line separator that some line splitters take for one.
WORDS = ("Every ", "byte, ", "čerstvě ", "\n– 一 ", "\u2028", "🐘.")
TEXT = "".join(WORDS)

EVENTS = [("Content-Type", "text/event-stream; charset=utf-8")]
JSON = [("Content-Type", "application/json")]

_USAGE = {"input_tokens": 3, "output_tokens": len(WORDS)}


def as_json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()


def event(data: bytes, name: str = "", *, number: int | None = None, end: str = "\n") -> bytes:
    """One event; `number` goes into an `id` field, `end` ends each line."""
    lines = [f"id: {number}".encode()] if number is not None else []
    lines += [f"event: {name}".encode()] if name else []
    return b"".join(line + end.encode() for line in [*lines, b"data: " + data, b""])


def _events(named: list[tuple[str, bytes]], *, ids: bool, end: str) -> list[bytes]:
    return [event(data, name, number=n if ids else None, end=end) for n, (name, data) in enumerate(named)]


# OpenAI's chat completions


def chat_chunks() -> list[dict[str, Any]]:
    def chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        return {**common, "choices": [choice]}

    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": word}) for word in WORDS),
        chunk({}, "stop"),
    ]


def chat_events(*, ids: bool = False, end: str = "\n") -> list[bytes]:
    """The chunks, and the mark that ends them."""
    return _events([("", data) for data in [*map(as_json, chat_chunks()), b"[DONE]"]], ids=ids, end=end)


def chat_answer() -> bytes:
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return as_json({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]})


def models_answer() -> bytes:
    models = [{"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in (MODEL, "made-up-2")]
    return as_json({"object": "list", "data": models})


def openai_error(message: str, kind: str, code: str) -> bytes:
    """A body; as the data of an event it is an error inside a stream."""
    return as_json({"error": {"message": message, "type": kind, "param": None, "code": code}})


# OpenAI's responses


def _response(status: str) -> dict[str, Any]:
    text = {"type": "output_text", "text": TEXT, "annotations": []}
    message = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [text]}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": MODEL,
        "output": [message] if status == "completed" else [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
    }


def response_steps() -> list[dict[str, Any]]:
    item = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    steps: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response("in_progress")},
        *({"type": "response.output_text.delta", **item, "delta": word, "logprobs": []} for word in WORDS),
        {"type": "response.output_text.done", **item, "text": TEXT, "logprobs": []},
        {"type": "response.completed", "response": _response("completed")},
    ]
    return [{**step, "sequence_number": n} for n, step in enumerate(steps)]


def response_events(*, ids: bool = False, end: str = "\n") -> list[bytes]:
    return _events([(step["type"], as_json(step)) for step in response_steps()], ids=ids, end=end)


def response_answer() -> bytes:
    return as_json(_response("completed"))


# Anthropic's messages


def _message(content: list[dict[str, str]], stop_reason: str | None) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": _USAGE,
    }


def message_steps() -> list[dict[str, Any]]:
    return [
        {"type": "message_start", "message": _message([], None)},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in WORDS),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": _USAGE},
        {"type": "message_stop"},
    ]


def message_events(*, ids: bool = False, end: str = "\n") -> list[bytes]:
    return _events([(step["type"], as_json(step)) for step in message_steps()], ids=ids, end=end)


def message_answer() -> bytes:
    return as_json(_message([{"type": "text", "text": TEXT}], "end_turn"))


def anthropic_error(message: str, kind: str) -> bytes:
    """A body; as the data of an `error` event it is an error inside a stream."""
    return as_json({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"})
