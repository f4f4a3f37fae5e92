"""One HTTP/1.1 request over a raw socket, and when each piece of its answer arrived.

A library would gather, decode or try again; here every arrival has its time, and the way in which the body ended is
part of the answer. Understands framing and nothing of what is in it.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from relay.version import __version__

Ended = Literal["clean", "cut", "waiting"]

_CONNECT = 10.0  # seconds for TCP and TLS, each
_MOST_HEAD = 128 * 1024
_MOST_INTERIM = 10
_MOST_BODY = 4 * 1024 * 1024  # ten times what any probe asks for
_STATUS_LINE = re.compile(rb"HTTP/(1\.[01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")


class Unreachable(Exception):
    """Nothing that speaks HTTP was reached; the text is a sentence."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to knock. `path` is what stands in front of every path asked for, without a slash at its end."""

    scheme: str
    host: str
    port: int
    path: str
    verify: bool = True

    @classmethod
    def parse(cls, url: str, *, verify: bool = True) -> Target:
        """Raises ValueError with a sentence."""
        if not re.match("https?://", url, re.IGNORECASE):
            raise ValueError("it must begin with http:// or https://")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
            name = (host or "").encode("idna").decode() if not (host or "").isascii() else host or ""
        except ValueError as error:
            raise ValueError(f"it is no URL: {error}") from None
        if not name:
            raise ValueError("it names no host")
        if parts.username is not None or parts.password is not None:
            raise ValueError("it holds a user name or password; a client key goes into --key or RELAY_CLIENT_KEY")
        if parts.query or parts.fragment or not re.fullmatch("[\x21-\x7e]*", parts.path):
            raise ValueError("it must be the relay's address and mount, without query, fragment and spaces")
        return cls(parts.scheme, name, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/"), verify)

    def at(self, path: str) -> Target:
        """The same server with another path."""
        return Target(self.scheme, self.host, self.port, path, self.verify)

    @property
    def authority(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == (443 if self.scheme == "https" else 80) else f"{name}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(slots=True)
class Answer:
    """What came back. Times are seconds since the request was sent.

    `ended`: `clean` (the framing is complete), `cut`, or `waiting`: it had not ended when patience was over.
    """

    status: int
    version: str
    headers: list[tuple[str, str]]
    head_at: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: Ended = "cut"
    delimited: bool = True  # its end does not need that of the connection
    ended_at: float = 0.0

    def header(self, name: str) -> str:
        """All values of a header, joined; empty if there is none."""
        return ", ".join(value for key, value in self.headers if key.lower() == name.lower())

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


def offers_http2(target: Target) -> bool:
    """Whether the TLS server chooses HTTP/2 when it may (RFC 7301). Raises Unreachable."""
    sock = _connect(target, ["h2", "http/1.1"])
    with sock:
        return isinstance(sock, ssl.SSLSocket) and sock.selected_alpn_protocol() == "h2"


def get(target: Target, path: str, headers: list[tuple[str, str]], *, patience: float) -> Answer:
    """GET a path below the target, and read its answer to the end.

    `patience`: seconds for all of the head, then seconds without any byte after which the body is not waited for any
    longer. Raises Unreachable if no answer begins.
    """
    with _connect(target, ["http/1.1"]) as sock:
        return _ask(sock, target, path, [("Connection", "close"), *headers], patience)


def idle_until_closed(
    target: Target, path: str, headers: list[tuple[str, str]], *, patience: float, most: float
) -> float | None:
    """Seconds for which the server keeps a connection after an answer, idle; None: for longer than `most`, or it does
    not keep any and says so. Raises Unreachable if no answer begins."""
    with _connect(target, ["http/1.1"]) as sock:
        answer = _ask(sock, target, path, headers, patience)
        said = answer.header("connection").lower()
        if answer.version != "HTTP/1.1" or "close" in said or answer.ended != "clean" or not answer.delimited:
            return None
        began = time.monotonic()
        sock.settimeout(most)
        try:
            sock.recv(1)  # no more than its end can come, or a 408 before it
        except TimeoutError:
            return None
        except OSError:  # a reset is an end too
            pass
        return time.monotonic() - began


def _ask(sock: socket.socket, target: Target, path: str, headers: list[tuple[str, str]], patience: float) -> Answer:
    lines = [
        f"GET {target.path}{path} HTTP/1.1",
        f"Host: {target.authority}",
        f"User-Agent: relay-doctor/{__version__}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    request = "\r\n".join([*lines, "", ""]).encode("latin-1")
    sock.settimeout(patience)
    began = time.monotonic()
    try:
        sock.sendall(request)
    except OSError as error:
        raise Unreachable(f"{target.authority} broke the connection off: {_why(error)}") from None
    return _read(sock, target, began)


def _connect(target: Target, protocols: list[str]) -> socket.socket:
    try:
        sock = socket.create_connection((target.host, target.port), _CONNECT)
    except socket.gaierror as error:
        raise Unreachable(f"there is no host called {target.host}: {error.strerror}") from None
    except TimeoutError:
        raise Unreachable(f"{target.authority} did not accept a connection within {_CONNECT:g} s") from None
    except OSError as error:
        raise Unreachable(f"{target.authority} does not accept connections: {_why(error)}") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if target.scheme == "http":
        return sock
    try:
        context = ssl.create_default_context()
        if not target.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(protocols)
        return context.wrap_socket(sock, server_hostname=target.host)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise Unreachable(
            f"the certificate of {target.authority} is not trusted: {error.verify_message}; SSL_CERT_FILE can name "
            "the authority's, --insecure goes on without"
        ) from None
    except OSError as error:
        sock.close()
        raise Unreachable(f"{target.authority} does not speak TLS: {_why(error)}; is it http://?") from None


def _why(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)


def _read(sock: socket.socket, target: Target, began: float) -> Answer:
    buffer, searched, interim = bytearray(), 0, 0
    patience = sock.gettimeout()
    deadline = began + (patience or _CONNECT)
    while (end := buffer.find(b"\r\n\r\n", searched)) < 0:
        if len(buffer) > _MOST_HEAD or interim > _MOST_INTERIM:
            raise Unreachable(f"{target.authority} does not speak HTTP/1.1: its headers have no end")
        searched = max(len(buffer) - 3, 0)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))  # for all of the head, however it dribbles
            data = sock.recv(65536)
        except TimeoutError:
            raise Unreachable(f"{target.authority} took the request and did not answer") from None
        except OSError as error:
            raise Unreachable(f"{target.authority} broke the connection off: {_why(error)}") from None
        if not data:
            raise Unreachable(
                f"{target.authority} closed the connection without an answer"
                + ("" if not buffer else "; it does not speak HTTP/1.1")
            )
        buffer += data
        if not b"HTTP/1."[: len(buffer)] == buffer[:7]:
            raise Unreachable(f"{target.authority} does not speak HTTP/1.1")
        while (end := buffer.find(b"\r\n\r\n", searched)) >= 0 and buffer[9:10] == b"1":
            del buffer[: end + 4]  # an interim answer, such as 103
            searched, interim = 0, interim + 1
    sock.settimeout(patience)
    line, *fields = bytes(buffer[:end]).split(b"\r\n")
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise Unreachable(f"{target.authority} does not speak HTTP/1.1")
    headers = []
    for one in fields:
        name, _, value = one.decode("latin-1").partition(":")
        headers.append((name.strip(), value.strip()))
    answer = Answer(int(match[2]), f"HTTP/{match[1].decode()}", headers, time.monotonic() - began)
    _body(sock, answer, bytes(buffer[end + 4 :]), began)
    return answer


def _body(sock: socket.socket, answer: Answer, data: bytes, began: float) -> None:
    """Read the body, as far as it comes."""
    framing = _framing(answer)
    answer.delimited = not framing.until_close
    size = 0
    at = answer.head_at
    while True:
        piece = framing.feed(data)
        if piece:
            size += len(piece)
            answer.pieces.append((at, piece))
        if framing.done or framing.broken or size > _MOST_BODY:
            answer.ended = "clean" if framing.done else "cut"
            break
        try:
            data = sock.recv(65536)
        except TimeoutError:
            answer.ended = "waiting"
            break
        except OSError:  # a reset, or a TLS end that was not said
            answer.ended = "cut"
            break
        at = time.monotonic() - began
        if not data:
            answer.ended = "clean" if framing.until_close else "cut"
            break
    answer.ended_at = time.monotonic() - began


def _framing(answer: Answer) -> _Framing:
    if "chunked" in answer.header("transfer-encoding").lower():
        return _Chunked()
    length = answer.header("content-length")
    if answer.status in (204, 304):
        length = "0"
    return _Plain(int(length) if length.isascii() and length.isdecimal() else None)


class _Framing:
    done = False
    broken = False
    until_close = False

    def feed(self, data: bytes) -> bytes:
        """Take what arrived; gives what of it is body."""
        raise NotImplementedError


class _Plain(_Framing):
    """With Content-Length, or until the connection ends."""

    def __init__(self, length: int | None) -> None:
        self._left = length
        self.until_close = length is None
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        if self._left is None:
            return data
        data = data[: self._left]
        self._left -= len(data)
        self.done = not self._left
        return data


class _Chunked(_Framing):
    """RFC 9112 section 7.1. What has arrived of a chunk counts at once."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        self._trailer = False

    def feed(self, data: bytes) -> bytes:
        self._buffer += data
        body = b""
        while self._buffer and not self.done and not self.broken:
            if self._left:
                piece = self._buffer[: self._left]
                self._left -= len(piece)
                self._buffer = self._buffer[len(piece) :]
                body += piece
                continue
            line, end, rest = self._buffer.partition(b"\r\n")
            if not end:
                break
            self._buffer = rest
            if self._trailer:
                self.done = not line
            elif line:  # else the line end after a chunk
                digits = line.partition(b";")[0].strip()
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits):
                    self.broken = True
                    break
                self._left = int(digits, 16)
                self._trailer = not self._left
        return body
