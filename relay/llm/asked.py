"""What a request's body asks for: an event stream or not, and which models. Pure: bytes in, an `Asked` out.

Bodies are as long as RELAY_MAX_BODY allows, so nothing here builds objects from one. The scan walks over the strings of
a JSON text and over what stands between them, and stops in between so that others get their turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import accumulate
from urllib.parse import parse_qsl

#: Bytes and strings of one step of a scan: a millisecond each at most, on a processor of 2023.
_STEP_BYTES, _STEP_STRINGS = 64 * 1024, 500
#: Strings of a body that are looked at. A body of many more is no prompt, and walking over it costs real time.
_MOST_STRINGS = 400_000

#: All that may stand outside of strings in JSON (RFC 8259): a comment, a single quote, a bare word or a byte of UTF-16
#: is something that only lenient readers understand.
_BETWEEN = re.compile(rb"[ \t\r\n,:\[\]{}0-9eE+\-.truefalsn]*+")
#: Brackets as what they do to the depth, a signed byte each, and all else that may stand there.
_LEVELS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{[}]")
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_VALUE = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*([^ \t\r\n,}]*)")

#: Where OpenAI's chat completions take the wish (platform.openai.com/docs/api-reference/chat, "stream_options").
_INCLUDE_USAGE = b'"stream_options":{"include_usage":true},'

#: Names under which APIs take models, in lower case without separators.
_MODEL_NAMES = frozenset(["model", "models", "modelid", "modelname", "fallbacks", "fallbackmodels"])
_SEPARATORS = re.compile(r"[^a-z]")
_QUOTE = 0x22
_JSON_START = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[{\[]")
#: Of longer names and values only the beginning is looked at; no model has such a name.
_LONGEST_NAME = 1024
_LONGEST_FORM, _MOST_PARTS = 1024 * 1024, 1000

_FORM = re.compile(rb"[A-Za-z0-9_.~%+*&=:,@/!-]*")
_BOUNDARY = re.compile(r'multipart/form-data;\s*boundary=("?)([A-Za-z0-9\'()+_,./:=?-]{1,70})\1', re.IGNORECASE)
_PART_HEAD = re.compile(
    rb'content-disposition: *form-data; *name="([^"\\\r\n]*)"(; *filename="[^"\r\n]*")?'
    rb"(?:\r\ncontent-(?:type|length):[^\r\n]*)*",
    re.IGNORECASE,
)


@dataclass(slots=True)
class Asked:
    """What a body says."""

    stream: bool = False  # it asks for an event stream, and there is no doubt
    stream_options: bool = False  # it says something of how it is to be streamed
    model: str | None = None  # what a strict reader takes for its model
    models: list[str] = field(default_factory=list)  # all that any reader could take for one
    opaque: bool = False  # sound, a picture or a film, which name no model
    fault: str | None = None  # why the models are not known, as in "the body FAULT"

    def unsure(self, fault: str) -> Asked:
        """What is left when the body cannot be read to its end."""
        self.stream, self.model, self.fault = False, None, fault
        return self


def scan(body: bytes | bytearray | None, content_type: str) -> Generator[None, None, Asked]:
    """Scan a body of any kind. Its own first bytes count before its Content-Type, which upstreams may not look at."""
    if not body:
        return Asked()
    kind = content_type.partition(";")[0].strip().lower()
    if _JSON_START.match(body):
        return (yield from scan_json(body))
    if kind == "multipart/form-data":
        return (yield from scan_parts(body, content_type))
    if kind == "application/x-www-form-urlencoded":
        return scan_form(body)
    asked = Asked(opaque=kind.startswith(("audio/", "image/", "video/")))
    return asked.unsure("is neither JSON nor a form")


def parse_json(body: bytes | bytearray) -> Asked:
    """What a strict reader takes from a short body: faster than a scan, and no word of other models."""
    asked = Asked()
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return asked.unsure("is not valid JSON")
    if isinstance(said, dict):
        model = said.get("model")
        asked.model = model if isinstance(model, str) else None
        asked.stream = said.get("stream") is True or said.get("stream_format") == "sse"
        asked.stream_options = "stream_options" in said
    return asked


def scan_json(body: bytes | bytearray) -> Generator[None, None, Asked]:  # noqa: C901 - one loop, which calls would slow
    """Scan JSON, or several JSON texts in a row, for `stream`, `stream_format` and models.

    `stream` counts at the top level only, and the last of two wins (as in Python, JavaScript and Go). Models count at
    every level. Yields to let others run; returns an Asked.
    """
    asked = Asked()
    position = since = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    end = len(body)
    depth = strings = texts = 0
    text: bytes | None = None  # the last string, undecoded
    name = ""  # the key at the top level that this string is the value of
    is_model = False  # this string is the value of a key that names models
    list_at = 0  # the depth of a list of models, whose strings all count
    while True:
        gap = _BETWEEN.match(body, position, min(position + _STEP_BYTES, end))
        assert gap is not None  # noqa: S101 - it matches nothing, too
        between = gap.group()
        position = gap.end()
        is_key = text is not None and between.lstrip()[:1] == b":"
        if text is not None and not is_key and (is_model or list_at):
            asked.models.append(_decoded(text, "replace"))
        name, is_model = "", False
        if is_key and text is not None:
            key = _decoded(text)
            named = names_models(key)
            found = _VALUE.match(between)
            value = found.group(1) if found is not None else b""
            if depth == 1 and key == "stream":
                asked.stream = value == b"true"
            elif depth == 1 and key == "stream_options":
                asked.stream_options = True
            elif depth == 1 and not value:
                name = key
            if named and depth == 1 and value not in (b"", b"null") and key.lower() == "model":
                return asked.unsure("names a model that is not a text")
            if named and value[:1] == b"[":
                list_at = list_at or depth + 1
            elif named and not value:
                is_model = True
        if len(between) > 1 or text is None or not is_key:
            opened = between.count(b"{") + between.count(b"[")
            closed = between.count(b"}") + between.count(b"]")
            if opened and not depth:
                texts += 1
            if closed and list_at:
                steps = memoryview(between.translate(_LEVELS, _NO_BRACKETS)).cast("b")
                if depth + min(accumulate(steps)) < list_at:
                    list_at = 0
            depth += opened - closed
            if depth < 0:
                return asked.unsure("is not valid JSON")
        if position >= end:
            break
        if len(between) == _STEP_BYTES:  # a long row of numbers, mostly
            if is_model or not between.strip():
                return asked.unsure("has too much white space")
            text = None
            since = position
            yield
            continue
        if body[position] != _QUOTE:
            return asked.unsure("is not plain JSON in UTF-8")
        start = position + 1
        # Mostly a string has no backslash in it, and a search is much faster than the expression.
        stop = body.find(b'"', start)
        if stop >= 0 and body.find(b"\\", start, stop) >= 0:
            stop = yield from _end_of_escaped(body, start)
        if stop < 0 or stop >= end:
            return asked.unsure("is not valid JSON")
        text = bytes(body[start : min(stop, start + _LONGEST_NAME)])
        if name == "model":
            asked.model = _decoded(text, "replace")
        elif name == "stream_format":
            asked.stream = text == b"sse"
        position = stop + 1
        strings += 1
        if strings > _MOST_STRINGS:
            return asked.unsure("has too many parts")
        if strings % _STEP_STRINGS == 0 or position - since > _STEP_BYTES:
            since = position
            yield
    if depth:
        return asked.unsure("is not valid JSON")
    if texts != 1:
        asked.stream = False
    return asked


def _end_of_escaped(body: bytes | bytearray, start: int) -> Generator[None, None, int]:
    """Where the quote stands that ends the string which begins at `start`, past those behind a backslash; the body's
    length: there is none. Yields to let others run."""
    end, stop = len(body), start
    while stop < end and body[stop] != _QUOTE:
        inner = _IN_STRING.match(body, stop, min(stop + _STEP_BYTES, end))
        if inner is None or inner.end() == stop:
            return end  # a backslash and nothing after it
        stop = inner.end()
        yield
    return stop


def has_more_parts(body: bytes | bytearray, most: int) -> Generator[None, None, bool]:
    """Whether JSON has more commas, colons and opening brackets outside of its strings than `most`: so much the parsing
    of it takes, however long its strings are. Yields to let others run; a body that is no JSON may have any number."""
    parts = strings = position = since = 0
    end = len(body)
    while True:
        quote = body.find(b'"', position, position + _STEP_BYTES)
        stop = min(position + _STEP_BYTES, end) if quote < 0 else quote
        parts += sum(body.count(sign, position, stop) for sign in (b",", b":", b"[", b"{"))
        if parts > most:
            return True
        position = stop
        if quote >= 0:
            start = quote + 1
            stop = body.find(b'"', start)
            if stop >= 0 and body.find(b"\\", start, stop) >= 0:
                stop = yield from _end_of_escaped(body, start)
            position = end if stop < 0 else stop + 1
        if position >= end:
            return False
        strings += 1
        if strings % _STEP_STRINGS == 0 or position - since > _STEP_BYTES:
            since = position
            yield


def with_usage(body: bytes | bytearray) -> bytes | bytearray:
    """A JSON object that asks for a stream and has no `stream_options`, with the wish for usage put at its beginning; a
    bytearray is changed in place."""
    start = body.index(b"{") + 1
    if isinstance(body, bytearray):
        body[start:start] = _INCLUDE_USAGE
        return body
    return body[:start] + _INCLUDE_USAGE + body[start:]


def names_models(key: str) -> bool:
    """Whether some API takes models under this name."""
    plain = _SEPARATORS.sub("", key.lower())
    return plain in _MODEL_NAMES


def _decoded(text: bytes, faults: str = "ignore") -> str:
    """A string of JSON. A lenient reader leaves out what is not UTF-8, which must not hide a name; a model's name that
    is not UTF-8 is no known one."""
    known = text.decode("utf-8", faults)
    if "\\" not in known:
        return known
    try:
        return str(json.loads(f'"{known}"', strict=False))
    except ValueError:
        return known.replace("\\", "")


def scan_form(body: bytes | bytearray) -> Asked:
    """The same for application/x-www-form-urlencoded."""
    asked = Asked()
    if len(body) > _LONGEST_FORM or not _FORM.fullmatch(body):
        return asked.unsure("is not a plain form")
    for key, value in parse_qsl(body.decode("ascii").replace(";", "&"), keep_blank_values=True):
        if names_models(key):
            asked.models.append(value)
            if key == "model":
                asked.model = value
    return asked


def scan_parts(body: bytes | bytearray, content_type: str) -> Generator[None, None, Asked]:
    """The same for multipart/form-data, where a part named `stream` holds `true`. Yields and returns as `scan_json`."""
    asked = Asked()
    said = _BOUNDARY.fullmatch(content_type.strip())
    if said is None:
        return asked.unsure("has no plain multipart boundary")
    mark = b"--" + said.group(2).encode("ascii")
    if not body.startswith(mark):
        return asked.unsure("is not plain multipart/form-data")
    position = len(mark)
    for _ in range(_MOST_PARTS):
        if body[position : position + 2] == b"--":
            return asked
        head_end = body.find(b"\r\n\r\n", position, position + _LONGEST_NAME)
        stop = body.find(mark, position)
        if head_end < 0 or stop < 0 or body[position : position + 2] != b"\r\n" or body[stop - 2 : stop] != b"\r\n":
            break
        head = _PART_HEAD.fullmatch(bytes(body[position + 2 : head_end]))
        if head is None:
            return asked.unsure("has a part whose head is not plain")
        value = bytes(body[head_end + 4 : min(stop - 2, head_end + 4 + _LONGEST_NAME)]).decode("utf-8", "replace")
        name = head.group(1).decode("utf-8", "ignore")
        if names_models(name):
            asked.models.append(value)
            if name == "model":
                asked.model = value
        elif name == "stream":
            asked.stream = value == "true"
        position = stop + len(mark)
        yield
    return asked.unsure("is not plain multipart/form-data")
