"""What the prompt endpoints are asked, and the request upstream that it makes. No input or output.

    {"prompt": "Hello", "model": "gpt-4.1", "batch_ms": 100, "batch_size": 200, "max_events_per_second": 10}

All but `prompt` may be left out, and `"messages": [{"role": "user", "content": "Hello"}]` may stand in its place. A GET
has the same in its query, but for `messages`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from relay import errors
from relay.llm.asked import has_more_parts

#: Anthropic's API wants a limit of the answer's tokens; its oldest models in use give no more.
MAX_TOKENS = 4096

#: Commas, colons and opening brackets of a body, of which a message has five. Parsing so many takes some milliseconds,
#: in which no other stream has its turn.
_MOST_PARTS = 20_000

#: Bounds of what paces the text: milliseconds, characters, events per second.
BATCH_MS, BATCH_SIZE, EVENTS_PER_SECOND = (1, 60_000), (1, 100_000), (0.1, 1000)

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class Pace:
    """How text is sent: gathered for so many seconds or characters (0: not by that), so many events per second at most
    (0: as they come)."""

    batch_seconds: float = 0.0
    batch_size: int = 0
    events_per_second: float = 0.0

    @property
    def batches(self) -> bool:
        return bool(self.batch_seconds or self.batch_size)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is asked."""

    messages: tuple[Mapping[str, str], ...]
    model: str
    pace: Pace

    @classmethod
    def of_body(
        cls, body: bytes | bytearray | None, query: Mapping[str, str], default_model: str
    ) -> Generator[None, None, Prompt]:
        """Read it from a POST's body; how it is paced may stand in the query too. Yields to let others run. Raises
        BadRequest."""
        if body and (yield from has_more_parts(body, _MOST_PARTS)):
            raise errors.BadRequest(
                f"the body has more than {_MOST_PARTS} values and names, some {_MOST_PARTS // 5} messages; send "
                "a longer conversation as a chat request to the relay itself"
            )
        try:
            said = json.loads(body or b"")
        except (ValueError, RecursionError):
            raise errors.BadRequest('the body must be JSON, such as {"prompt": "Hello"}') from None
        if not isinstance(said, dict):
            raise errors.BadRequest('the body must be a JSON object, such as {"prompt": "Hello"}')
        return cls(_messages(said), _model(said, default_model), _pace({**_numbers_in(query), **_without_null(said)}))

    @classmethod
    def of_query(cls, query: Mapping[str, str], default_model: str) -> Prompt:
        """Read it from a GET's query. Raises BadRequest."""
        if "messages" in query:
            raise errors.BadRequest("messages can only stand in the JSON body of a POST; a GET takes prompt")
        return cls(_messages(query), _model(query, default_model), _pace(_numbers_in(query)))

    def for_openai(self) -> tuple[str, bytes]:
        """Path below the upstream's URL and body of the request upstream, in OpenAI's shape."""
        asked = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},  # or the answer does not say what it has cost
        }
        return "chat/completions", json.dumps(asked).encode()

    def for_anthropic(self) -> tuple[str, bytes]:
        """The same in Anthropic's, where what the system says stands apart. Raises BadRequest if nobody else speaks."""
        system = "\n\n".join([message["content"] for message in self.messages if message["role"] == "system"])
        others = [message for message in self.messages if message["role"] != "system"]
        if not others:
            raise errors.BadRequest("messages must have one whose role is not system")
        asked: dict[str, Any] = {
            "model": self.model, "max_tokens": MAX_TOKENS, "messages": others, "stream": True,
        }  # fmt: skip
        if system:
            asked["system"] = system
        return "messages", json.dumps(asked).encode()


def _messages(said: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    prompt, messages = said.get("prompt"), said.get("messages")
    if prompt is not None and messages is not None:
        raise errors.BadRequest("prompt and messages cannot stand together: messages is the whole conversation")
    if messages is None:
        if prompt is None:
            raise errors.BadRequest("prompt is missing: the text that the model is asked")
        if not isinstance(prompt, str):
            raise errors.BadRequest("prompt must be a text")
        if not prompt.strip():
            raise errors.BadRequest("prompt must not be empty")
        return ({"role": "user", "content": prompt},)
    if not isinstance(messages, list) or not messages:
        raise errors.BadRequest('messages must be a list of objects such as {"role": "user", "content": "Hello"}')
    for number, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.keys() != {"role", "content"}
            or not all(isinstance(value, str) and value for value in message.values())
        ):
            raise errors.BadRequest(f"messages[{number}] must be an object of role and content, each a text, alone")
    return tuple(messages)


def _model(said: Mapping[str, Any], default: str) -> str:
    model = said.get("model")
    if model is None:
        return default
    if not isinstance(model, str) or not model.strip():
        raise errors.BadRequest("model must be a text that is not empty, or left out")
    return model


def _pace(said: Mapping[str, Any]) -> Pace:
    return Pace(
        batch_seconds=_number(said, "batch_ms", *BATCH_MS, whole=True) / 1000,
        batch_size=int(_number(said, "batch_size", *BATCH_SIZE, whole=True)),
        events_per_second=_number(said, "max_events_per_second", *EVENTS_PER_SECOND),
    )


def _number(said: Mapping[str, Any], name: str, least: float, most: float, *, whole: bool = False) -> float:
    value = said.get(name)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0.0  # off
    kind = "a whole number" if whole else "a number"
    wrong = errors.BadRequest(f"{name} must be {kind} from {least:g} to {most:g}, or 0 for none")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise wrong
    if whole and not float(value).is_integer():
        raise wrong
    return float(value)


def _numbers_in(query: Mapping[str, str]) -> dict[str, float]:
    """The paces in a query as numbers; what is none becomes one that is out of all bounds."""
    names = [name for name in ("batch_ms", "batch_size", "max_events_per_second") if query.get(name)]
    return {name: float(query[name]) if _NUMBER.fullmatch(query[name]) else math.nan for name in names}


def _without_null(said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None}
