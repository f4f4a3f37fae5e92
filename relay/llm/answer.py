"""What an upstream's events say: text, and how the answer ends. No input or output.

Each API is known by what its events hold and not by a setting: OpenAI's chat completions (and those who speak like
it), its legacy completions and its responses, Anthropic's messages. Of several choices the first is read. Other events
are passed over, such as tool calls, reasoning and pings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from relay import errors
from relay.wire.sse_parser import Parser

if TYPE_CHECKING:
    from relay.wire.sse_parser import Event

#: Characters of an upstream's error message that are passed on, and of its type and code.
_MOST_MESSAGE, _MOST_NAME = 2000, 100

_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
_REPLACEMENT = "\ufffd"


class Joiner:
    """Makes whole characters of text that comes in pieces: JSON may split one beyond U+FFFF into two escapes (RFC 8259
    section 7), and these may lie in two events. Half a character becomes U+FFFD."""

    __slots__ = ("_high",)

    def __init__(self) -> None:
        self._high = ""

    def feed(self, text: str) -> str:
        """The text that is whole with this piece."""
        if self._high:
            text, self._high = self._high + text, ""
        elif text.isascii():
            return text
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._high = text[:-1], text[-1]
        if _SURROGATE.search(text) is None:
            return text
        return _SURROGATE.sub(_REPLACEMENT, _PAIR.sub(_joined, text))

    def end(self) -> str:
        """What is left when no more comes."""
        left, self._high = self._high, ""
        return _REPLACEMENT if left else ""


def _joined(pair: re.Match[str]) -> str:
    return chr(0x10000 + ((ord(pair[1]) - 0xD800) << 10) + (ord(pair[2]) - 0xDC00))


class Answer:
    """One answer, read event by event.

    `ended`: its end mark has come. `finished`: the model has said why it stopped, so that an end without a mark is an
    end too. `strange`: there were events, but none of an API that is known here. `finish_reason`, `model` and `usage`
    are as the upstream put them.
    """

    __slots__ = ("_joiner", "_known", "_strange", "ended", "finish_reason", "model", "usage")

    def __init__(self) -> None:
        self._joiner = Joiner()
        self._known = self._strange = False
        self.ended = False
        self.finish_reason: str | None = None
        self.model: str | None = None
        self.usage: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def strange(self) -> bool:
        return self._strange and not self._known

    def read(self, event: Event) -> str:
        """The text of the next event, often none. Raises UpstreamSaid if it tells of a failure."""
        data = event.data
        if data.strip() == "[DONE]":
            self.ended = True
            return ""
        said = _json(data)
        if said is None and event.name != "error" and data.lstrip().startswith("{"):
            raise errors.UpstreamFailed("an event of the upstream's answer is no sound JSON")
        if event.name == "error" or (said is not None and _tells_of_failure(said)):
            raise failure(said, data)
        if said is None:
            self._strange = True
            return ""
        return self._joiner.feed(self._text(said))

    def end(self) -> str:
        """What is left of the text when no more comes."""
        return self._joiner.end()

    def summary(self) -> dict[str, Any]:
        """What is told when the answer is complete."""
        try:
            json.dumps(self.usage)
        except RecursionError:  # what can just be read may be too deep to be written
            self.usage = None
        return {"finish_reason": self.finish_reason, "model": self.model, "usage": self.usage}

    def _text(self, said: Mapping[str, Any]) -> str:
        choices = said.get("choices")
        if isinstance(choices, list):
            self._known = True
            self._note(said)
            return "".join([self._choice(choice) for choice in choices if isinstance(choice, dict)])
        kind = said.get("type")
        if not isinstance(kind, str):
            self._strange = True
            return ""
        if kind.startswith("response."):
            return self._response(kind, said)
        return self._message(kind, said)

    def _choice(self, choice: Mapping[str, Any]) -> str:
        """OpenAI's chat completions and completions."""
        if choice.get("index", 0) != 0:
            return ""
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = reason
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return _str(choice.get("text"))
        content = delta.get("content")
        if isinstance(content, list):  # Mistral's, when there is reasoning beside it
            parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join([_str(part.get("text")) for part in parts])
        return _str(content) + _str(delta.get("refusal"))

    def _response(self, kind: str, said: Mapping[str, Any]) -> str:
        """OpenAI's responses."""
        self._known = True
        response = said.get("response")
        if isinstance(response, dict):
            self._note(response)
        if kind in ("response.completed", "response.incomplete"):
            self.ended = True
            self.finish_reason = kind.removeprefix("response.")
            details = response.get("incomplete_details") if isinstance(response, dict) else None
            if isinstance(details, dict) and isinstance(details.get("reason"), str):
                self.finish_reason = details["reason"]
        if kind in ("response.output_text.delta", "response.refusal.delta"):
            return _str(said.get("delta"))
        return ""

    def _message(self, kind: str, said: Mapping[str, Any]) -> str:
        """Anthropic's messages."""
        delta = said.get("delta")
        if kind == "message_start" and isinstance(said.get("message"), dict):
            self._known = True
            self._note(said["message"])
        elif kind == "content_block_delta" and isinstance(delta, dict):
            self._known = True
            return _str(delta.get("text")) if delta.get("type") == "text_delta" else ""
        elif kind == "message_delta":
            self._known = True
            self._note(said)
            if isinstance(delta, dict) and isinstance(delta.get("stop_reason"), str):
                self.finish_reason = delta["stop_reason"]
        elif kind == "message_stop":
            self._known = self.ended = True
        else:
            self._strange = True
        return ""

    def _note(self, said: Mapping[str, Any]) -> None:
        if isinstance(said.get("model"), str) and said["model"]:
            self.model = said["model"]
        if isinstance(said.get("usage"), dict):
            self.usage = {**(self.usage or {}), **said["usage"]}  # Anthropic's comes in two parts


def failure(said: Mapping[str, Any] | None, text: str = "", status: int | None = None) -> errors.UpstreamSaid:
    """The error that an upstream told of: in OpenAI's shape, Anthropic's, or some other. `text`: as it came."""
    found: Any = said
    if said is not None:
        response = said.get("response")
        for each in (said.get("error"), response.get("error") if isinstance(response, dict) else None):
            found = each or found
            if each:
                break
    message = kind = code = None
    if isinstance(found, dict):
        message, kind, code = found.get("message"), found.get("type"), found.get("code")
        status = status or _status(code) or _status(found.get("status"))
        if kind in ("error", "response.failed"):
            kind = None  # the event's type, not the error's
    elif isinstance(found, str):
        message = found
    if not isinstance(message, str) or not message.strip():
        message = text.strip() if said is None else ""
    if not message:
        message = "the upstream reported an error" if status is None else f"the upstream answered {status}"
    return errors.UpstreamSaid(
        _plain(message, _MOST_MESSAGE),
        kind=_plain(kind, _MOST_NAME) if isinstance(kind, str) and kind else None,
        code=_plain(code, _MOST_NAME) if isinstance(code, str) and code else None,
        status=status,
    )


def failure_in_body(body: bytes, status: int, content_type: str) -> errors.UpstreamSaid:
    """The error that an answer tells of that is no event stream of status 200."""
    text = body.decode("utf-8", "replace")
    if status < 400:
        kind = content_type.partition(";")[0].strip()[:_MOST_NAME] or "no content type"
        return errors.UpstreamSaid(
            f"the upstream answered {status} with {_plain(kind, _MOST_NAME)}, and not with an event stream",
            status=status,
        )
    said = _json(text)
    if said is None:
        said = next(filter(None, (_json(event.data) for event in Parser().feed(body))), None)
    return failure(said, "", status)


def _tells_of_failure(said: Mapping[str, Any]) -> bool:
    return bool(said.get("error")) or said.get("type") in ("error", "response.failed")


def _status(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599 else None


def _plain(text: str, most: int) -> str:
    return _SURROGATE.sub(_REPLACEMENT, text[:most])


def _str(value: object) -> str:
    return value if isinstance(value, str) else ""


def _json(text: str) -> dict[str, Any] | None:
    try:
        # NaN and Infinity, which Python reads, are no JSON: what is told on must be.
        said = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _no_number(_name: str) -> None:
    return None
