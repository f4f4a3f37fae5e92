"""The demo upstream: an OpenAI-compatible server on a free loopback port, for when no upstream is set.

It knows no language model: its answer is a text of its own, a word at a time, at the pace at which people read. It is
reached over a real connection like any other upstream, so what one sees with it is the relay's real path. Nothing
here knows the relay.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

MODEL = "relay-demo"

#: About 25 words a second: a little faster than one reads, slow enough to see each arrive.
_PAUSE = 1 / 25
#: Of the caller's last message at most so much is repeated.
_ECHO = 120
#: More than the relay lets through by default.
_MAX_BODY = 64 * 1024 * 1024

_lock = threading.Lock()
_running: tuple[int, str] | None = None


def start() -> str:
    """Start the server unless this process has it already, and give its base URL (`http://127.0.0.1:PORT/v1`).

    Threads may call it together; a forked process gets a server of its own.
    """
    global _running  # noqa: PLW0603 - one for each process is the point
    with _lock:
        if _running is None or _running[0] != os.getpid():
            server = _Server(("127.0.0.1", 0), _Handler)
            threading.Thread(target=server.serve_forever, name="relay-demo", daemon=True).start()
            _running = (os.getpid(), f"http://127.0.0.1:{server.server_address[1]}/v1")
        return _running[1]


# A fork while another thread holds the lock would leave the child with a lock that nobody releases.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _Refused(Exception):
    """An answer of OpenAI's error shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": "invalid_request_error", "param": param, "code": code},
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the host's name.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: what fails here is a connection that the other side has given up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 120  # an idle connection, in seconds

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing: the relay logs."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses (no HTTP, a method without a name below), as JSON."""
        self.close_connection = True
        self._send_json(int(code), _Refused(int(code), message or explain or HTTPStatus(code).phrase).body)

    def _answer(self) -> None:
        try:
            body = self._read_body()
            path = urlsplit(self.path).path.rstrip("/")
            allowed = "GET, HEAD" if path == "/v1/models" or path.startswith("/v1/models/") else "POST"
            if path != "/v1/chat/completions" and allowed == "POST":
                raise _Refused(404, f"Invalid URL ({self.command} {path})")
            if self.command not in allowed.split(", "):
                raise _Refused(405, f"{self.command} is not allowed on {path}, but {allowed}", "method_not_supported")
            if allowed == "POST":
                self._chat(body)
            else:
                self._models(path.removeprefix("/v1/models").lstrip("/"))
        except _Refused as refused:
            self._send_json(refused.status, refused.body)
        except OSError:  # the other side is gone, or said nothing for too long
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

    # --- what is asked for

    def _models(self, name: str) -> None:
        model = {"id": MODEL, "object": "model", "created": 1735689600, "owned_by": "relay"}
        if not name:
            self._send_json(200, {"object": "list", "data": [model]})
        elif name == MODEL:
            self._send_json(200, model)
        else:
            raise _Refused(404, f"The model '{name}' does not exist", "model_not_found", "model")

    def _chat(self, body: bytes) -> None:
        try:
            wanted = json.loads(body)
        except ValueError as error:
            raise _Refused(400, "We could not parse the JSON body of your request.") from error
        if not isinstance(wanted, dict):
            raise _Refused(400, "The JSON body of your request must be an object.")
        messages = wanted.get("messages")
        if messages is None:
            raise _Refused(400, "Missing required parameter: 'messages'.", "missing_required_parameter", "messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise _Refused(400, "Invalid 'messages': expected objects, at least one.", "invalid_type", "messages")

        asked = " ".join(text for message in messages for text in _texts(message))
        text = _text([text for message in messages if message.get("role") == "user" for text in _texts(message)])
        words = re.findall(r"\s*\S+", text)
        usage = {"prompt_tokens": len(asked.split()), "completion_tokens": len(words)}
        usage["total_tokens"] = sum(usage.values())
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL}

        if wanted.get("stream") is True:
            options = wanted.get("stream_options")
            counted = isinstance(options, dict) and options.get("include_usage") is True
            self._send_stream(_chunks(head, words, usage if counted else None))
            return
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        self._send_json(200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    # --- HTTP

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._read_chunked()
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal():
            self.close_connection = True
            raise _Refused(400, "Content-Length is no number.")
        if int(length) > _MAX_BODY:
            self.close_connection = True
            raise _Refused(413, "The request body is too large.")
        return self._read_exactly(int(length))

    def _read_chunked(self) -> bytes:
        pieces: list[bytes] = []
        total = 0
        while True:
            try:
                size = int(self.rfile.readline(100).split(b";")[0], 16)
            except ValueError as error:
                self.close_connection = True
                raise _Refused(400, "The request body is not chunked as it says.") from error
            total += size
            if total > _MAX_BODY:
                self.close_connection = True
                raise _Refused(413, "The request body is too large.")
            if size == 0:
                while self.rfile.readline(65536).strip():  # trailers, up to an empty line
                    pass
                return b"".join(pieces)
            pieces.append(self._read_exactly(size))
            self.rfile.readline(2)

    def _read_exactly(self, length: int) -> bytes:
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionResetError("gone in the middle of its request")
        return body

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("x-request-id", f"req_{uuid.uuid4().hex}")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send_json(self, status: int, value: object) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self._send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_stream(self, events: Iterable[str]) -> None:
        chunked = self.request_version != "HTTP/1.0"
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            self.close_connection = True
        self._send_head(200, headers)
        for event in events:
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
            if event != "[DONE]":
                self._pause(_PAUSE * random.uniform(0.5, 1.5))  # noqa: S311 - a pace is no secret
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _pause(self, seconds: float) -> None:
        """Wait, but not for a client that leaves: ConnectionResetError."""
        before = self.connection.gettimeout()
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError("the client has left")
        except TimeoutError:
            return
        finally:
            self.connection.settimeout(before)
        time.sleep(seconds)  # it has sent its next request already


def _chunks(head: dict[str, Any], words: list[str], usage: dict[str, int] | None) -> Iterator[str]:
    head = {**head, "object": "chat.completion.chunk"}
    # With include_usage every chunk has the field, and only the last one a value.
    tail: dict[str, Any] = {} if usage is None else {"usage": None}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return json.dumps({**head, "choices": [choice], **tail}, ensure_ascii=False)

    yield chunk({"role": "assistant", "content": "", "refusal": None})
    for word in words:
        yield chunk({"content": word})
    yield chunk({}, "stop")
    if usage is not None:
        yield json.dumps({**head, "choices": [], "usage": usage})
    yield "[DONE]"


def _texts(message: dict[str, Any]) -> Iterator[str]:
    """A message's text: a string, or the text parts of a list."""
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def _text(asked: list[str]) -> str:
    last = " ".join(asked[-1].split()) if asked else ""
    if len(last) > _ECHO:
        last = last[: _ECHO - 1].rstrip() + "…"
    said = f"You said: “{last}”. " if last else ""
    return (
        f"Hello from the relay’s demo upstream: no model, no account, no network. {said}"
        "Each of these words left here as an event of its own and came to you through the relay the moment it arrived. "
        "For a real model, set RELAY_UPSTREAM_URL to the base URL of an API, for example https://api.openai.com/v1, "
        "and start the relay again."
    )
