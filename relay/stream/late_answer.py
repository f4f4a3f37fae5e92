"""An answer that comes after a hold and is not called an event stream: whether it is one, else what it says."""

from __future__ import annotations

import base64
import codecs
import email.utils
import time
import zlib
from typing import TYPE_CHECKING

from relay import errors
from relay.llm.answer import failure, failure_in_body

if TYPE_CHECKING:
    from relay.wire.http1 import Head

#: Bytes of its body that are told.
_MOST = 64 * 1024
#: Seconds for the body of a failure, whose status says most of it.
_FOR_A_FAILURE = 5.0
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
#: What the first line of an event stream can begin with (HTML standard, 9.2.5).
_BEGINNINGS = (b"data:", b"event:", b"id:", b"retry:", b":")


class LateAnswer:
    """Its body as it comes. `give_up`: monotonic seconds, when it is waited for no longer."""

    __slots__ = ("_plain", "body", "broken", "give_up", "head", "is_events", "whole")

    def __init__(self, head: Head, now: float) -> None:
        self.head = head
        self.body = b""
        self.whole = False
        self.broken = ""  # why there is no more of it
        self.is_events = False
        self.give_up = now + _FOR_A_FAILURE if head.status >= 400 else float("inf")
        self._plain = head.fields.get("content-encoding", "identity").strip().lower() == "identity"

    def feed(self, data: bytes) -> bool:
        """Take the next bytes, b"" for the end. False: no more are wanted."""
        self.body += data
        if not data:
            self.whole = True
            return False
        if self.head.status == 200 and self._plain:
            self.is_events = self.body.removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n").startswith(_BEGINNINGS)
        return self.is_events or len(self.body) <= _MOST

    def error(self) -> errors.UpstreamSaid:
        """What the client is told: the upstream's own words, or its whole answer."""
        status, content_type = self.head.status, self.head.fields.get("content-type", "")
        error = failure_in_body(self.body if self._plain else _inflated(self.body), status, content_type)
        if status < 400:
            error.answer = self._answer(content_type)
            if self.broken:
                error.message += f"; {self.broken}"
        elif self._plain and content_type.lower().startswith("text/plain"):
            text = self.body.decode("utf-8", "replace")
            if not text.lstrip().startswith("{"):
                error = failure(None, text, status)
        if error.code == errors.UpstreamSaid.code:  # it named none
            error.code = errors.UpstreamFailed.code
        if error.message == f"the upstream answered {status}" and self.head.reason:
            error.message += f" {self.head.reason}"
        error.retry_after = _seconds(self.head.fields.get("retry-after", ""))
        return error

    def _answer(self, content_type: str) -> dict[str, object]:
        told: dict[str, object] = {"status": self.head.status, "type": content_type}
        if not self._plain:
            told["encoding"] = self.head.fields["content-encoding"]
        body = self.body[:_MOST]
        whole = self.whole and len(body) == len(self.body)
        try:
            told["body"] = codecs.getincrementaldecoder("utf-8")().decode(body, whole)
        except UnicodeDecodeError:
            told["body_base64"] = base64.b64encode(body).decode()
        if not whole:
            told["truncated"] = True
        return told


def _inflated(body: bytes) -> bytes:
    """What stands in a body that an upstream has compressed although it was asked not to (gzip or deflate), no more of
    it than is told; b"" for any other coding."""
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, _MOST)
    except zlib.error:
        return b""


def _seconds(retry_after: str) -> int | None:
    """`Retry-After` in seconds from now, which may also be a date (RFC 9110 section 10.2.3)."""
    if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10:
        return int(retry_after)
    try:
        return max(0, round(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()))
    except (ValueError, OverflowError):
        return None
