"""Token usage, wherever in an answer its API says it."""

from __future__ import annotations

import json

import pytest
from harness import cases
from hypothesis import given
from hypothesis import strategies as st

from relay.llm.usage import GATHERED, KEPT, Excerpt, Usage


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


GEMINI = {"promptTokenCount": 8, "candidatesTokenCount": 5, "thoughtsTokenCount": 30, "cachedContentTokenCount": 2}
DEEPSEEK = {"prompt_tokens": 32, "completion_tokens": 4, "prompt_cache_hit_tokens": 16, "prompt_cache_miss_tokens": 16}
COHERE = {"billed_units": {"input_tokens": 7, "output_tokens": 109}, "tokens": {"input_tokens": 69}}
XAI = {
    "prompt_tokens": 288,
    "completion_tokens": 27,
    "total_tokens": 628,
    "completion_tokens_details": {"reasoning_tokens": 313},
}
OPENAI_THINKS = {
    "prompt_tokens": 10,
    "completion_tokens": 300,
    "total_tokens": 310,
    "completion_tokens_details": {"reasoning_tokens": 290},
}
CONVERSE = {"inputTokens": 210, "outputTokens": 18, "totalTokens": 228, "cacheReadInputTokens": 3}
OLLAMA = {"done": True, "context": [1] * 9000, "prompt_eval_count": 18, "eval_count": 20}
LATE = event({"choices": [], "obfuscation": "z" * 20_000})


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param([*CHAT[:2], LATE, b": ping\n\n" * 9000, CHAT[2]], Usage(7, 2), id="much-comes-after-it"),
        pytest.param([LATE, *CHAT, LATE], Usage(7, 2), id="in-the-middle"),
        pytest.param(
            [event({"type": "response.completed", "response": {"usage": {"input_tokens": 3}, "tools": "x" * 99_000}})],
            Usage(3, None),
            id="early-in-a-long-line",
        ),
        pytest.param([event({"usageMetadata": GEMINI})] * 3, Usage(8, 35, 2), id="gemini"),
        pytest.param([event({"candidates": "x" * 40_000, "usageMetadata": GEMINI})], Usage(8, 35, 2), id="gemini-long"),
        pytest.param([event({"usage": DEEPSEEK})], Usage(32, 4, 16), id="deepseek"),
        pytest.param([event({"type": "message-end", "delta": {"usage": COHERE}})], Usage(7, 109), id="cohere"),
        pytest.param([event({"usage": XAI})], Usage(288, 340), id="xai-reasoning-beside"),
        pytest.param([event({"usage": OPENAI_THINKS})], Usage(10, 300), id="openai-reasoning-within"),
        pytest.param([event({"x_groq": {"usage": {"prompt_tokens": 18}}})], Usage(18, None), id="groq"),
        pytest.param(
            [b"\0\0\1\x18" + json.dumps({"metrics": {}, "usage": CONVERSE}).encode() + b"\xff\0"],
            Usage(210, 18, 3),
            id="bedrock-converse",
        ),
        pytest.param([json.dumps(OLLAMA).encode() + b"\n"], Usage(18, 20), id="ollama"),
        pytest.param(
            [event({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": 4}}})],
            Usage(9, None, None, 4),
            id="openrouter-cache-write",
        ),
        pytest.param(
            [event({"usage": {"prompt_tokens": 9, "completion_tokens": n}}) for n in range(2000)],
            Usage(9, 1999),
            id="vllm-continuous",
        ),
        pytest.param(
            [
                event({"candidates": [{"functionCall": {"args": {"usage": {"input_tokens": 666}}}}]}),
                event({"message": {"tool_calls": [{"arguments": {"eval_count": 666}}]}}),
            ],
            None,
            id="arguments-of-a-tool",
        ),
    ],
)
def test_other_shapes_and_places(pieces: list[bytes], expected: Usage | None) -> None:
    assert usage_of(*pieces) == expected
    whole = b"".join(pieces)
    assert usage_of(whole) == expected
    assert usage_of(*(whole[i : i + 100] for i in range(0, len(whole), 100))) == expected


@given(st.lists(st.binary(max_size=3 * KEPT), max_size=8))
def test_any_bytes_are_taken_and_little_is_kept(pieces: list[bytes]) -> None:
    excerpt = Excerpt()
    for piece in pieces:
        excerpt.feed(piece)
        assert excerpt._size < GATHERED
    excerpt.usage()


RECORDED = {case.name: case.body for case in cases.recorded()}


@pytest.mark.skipif(not RECORDED, reason="needs ../shared/streams")
def test_recorded_answers_tell_the_same_in_any_pieces() -> None:
    told = {name for name, body in RECORDED.items() if usage_of(body) is not None}
    for name, body in RECORDED.items():
        assert usage_of(*(body[i : i + 700] for i in range(0, len(body), 700))) == usage_of(body), name
    assert told >= {"openai-responses-text.sse", "openai-responses-huge-line-100k.sse", "vertex-claude-3-7.sse"}
    assert told >= {"cohere-v2-chat.sse", "gemini-2.5-flash-tools-CRLF.sse", "deepseek-chat-90k.sse"}
