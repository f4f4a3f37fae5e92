"""What a client asks for, taken out of a WSGI request: the raw target, the whole body, whether it wants events."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_to_bytes

from werkzeug.exceptions import RequestEntityTooLarge

from relay import errors
from relay.wire import sse, target

if TYPE_CHECKING:
    from flask import Request

#: Where a POST with `"stream": true` in its JSON is answered with an event stream: the paths of OpenAI's and
#: Anthropic's APIs, whatever stands before them (Azure's deployments).
_STREAMING_PATHS = ("/chat/completions", "/completions", "/responses", "/messages")
#: A larger body is not looked into.
_MOST_JSON = 1024 * 1024
#: Methods whose missing body is announced as empty (RFC 9110 section 8.6), as some servers insist on a length.
_WITH_BODY = frozenset(["POST", "PUT", "PATCH"])
#: What stands for one byte of a decoded path.
_RAW_BYTE = re.compile(rb"%[0-9A-Fa-f]{2}|.", re.DOTALL)


def raw_target(environ: dict[str, Any], rest: str) -> tuple[str, str | None]:
    """The raw path below the mount and the raw query, as they came: latin-1 text, a character a byte.

    `rest` is what Flask has routed as the part below the mount, decoded. It decides where the raw path is cut, since
    the prefix may come in any encoding, and in front of it whatever a server or middleware has moved to SCRIPT_NAME.
    The query is None where there is no question mark. A server that shows no raw target gets it encoded anew.
    """
    path_info = str(environ.get("PATH_INFO", ""))
    # Slashes are what a lossy decoding leaves as they are: Flask makes one character of several ill bytes. Of nothing
    # but slashes behind the mount it makes nothing.
    slashes = rest.count("/") if rest else len(path_info) - len(path_info.rstrip("/")) - 1
    below = "/".join(path_info.split("/")[-1 - slashes :]) if slashes >= 0 else ""
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    if raw:
        path, query = target.split_target(str(raw))
        if "#" in path:
            return path, query  # servers cut it off in PATH_INFO; here it shows, and is refused
        for encoding in ("latin-1", "utf-8"):  # the second is what gunicorn makes of bytes beyond ASCII in PATH_INFO
            raw_bytes = _RAW_BYTE.findall(path.encode(encoding))
            tail = b"".join(raw_bytes[len(raw_bytes) - len(below) :]) if len(below) <= len(raw_bytes) else b""
            if unquote_to_bytes(tail).decode("latin-1") == below:
                return tail.decode(encoding), query
    query_string = str(environ.get("QUERY_STRING", ""))
    return quote(below.encode("latin-1"), safe="/:@!$&'()*+,;=~-._"), query_string or None


def read_body(request: Request, limit: int) -> bytes | None:
    """The whole request body; None if the request has none.

    Raises BodyTooLarge above `limit` bytes, and BadRequest if the client sent less than it announced: half a request
    must never go upstream.
    """
    environ = request.environ
    announced = environ.get("CONTENT_LENGTH")
    chunked = "chunked" in str(environ.get("HTTP_TRANSFER_ENCODING", "")).lower()
    if not announced and not chunked:
        return b"" if request.method in _WITH_BODY else None
    too_large = errors.BodyTooLarge(f"the request body is over {limit} bytes (RELAY_MAX_BODY)")
    cut = errors.BadRequest("the request body ended before it was complete", code="truncated_body")
    if chunked and "wsgi.input_terminated" not in environ:
        raise errors.BadRequest("this server takes no request body without Content-Length", code="length_required")
    if announced and not chunked:
        if not (announced.isascii() and announced.isdigit()):
            raise errors.BadRequest("the request's Content-Length is malformed")
        if len(announced) > 18 or int(announced) > limit:
            raise too_large
    body = b""
    try:
        if announced and not chunked:
            body = environ["wsgi.input"].read(int(announced))
        if not body:
            # In chunks, or read before by somebody else, who has kept it. Werkzeug stops reading at its limit without a
            # word where the server marks the end of the body: leave it one byte by which to see more.
            request.max_content_length = limit + 1
            body = request.get_data(cache=False)
    except RequestEntityTooLarge:
        raise too_large from None
    except Exception:  # noqa: BLE001 - each server has its own for a body that is cut or ill framed
        raise cut from None
    if len(body) > limit:
        raise too_large
    if announced and not chunked and len(body) != int(announced):
        raise cut
    return body


def check_model(request: Request, body: bytes | None, models: Collection[str]) -> Mapping[str, object] | None:
    """Refuse a JSON object that asks for another model than these. Raises Forbidden.

    Gives what the body says, for `asks_for_events`; None if it is no object, such as a form or nothing. Whatever an
    upstream could take for an object in which a model is named must be read here, however long it is: with a name
    twice or in capitals, with ill UTF-8, compressed. What cannot be read is refused.
    """
    if not body:
        return None
    if request.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise _unreadable("is compressed")
    encoding = json.detect_encoding(body)
    if encoding == "utf-8" and not body.lstrip().startswith(b"{"):
        return None
    text = body.decode(encoding, "replace").lstrip("\ufeff \t\n\r\v\f")
    if not text.startswith("{"):
        return None
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would keep only the last of a name
    except (ValueError, RecursionError):
        raise _unreadable("is no sound JSON") from None
    if any(name.lower() == "model" and not _among(model, models) for name, model in pairs):
        raise errors.Forbidden(
            "the model is not among those that this relay serves (RELAY_MODELS)", code="model_not_allowed"
        )
    return dict(pairs)


def check_named(model: str, models: Collection[str]) -> None:
    """Refuse another model than these. Raises Forbidden."""
    if model not in models:
        raise errors.Forbidden(
            "the model is not among those that this relay serves (RELAY_MODELS)", code="model_not_allowed"
        )


def _among(model: object, models: Collection[str]) -> bool:
    return model is None or (isinstance(model, str) and model in models)


def _unreadable(why: str) -> errors.Forbidden:
    return errors.Forbidden(
        f"the body {why}, so that the relay cannot tell which model it asks for (RELAY_MODELS)",
        code="model_not_allowed",
    )


def asks_for_events(request: Request, path: str, body: bytes | None, said: Mapping[str, object] | None = None) -> bool:
    """Whether the answer to this request is sure to be an event stream, should it succeed.

    Only then may the relay answer before the upstream has. `path` is the raw path below the mount, `said` what the
    body says if somebody has read it.
    """
    accepts = {item.partition(";")[0].strip().lower() for item in request.headers.get("Accept", "").split(",")}
    if sse.MEDIA_TYPE in accepts:
        return "application/json" not in accepts
    if request.method != "POST" or not f"/{path}".endswith(_STREAMING_PATHS):
        return False
    if not body or len(body) > _MOST_JSON or b'"stream"' not in body:
        return False
    return (says(body) if said is None else said).get("stream") is True


def says(body: bytes | None) -> Mapping[str, object]:
    """What a JSON object of at most 1 MiB says; nothing if the body is something else."""
    if not body or len(body) > _MOST_JSON:
        return {}
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):  # the second from ten thousand brackets
        return {}
    return said if isinstance(said, dict) else {}
