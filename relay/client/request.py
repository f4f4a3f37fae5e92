"""What a client asks for: the URL, the headers and the JSON body. No input or output."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay.version import __version__
from relay.wire.headers import check_field

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The service's own endpoint, which knows a model to ask when none is named.
PROMPT_PATH = "api/stream-chat"
CHAT_PATH = "chat/completions"
#: What Anthropic's API wants to be told in each request, unless `extra` says otherwise.
_MOST_TOKENS = 4096
_ANTHROPIC_VERSION = "2023-06-01"


@dataclass(frozen=True, slots=True)
class Request:
    """One POST. `path` is what was asked for below the base URL; `headers` and `body` may hold secrets: no repr."""

    url: str
    host: str  # as people write it, for messages
    path: str
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)


def build(
    base_url: str,
    prompt: str | None,
    *,
    model: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    key: str | None,
    headers: Mapping[str, str] | None,
    path: str | None,
    extra: Mapping[str, Any] | None,
) -> Request:
    """The request for these arguments of `relay.client.stream_chat`. Raises ValueError with a sentence."""
    origin, base, query, host = _parts(base_url)
    if path is None:
        path = CHAT_PATH if base else PROMPT_PATH
    path = path.strip("/")
    if not re.fullmatch("[\x21-\x7e]+", path) or {"?", "#"} & set(path):
        raise ValueError("path must be what stands below the base URL, without query, fragment and spaces")
    if base.endswith(f"/{path}"):  # the whole address of the endpoint was given
        base = base.removesuffix(f"/{path}")
    body = {**_body(path, prompt, messages), **({} if model is None else {"model": model}), **(extra or {})}
    return Request(
        url=f"{origin}{base}/{path}{query}",
        host=host,
        path=path,
        headers=_headers(path, key, headers or {}),
        body=json.dumps(body).encode(),
    )


def _parts(base_url: str) -> tuple[str, str, str, str]:
    """Origin, path without a slash at its end, query with its question mark, and host with its port."""
    if not re.match("https?://", base_url, re.IGNORECASE):
        raise ValueError("the base URL must begin with http:// or https://")
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"the base URL is none: {error}") from None
    if not host:
        raise ValueError("the base URL names no host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the base URL holds a user name or password; a client key is an argument of its own")
    if parts.fragment or not re.fullmatch("[\x21-\x7e]*", parts.path + parts.query):
        raise ValueError("the base URL must be without fragment and spaces")
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/"), query, parts.netloc


def _body(path: str, prompt: str | None, messages: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """The body that the API at `path` takes, without the model."""
    if not prompt and not messages:
        raise ValueError("there is neither a prompt nor a message")
    last = path.rpartition("/")[2]
    asked = [*(messages or ()), *([{"role": "user", "content": prompt}] if prompt else ())]
    if path.endswith(CHAT_PATH):
        return {"messages": asked, "stream": True}
    if last == "messages":
        return {"messages": asked, "max_tokens": _MOST_TOKENS, "stream": True}
    if last == "responses":
        return {"input": asked if messages else prompt, "stream": True}
    if last != "completions":
        return {"messages": asked} if messages else {"prompt": prompt}
    if messages:
        raise ValueError("completions takes a prompt and no messages")
    return {"prompt": prompt, "stream": True}


def _headers(path: str, key: str | None, given: Mapping[str, str]) -> dict[str, str]:
    headers = {
        "User-Agent": f"relay-client/{__version__}",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",  # what is compressed comes when the compressor likes
        "Content-Type": "application/json",
    }
    if path.rpartition("/")[2] == "messages":
        headers["anthropic-version"] = _ANTHROPIC_VERSION
    if key:
        headers["Authorization"] = f"Bearer {key}"
    names = {name.lower() for name in given}
    headers = {name: value for name, value in headers.items() if name.lower() not in names} | dict(given)
    for name, value in headers.items():
        check_field(name, value.strip())  # the relay's own message: without the value
    return {name: value.strip() for name, value in headers.items()}
