"""HTTP/1.1 responses as bytes: the head, and the framing of the body (RFC 9112).

No input or output. What a recipient may guess at is refused here instead: a relay that passes on a response whose
length two readers understand differently lets one of them smuggle (RFC 9112 section 6.3). Nothing that the peer
declares is allocated before it has arrived.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Longest response head, all interim ones left out: eight times what nginx takes by default (proxy_buffer_size).
MAX_HEAD = 256 * 1024
#: Most fields of a head. Looking one up joins its repetitions, which costs the square of their number; http.client
#: takes 100, Node 2000.
MAX_FIELDS = 1000
#: Longest chunk-size line with its extensions, and longest trailer section; Go's net/http and llhttp are as tight.
MAX_CHUNK_LINE = 4096
MAX_TRAILER = 64 * 1024

_HEAD_END = re.compile(rb"\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\r\n\0]*))?\r?")
# One CR belongs to the line's end; any other is malformed (RFC 9112 section 2.2), as are a folded line (section 5.2)
# and a space before the colon.
_FIELD_LINE = re.compile(r"^([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n", re.MULTILINE)
# Field values keep their bytes (latin-1 here), but no control character: gunicorn refuses to send one, and CR, LF and
# NUL must not be passed on (RFC 9110 section 5.5).
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# A line may end with a bare LF, as in the head, but not one with an extension: some readers take a bare LF for a part
# of the extension, and see other chunks than those who do not.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:\r?|;[^\r\n]*\r)")

#: Whole size lines that have come before, to the sizes that they stand for: an upstream's events are of few lengths,
#: and looking a line up takes a quarter of the time of reading it. Emptied when it has grown to so many.
_KNOWN_SIZES: dict[bytes, int] = {}
_MOST_KNOWN_SIZES = 4096
_LONGEST_KNOWN_LINE = 10  # bytes: sizes of eight digits


class BadResponse(ValueError):
    """The peer's bytes are no HTTP/1 response, or one with contradictory framing. The text says which."""


class Truncated(ValueError):
    """The connection ended before the body did."""


class Framing:
    """How a body is delimited. `feed` takes bytes off the wire and gives the body's; `done` after its last one."""

    __slots__ = ("done", "excess", "fault")

    def __init__(self, *, done: bool = False) -> None:
        self.done = done
        #: Bytes followed the end of the body: nothing asked for them, so the connection is of no more use.
        self.excess = False
        #: What is wrong behind the bytes that `feed` gave last. They are sound; `end` and the next bytes raise it. The
        #: words and no error: one that is kept and raised holds the frames that it came through, and they hold this.
        self.fault: str | None = None

    def feed(self, data: bytes) -> bytes:
        raise NotImplementedError

    def end(self) -> None:
        """The connection has ended. Raises Truncated if the body had not."""
        if self.fault is not None:
            raise BadResponse(self.fault)
        if not self.done:
            raise Truncated


class NoBody(Framing):
    """The answer to a HEAD, a 1xx, a 204 and a 304 end with their head, whatever its fields say."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(done=True)

    def feed(self, data: bytes) -> bytes:
        self.excess = self.excess or bool(data)
        return b""


class UntilClose(Framing):
    """A body that the end of the connection ends: whether it is whole, nobody can tell."""

    __slots__ = ()

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.done = True


class Length(Framing):
    """A body of so many bytes (Content-Length)."""

    __slots__ = ("_left",)

    def __init__(self, length: int) -> None:
        super().__init__(done=length == 0)
        self._left = length

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            data = data[: self._left]
            self.excess = True
        self._left -= len(data)
        self.done = self._left == 0
        return data


class Chunked(Framing):
    """A body in chunks (RFC 9112 section 7.1). Extensions and trailers are dropped, as WSGI cannot carry them."""

    __slots__ = ("_left", "_pending", "_state", "_trailer")

    def __init__(self) -> None:
        super().__init__()
        self._state = _SIZE
        self._left = 0  # bytes of the present chunk that have not come yet
        self._pending = b""  # a line that is not whole yet
        self._trailer = 0  # bytes of trailer so far

    def feed(self, data: bytes) -> bytes:
        """Raises BadResponse where the bytes are no chunked body."""
        position, end = 0, len(data)
        body: list[bytes] = []
        # Whole chunks of a known length: nearly all that ever comes. What is left goes the long way.
        if self._state == _SIZE and not self._pending:
            while position < end:
                start = data.find(b"\n", position) + 1
                size = _KNOWN_SIZES.get(data[position:start])
                if size is None:
                    break
                stop = start + size
                if data[stop : stop + 2] != b"\r\n":
                    self._state, self._left, position = _DATA, size, start
                    break
                if stop + 2 == end and not body:
                    return data[start:stop]
                body.append(data[start:stop])
                position = stop + 2
        elif self._state == _DATA and end < self._left:
            self._left -= end
            return data
        if position < end:
            self._feed(data[position:] if position else data, body)
        return body[0] if len(body) == 1 else b"".join(body)

    def _feed(self, data: bytes, body: list[bytes]) -> None:
        """Take bytes of any kind and add to `body` what is its."""
        if self.fault is not None:
            raise BadResponse(self.fault)
        if self._pending:
            data = self._pending + data
            self._pending = b""
        position, end = 0, len(data)
        try:
            while position < end and not self.done:
                if self._state == _DATA:
                    piece = data[position : position + self._left]
                    body.append(piece)
                    position += len(piece)
                    self._left -= len(piece)
                    if self._left == 0:
                        self._state = _DATA_END
                    continue
                newline = data.find(b"\n", position)
                if newline < 0:
                    self._keep(data[position:])
                    return
                self._line(data[position:newline])
                position = newline + 1
        except BadResponse as fault:
            self.fault, self._state = str(fault), _BROKEN
            if not body:  # what came before the fault goes out first: it is the upstream's, and the client's
                raise
        else:
            self.excess = self.excess or position < end

    def _keep(self, line: bytes) -> None:
        """Take the beginning of a line of the framing."""
        if self._state == _TRAILER:
            too_long = self._trailer + len(line) > MAX_TRAILER
        else:
            too_long = len(line) > (MAX_CHUNK_LINE if self._state == _SIZE else 1)
        if too_long:
            raise BadResponse("a chunk of the body has no sound end")
        if self._state == _TRAILER and len(line) > 2:
            # Dropped anyway; kept whole, a line that comes byte by byte would be searched from its start for each.
            self._trailer += len(line) - 2
            line = line[:2]
        self._pending = line

    def _line(self, line: bytes) -> None:
        """Take a line of the framing, without its LF."""
        if self._state == _SIZE:
            found = _CHUNK_SIZE.fullmatch(line)
            if found is None or len(line) > MAX_CHUNK_LINE:
                raise BadResponse("a chunk of the body has no sound size")
            self._left = size = int(found[1], 16)
            self._state = _DATA if size else _TRAILER
            if size and len(line) <= _LONGEST_KNOWN_LINE:
                if len(_KNOWN_SIZES) >= _MOST_KNOWN_SIZES:
                    _KNOWN_SIZES.clear()
                _KNOWN_SIZES[line + b"\n"] = size
        elif self._state == _DATA_END:
            if line not in (b"\r", b""):
                raise BadResponse("a chunk of the body is longer than it says")
            self._state = _SIZE
        elif line in (b"\r", b""):
            self.done = True
        else:
            self._trailer += len(line)
            if self._trailer > MAX_TRAILER:
                raise BadResponse("the trailer of the body is too long")


# What a chunked body's next byte belongs to.
_SIZE, _DATA, _DATA_END, _TRAILER, _BROKEN = range(5)


@dataclass(slots=True)
class Head:
    """The head of a response. Field values are latin-1 text, so that each byte is one character."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    framing: Framing
    #: Whether the peer means to keep the connection open after the body (RFC 9112 section 9.3).
    keeps_open: bool
    #: Fields that stand in the head once, lower case, for looking up; repeated ones joined with a comma.
    fields: dict[str, str] = field(repr=False)


def head_length(data: bytes | bytearray, searched: int = 0) -> int:
    """Length of the response head that `data` begins with, its blank line included; 0: not all there yet.

    `searched`: from where its end can be, if what is before was looked at already. Raises BadResponse if it is over
    MAX_HEAD, or if the bytes cannot become a response.
    """
    if not b"HTTP/1."[: len(data)] == data[:7]:
        raise BadResponse("it did not answer with HTTP/1")
    end = _HEAD_END.search(data, searched, MAX_HEAD)
    if end is None and len(data) >= MAX_HEAD:
        raise BadResponse(f"the head of its answer is over {MAX_HEAD // 1024} KiB")
    return end.end() if end else 0


def parse_head(head: bytes, method: str) -> Head:
    """The response head in `head` (as long as `head_length` said), as the answer to a request of `method`.

    Raises BadResponse for a malformed line and for framing that contradicts itself.
    """
    first, _, rest = head.decode("latin-1").partition("\n")
    status_line = _STATUS_LINE.fullmatch(first)
    if status_line is None:
        raise BadResponse("its status line is malformed")
    minor, status = status_line[1], int(status_line[2])
    reason = _CONTROL.sub("", status_line[3] or "").strip(" \t")
    lines = rest.count("\n") - 1  # the last one is blank
    if lines > MAX_FIELDS:
        raise BadResponse(f"the head of its answer has more than {MAX_FIELDS} fields")
    found = _FIELD_LINE.findall(rest)
    if len(found) != lines:
        raise BadResponse("a header line of its answer is malformed")
    headers: list[tuple[str, str]] = []
    fields: dict[str, str] = {}
    for name, value in found:
        value = value.rstrip(" \t")  # noqa: PLW2901 - what a field's value is
        headers.append((name, value))
        key = name.lower()
        fields[key] = f"{fields[key]}, {value}" if key in fields else value
    tokens = {token.strip().lower() for token in fields.get("connection", "").split(",")}
    keeps_open = "close" not in tokens and (minor == "1" or "keep-alive" in tokens)
    framing = _framing(fields, status, method, minor)
    if status == 204:
        # It must have no Content-Length (RFC 9110 section 8.6), and a reader that goes by it waits for a body.
        fields.pop("content-length", None)
    return Head(status, reason, headers, framing, keeps_open and not isinstance(framing, UntilClose), fields)


def _framing(fields: dict[str, str], status: int, method: str, minor: str) -> Framing:
    """How the body is delimited (RFC 9112 section 6.3, in its order)."""
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None:
        if length is not None:
            raise BadResponse("its answer has both Transfer-Encoding and Content-Length")
        if coding.lower() != "chunked" or minor != "1":
            raise BadResponse("its answer has a Transfer-Encoding other than chunked")
    size = 0
    if length is not None:
        # A list of equal values may be taken as one (RFC 9110 section 8.6).
        values = {value.strip(" \t") for value in length.split(",")}
        value = values.pop()
        if values or not value.isascii() or not value.isdigit() or len(value) > 18:
            raise BadResponse("its answer has contradictory or malformed Content-Length")
        size = int(value)
    if method == "HEAD" or status < 200 or status in (204, 304):
        return NoBody()
    if coding is not None:
        return Chunked()
    return Length(size) if length is not None else UntilClose()
