"""Token usage as an answer reported it, out of the little of it that is kept. No input or output.

Where each API says it: OpenAI's chat completions in the last chunk (with `stream_options.include_usage`; Groq below
`x_groq` too), OpenAI's responses in `response.completed`, Anthropic's messages in `message_start` and, cumulative, in
`message_delta`, Cohere in `message-end`, Bedrock's Converse in `metadata`, Gemini as `usageMetadata` of each chunk,
Ollama in the line that is `done`. The figures are taken as the body goes by, a few KiB at a time: no more is kept.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

#: Bytes of an unfinished line that are kept from one look to the next, and those that are gathered before a look.
KEPT = 8 * 1024
GATHERED = 2 * KEPT
#: Bytes from Ollama's `eval_count` to the end of its answer, and some more.
_END_OF_OLLAMA = 1024

_PLACE = re.compile(rb'"(?:usage|usageMetadata)"\s*:\s*(?=\{)|"(?:prompt_)?eval_count"\s*:\s*(?=\d)')
_OF_OLLAMA = re.compile(rb'"(prompt_eval_count|eval_count)"\s*:\s*(\d{1,15})(?=\s*[,}])')
_decode = json.JSONDecoder().raw_decode

#: What the APIs call it, by what it is called here; of several the first counts.
_NAMES = {
    "input": ("input_tokens", "prompt_tokens", "promptTokenCount", "inputTokens", "prompt_eval_count"),
    "output": ("output_tokens", "completion_tokens", "candidatesTokenCount", "outputTokens", "eval_count"),
    "cache_read": (
        "cache_read_input_tokens",
        "cachedContentTokenCount",
        "cacheReadInputTokens",
        "prompt_cache_hit_tokens",  # DeepSeek
        "cached_tokens",  # Cohere
    ),
    "cache_write": ("cache_creation_input_tokens", "cacheWriteInputTokens"),
}
#: Where OpenAI's APIs, and those like it, say how many of the input's tokens came out of a cache or went into one.
_DETAILS = ("input_tokens_details", "prompt_tokens_details")
#: The objects of an event, beside itself, in which an API puts its usage.
_WITHIN = ("message", "response", "x_groq", "delta", "metadata")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the upstream counted them; None: it did not say.

    Those of the input that it read from a cache or wrote to one have prices of their own. OpenAI's APIs count them
    among `input_tokens`, Anthropic's beside them.
    """

    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None


class Excerpt:
    """The figures of an answer's body, which is fed piece by piece; no piece is copied more than twice."""

    __slots__ = ("_found", "_pieces", "_size")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._found: dict[str, int] = {}

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= GATHERED:
            self._look()

    def usage(self) -> Usage | None:
        """What the answer reported; None: nothing. Later figures replace earlier ones of the same kind."""
        found = self._found | _figures(b"".join(self._pieces))
        return Usage(*(found.get(kind) for kind in _NAMES)) if found else None

    def says_its_end(self) -> bool:
        """Whether the last event so far, pings and comments aside, is the mark by which a chat API ends an answer."""
        tail = b"".join(self._pieces)[-KEPT:].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not tail.endswith(b"\n\n"):
            return False
        for event in reversed(tail.split(b"\n\n")):
            lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
            if lines and not _PING.search(event):
                return _END.search(event) is not None
        return False

    def has_text(self) -> bool:
        """Whether text of one of OpenAI's responses is among what is kept: then the answer has begun, and not only its
        stream."""
        return _TEXT.search(b"".join(self._pieces)) is not None

    def _look(self) -> None:
        """Take the figures out of the lines that are whole, and keep the end of the one that is not."""
        text = b"".join(self._pieces)
        left = text[max(text.rfind(b"\n") + 1, len(text) - KEPT) :]
        # Backwards it is twice as fast. A second search of all that passes would cost the busiest stream a twentieth,
        # and Ollama's figures are the last of its answer.
        if text.rfind(b'"usage') >= 0 or text.find(b'eval_count"', -_END_OF_OLLAMA) >= 0:
            self._found |= _figures(text)
        self._pieces, self._size = [left], len(left)


# How OpenAI's chat completions, Anthropic's messages and OpenAI's responses say that nothing more comes.
_END = re.compile(
    rb"^data: ?\[DONE\]$|^event: ?(?:message_stop|response\.(?:completed|incomplete|failed))$"
    rb'|^data: ?\{"type": ?"(?:message_stop|response\.(?:completed|incomplete|failed))"',
    re.MULTILINE,
)
_TEXT = re.compile(
    rb'^event: ?response\.output_text\.delta\r?$|^data: ?\{"type": ?"response\.output_text\.delta"', re.MULTILINE
)
_PING = re.compile(rb'^event: ?ping$|^data: ?\{"type": ?"ping"', re.MULTILINE)


def _figures(text: bytes) -> dict[str, int]:
    """The first figures in `text` and, over them, the last: those between are replaced by later ones anyway."""
    if b'"usage' not in text and b'eval_count"' not in text:
        return {}
    places = list(_PLACE.finditer(text))
    found: dict[str, int] = {}
    for index, place in enumerate(places):
        if found := _tokens(text, place):
            for later in reversed(places[index + 1 :]):
                if last := _tokens(text, later):
                    return found | last
            break
    return found


def _tokens(text: bytes, place: re.Match[bytes]) -> dict[str, int]:
    """The figures at `place`, if that is where an API puts them, and not in the arguments of a tool, say."""
    start = text.rfind(b"\n", 0, place.start()) + 1
    end = text.find(b"\n", place.end())
    line = text[start : end if end >= 0 else len(text)].strip()
    event = _object(line.removeprefix(b"data:").lstrip())
    if event is None:  # the line's beginning is gone, or it is one of many of a JSON document
        named = _OF_OLLAMA.match(text, place.start())
        if named is not None:
            return _named({named[1].decode(): int(named[2])})
        return _named(_object(text[place.end() :]) or {})
    found = _named({name: event.get(name) for name in ("prompt_eval_count", "eval_count")})
    for holder in (event, *(event.get(name) for name in _WITHIN)):
        if isinstance(holder, dict):
            for usage in (holder.get("usage"), holder.get("usageMetadata")):
                if isinstance(usage, dict):
                    found |= _named(usage)
    return found


def _named(usage: dict[str, Any]) -> dict[str, int]:
    """The figures in an API's own object, by what they are called here."""
    for within in ("billed_units", "tokens"):  # Cohere
        if isinstance(usage.get(within), dict):
            usage = {**usage, **usage[within]}
            break
    found: dict[str, int] = {}
    for kind, names in _NAMES.items():
        for name in names:
            if (count := _count(usage, name)) is not None:
                found[kind] = count
                break
    for details in _DETAILS:
        for kind, name in (("cache_read", "cached_tokens"), ("cache_write", "cache_write_tokens")):
            if (count := _count(usage.get(details), name)) is not None:
                found[kind] = count
    # Gemini counts thoughts beside the answer, and what tools have given beside the prompt; both are billed.
    for kind, name in (("output", "thoughtsTokenCount"), ("input", "toolUsePromptTokenCount")):
        if (count := _count(usage, name)) is not None:
            found[kind] = found.get(kind, 0) + count
    # xAI counts reasoning beside the answer, OpenAI within it: the total tells.
    reasoning = _count(usage.get("completion_tokens_details"), "reasoning_tokens")
    if reasoning and found.get("input", 0) + found.get("output", 0) + reasoning == _count(usage, "total_tokens"):
        found["output"] = found.get("output", 0) + reasoning
    return found


def _object(text: bytes) -> dict[str, Any] | None:
    """The JSON object that `text` begins with."""
    if not text.startswith(b"{"):
        return None
    try:
        said, _ = _decode(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _count(usage: object, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None
