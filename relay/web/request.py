"""What a client asks for, taken out of a WSGI request: the raw target, the whole body, whether it wants events."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from flask import request

from relay import errors
from relay.wire import sse, target

if TYPE_CHECKING:
    from flask import Request

#: Where a POST that says `stream` (or, for speech, `stream_format`) is answered with an event stream: the paths of
#: OpenAI's, Anthropic's and Cohere's APIs, whatever stands before them (Azure's deployments).
_STREAMING_PATHS = (
    "/chat/completions", "/completions", "/responses", "/messages", "/images/generations", "/images/edits", "/runs",
    "/submit_tool_outputs", "/v2/chat", "/audio/speech", "/audio/transcriptions", "/audio/translations",
)  # fmt: skip
#: Where `stream` means another kind of stream, lines of JSON or binary messages: Ollama, Cohere's first API, Bedrock.
_OTHER_STREAMS = ("/api/chat", "/api/generate", "/v1/chat", "/invoke-with-response-stream", "/converse-stream")
#: A GET that reads on in a stream that runs already.
_RESUMED = re.compile(r"/responses/[^/]+$")
#: Methods whose missing body is announced as empty (RFC 9110 section 8.6), as some servers insist on a length.
_WITH_BODY = frozenset(["POST", "PUT", "PATCH"])
#: What stands for one byte of a decoded path.
_RAW_BYTE = re.compile(rb"%[0-9A-Fa-f]{2}|.", re.DOTALL)


def current_request() -> Request:
    """The request that is served, itself: each use of Flask's proxy for it costs as much as a look at a header."""
    return request._get_current_object()  # type: ignore[attr-defined, no-any-return] # noqa: SLF001 - Werkzeug documents it


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
        if "%" not in path and path.isascii() and path.endswith(below):
            return below, query  # nothing is encoded
        for encoding in ("latin-1", "utf-8"):  # the second is what gunicorn makes of bytes beyond ASCII in PATH_INFO
            raw_bytes = _RAW_BYTE.findall(path.encode(encoding))
            tail = b"".join(raw_bytes[len(raw_bytes) - len(below) :]) if len(below) <= len(raw_bytes) else b""
            if unquote_to_bytes(tail).decode("latin-1") == below:
                return tail.decode(encoding), query
    query_string = str(environ.get("QUERY_STRING", ""))
    return quote(below.encode("latin-1"), safe="/:@!$&'()*+,;=~-._"), query_string or None


@dataclass(frozen=True, slots=True)
class Expected:
    """A body that is still to be read."""

    length: int | None  # bytes; None: it comes in chunks
    most: int  # bytes; more are refused
    setting: str  # what says so

    def too_large(self) -> errors.BodyTooLarge:
        return errors.BodyTooLarge(f"the request body is over {self.most} bytes ({self.setting})")

    def cut(self) -> errors.BadRequest:
        return errors.BadRequest("the request body ended before it was complete", code="truncated_body")


def expected_body(request: Request, max_body: int, setting: str = "RELAY_MAX_BODY") -> Expected | None:
    """The body that the request announces; None if it has none. The app's MAX_CONTENT_LENGTH counts if it is smaller.

    Raises BodyTooLarge, and BadRequest for a length that is malformed or missing.
    """
    environ = request.environ
    announced = str(environ.get("CONTENT_LENGTH") or "")
    chunked = "chunked" in str(environ.get("HTTP_TRANSFER_ENCODING", "")).lower()
    if not announced and not chunked:
        return None
    most = max_body
    of_app = request.max_content_length
    if of_app is not None and of_app < most:
        most, setting = of_app, "the app's MAX_CONTENT_LENGTH"
    if chunked:
        if "wsgi.input_terminated" not in environ:
            raise errors.BadRequest("this server takes no request body without Content-Length", code="length_required")
        return Expected(None, most, setting)
    if not (announced.isascii() and announced.isdigit()):
        raise errors.BadRequest("the request's Content-Length is malformed")
    if len(announced) > 18 or int(announced) > most:
        raise Expected(None, most, setting).too_large()
    return Expected(int(announced), most, setting)


def without_body(method: str) -> bytes | None:
    """What goes upstream of a request without a body: b"" is announced as empty."""
    return b"" if method in _WITH_BODY else None


class Remembered:
    """In place of `wsgi.input` while the app's hooks run: what one of them reads is there for the relay, too."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._kept = bytearray()
        self._again = False

    def again(self) -> None:
        """From now on read what was read before, and then the rest."""
        self._again = True

    def read(self, size: int | None = -1) -> bytes:
        if self._again and self._kept:
            size = len(self._kept) if size is None or size < 0 else size
            piece = bytes(self._kept[:size])
            del self._kept[:size]
            return piece
        return self._keep(self._source.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._keep(self._source.readline(size))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def _keep(self, piece: bytes) -> bytes:
        if not self._again:
            self._kept += piece
        return piece


def remember_body(*_: object) -> None:
    """For Flask's `url_value_preprocessor`, which runs before all hooks of the app."""
    environ = current_request().environ
    if environ.get("CONTENT_LENGTH") or environ.get("HTTP_TRANSFER_ENCODING"):
        environ["wsgi.input"] = Remembered(environ["wsgi.input"])


def body_source(environ: dict[str, Any]) -> Any:
    """Where the whole body can be read, though a hook may have read of it already."""
    source = environ["wsgi.input"]
    if isinstance(source, Remembered):
        source.again()
    return source


class Wish(enum.Enum):
    """Whether the answer to a request is sure to be an event stream, should it succeed."""

    YES = enum.auto()
    NO = enum.auto()
    BODY = enum.auto()  # if its body says so


def wish_for_events(method: str, path: str, query: str | None, accept: str) -> Wish:
    """What the request says of it without its body. Only if it is sure may the relay answer before the upstream has.

    `path` is the upstream's, raw; `query` is raw.
    """
    accepts = {item.partition(";")[0].strip().lower() for item in accept.split(",")}
    path = f"/{path}"
    if path.endswith(_OTHER_STREAMS):
        return Wish.NO
    if sse.MEDIA_TYPE in accepts:
        return Wish.NO if "application/json" in accepts else Wish.YES
    if method == "GET" and _RESUMED.search(path):
        return Wish.YES if _last(query, "stream") == "true" else Wish.NO
    if method != "POST":
        return Wish.NO
    if path.endswith(":streamGenerateContent"):
        return Wish.YES if _last(query, "alt") == "sse" else Wish.NO
    return Wish.BODY if path.endswith(_STREAMING_PATHS) else Wish.NO


def _last(query: str | None, name: str) -> str | None:
    return dict(parse_qsl(query or "")).get(name)
