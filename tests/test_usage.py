"""Token usage out of the first and the last 8 KiB of an answer."""

from __future__ import annotations

import json

import pytest
from harness import cases
from hypothesis import given
from hypothesis import strategies as st

from relay.llm.usage import KEPT, Excerpt, Usage


def usage_of(*pieces: bytes) -> Usage | None:
    excerpt = Excerpt()
    for piece in pieces:
        excerpt.feed(piece)
    return excerpt.usage()


def event(value: object, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value)}\n\n".encode()


CHAT = [
    event({"choices": [{"delta": {"content": "Hi"}}], "usage": None}),
    event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}),
    b"data: [DONE]\n\n",
]
RESPONSES = [
    event({"type": "response.created", "response": {"usage": None}}, "response.created"),
    event(
        {"response": {"output": ["x" * 20_000], "usage": {"input_tokens": 30, "output_tokens": 4}}},
        "response.completed",
    ),
]
MESSAGES = [
    event({"message": {"usage": {"input_tokens": 25, "output_tokens": 1}}}, "message_start"),
    event({"delta": {"text": "y" * 30_000}}, "content_block_delta"),
    event({"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}, "message_delta"),
]


CACHED_CHAT = [
    event({"usage": {"prompt_tokens": 70, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}})
]
CACHED_RESPONSES = [
    event(
        {"response": {"usage": {"input_tokens": 9, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 0}}}}
    )
]
CACHED_MESSAGES = [
    event(
        {
            "message": {
                "usage": {
                    "input_tokens": 3,
                    "cache_creation_input_tokens": 400,
                    "cache_read_input_tokens": 1000,
                    "cache_creation": {"ephemeral_5m_input_tokens": 400},
                    "output_tokens": 1,
                }
            }
        },
        "message_start",
    ),
    event({"usage": {"output_tokens": 15}}, "message_delta"),
]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param(CHAT, Usage(7, 2), id="openai-chat"),
        pytest.param(RESPONSES, Usage(30, 4), id="openai-responses"),
        pytest.param(MESSAGES, Usage(25, 15), id="anthropic-messages"),
        pytest.param(CACHED_CHAT, Usage(70, 2, 64), id="openai-chat-cached"),
        pytest.param(CACHED_RESPONSES, Usage(9, 4, 0), id="openai-responses-cached"),
        pytest.param(CACHED_MESSAGES, Usage(3, 15, 1000, 400), id="anthropic-messages-cached"),
        pytest.param([event({"usage": {"prompt_tokens_details": [7]}})], None, id="details-of-another-kind"),
        pytest.param([b'{"usage": {"prompt_tokens": 1, "completion_tokens": 0}}'], Usage(1, 0), id="json"),
        pytest.param([event({"usage": {"prompt_tokens": 5}})], Usage(5, None), id="half-of-it"),
        pytest.param([b"data: [DONE]\n\n"], None, id="none"),
        pytest.param([], None, id="empty"),
        pytest.param([b'data: {"usage": {"prompt_tokens": '], None, id="cut"),
        pytest.param([b'data: {"usage": {"prompt_tokens": "7"}}'], None, id="a-text"),
        pytest.param([b'data: {"usage": {"prompt_tokens": true}}'], None, id="a-boolean"),
        pytest.param([b'data: {"usage": ' + b"[" * 5000], None, id="nested"),
        pytest.param([event({"content": 'it says "usage": {"prompt_tokens": 1}'})], None, id="only-quoted"),
    ],
)  # fmt: skip
def test_what_an_answer_reported(pieces: list[bytes], expected: Usage | None) -> None:
    assert usage_of(*pieces) == expected
    whole = b"".join(pieces)
    assert usage_of(*(whole[i : i + 1] for i in range(len(whole)))) == expected


@given(st.lists(st.binary(max_size=3 * KEPT), max_size=8))
def test_any_bytes_are_taken_and_little_is_kept(pieces: list[bytes]) -> None:
    excerpt = Excerpt()
    for piece in pieces:
        excerpt.feed(piece)
        assert excerpt._last_size - len(excerpt._last[0]) < KEPT
    excerpt.usage()


RECORDED = {case.name: case.body for case in cases.recorded()}


@pytest.mark.skipif(not RECORDED, reason="needs ../shared/streams")
def test_recorded_answers_tell_the_same_in_any_pieces() -> None:
    told = {name for name, body in RECORDED.items() if usage_of(body) is not None}
    for name, body in RECORDED.items():
        assert usage_of(*(body[i : i + 700] for i in range(0, len(body), 700))) == usage_of(body), name
    assert told >= {"openai-responses-text.sse", "openai-responses-huge-line-100k.sse", "vertex-claude-3-7.sse"}
