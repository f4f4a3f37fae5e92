"""Token usage as an answer reported it, out of the little of it that is kept. No input or output.

Where each API says it: OpenAI's chat completions in the last chunk (with `stream_options.include_usage`), OpenAI's
responses in `response.completed`, Anthropic's messages in `message_start` and, cumulative, in `message_delta`. All of
these lie in the first or the last few KiB of an answer, so that no more needs to be kept of it.
"""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass

#: Bytes that are kept of an answer's beginning and of its end.
KEPT = 8 * 1024

_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_decode = json.JSONDecoder().raw_decode

#: What the APIs call it, by what it is called here.
_NAMES = {
    "input": ("input_tokens", "prompt_tokens"),
    "output": ("output_tokens", "completion_tokens"),
    "cache_read": ("cache_read_input_tokens",),
    "cache_write": ("cache_creation_input_tokens",),
}
#: Where OpenAI's APIs say how many of the input's tokens came out of a cache.
_DETAILS = ("input_tokens_details", "prompt_tokens_details")


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
    """The beginning and the end of an answer's body, fed piece by piece; no piece is copied."""

    __slots__ = ("_first", "_first_size", "_last", "_last_size")

    def __init__(self) -> None:
        self._first: list[bytes] | None = []  # None: it is full, and held nothing of interest
        self._first_size = 0
        self._last: deque[bytes] = deque()
        self._last_size = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if self._first is not None and self._first_size < KEPT:
            self._first.append(data)
            self._first_size += len(data)
            if self._first_size >= KEPT and b'"usage"' not in b"".join(self._first):
                self._first = None
        last = self._last
        last.append(data)
        self._last_size += len(data)
        while self._last_size - len(last[0]) >= KEPT:
            self._last_size -= len(last.popleft())

    def usage(self) -> Usage | None:
        """What the answer reported; None: nothing. Later figures replace earlier ones of the same kind."""
        found: dict[str, int] = {}
        first = b"" if self._first is None else b"".join(self._first)[:KEPT]
        for text in (first, b"".join(self._last)[-KEPT:]):
            for place in _USAGE.finditer(text):
                found.update(_tokens(text[place.end() :]))
        if not found:
            return None
        return Usage(*(found.get(kind) for kind in _NAMES))


def _tokens(text: bytes) -> dict[str, int]:
    """The figures in the JSON object that `text` begins with."""
    try:
        usage, _ = _decode(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    found = {
        kind: count for kind, names in _NAMES.items() for name in names if (count := _count(usage, name)) is not None
    }
    for details in _DETAILS:
        cached = _count(usage.get(details), "cached_tokens")
        if cached is not None:
            found["cache_read"] = cached
    return found


def _count(usage: object, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None
