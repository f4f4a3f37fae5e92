"""Clients that run on a host of the lab: `python load.py ADDRESS PORT`.

Each line of JSON on standard input is a request to send at once, on a connection of its own: `id`, `key` (a client
key), `seconds` and `every` (see upstream.py), `feed` (a GET as an EventSource sends it, not a POST) and `within`,
the seconds after which the client gives up. Lines of JSON on standard output report its first byte of the body
(`first`) and its end:

    whole     a clean end after `data: [DONE]`
    silent    a clean end without it: truncated, and no client can see it
    framed    cut, or ended, with an error frame
    cut       no clean end, and no error frame
    refused   no connection, or another status than 200
    hanging   not over when the client gave up
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.client import Chunked

_MARK, _FRAME = b"data: [DONE]\n\n", b"event: error\n"


def say(**what: Any) -> None:
    print(json.dumps(what | {"at": time.monotonic()}), flush=True)


class Client:
    """One request and its answer."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked
        self._status = 0
        self._body = bytearray()
        self._framing = Chunked()

    async def play(self, address: str, port: int) -> None:
        name = self._asked["id"]
        say(event="begun", id=name)
        try:
            async with asyncio.timeout(self._asked["within"]):
                await self._exchange(address, port)
        except TimeoutError:
            how = "hanging"
        except (OSError, asyncio.IncompleteReadError):
            how = self._how()
        else:
            how = self._how()
        say(event="end", id=name, status=self._status, how=how, code=self._code())

    async def _exchange(self, address: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(address, port)
        try:
            asked = self._asked
            writer.write(self._request())
            head = await reader.readuntil(b"\r\n\r\n")
            self._status = int(head.split(b" ", 2)[1])
            if self._status != 200:
                self._body += await reader.read()
                return
            received = bytearray()
            while not self._framing.done and (data := await reader.read(65_536)):
                if not self._framing.sizes:
                    say(event="first", id=asked["id"])
                received += data
                del received[: self._framing.decode(received, self._body)]
        finally:
            writer.transport.abort()

    def _request(self) -> bytes:
        asked = self._asked
        wanted = {name: asked[name] for name in ("id", "seconds", "every")}
        line, more, body = f"GET /v1/feed?{urlencode(wanted)}", "Accept: text/event-stream", ""
        if not asked["feed"]:
            body = json.dumps({"stream": True, "model": "m", "messages": []} | wanted)
            line, more = "POST /v1/chat/completions", f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        return (
            f"{line} HTTP/1.1\r\nHost: relay.example\r\nAuthorization: Bearer {asked['key']}\r\n"
            f"X-Request-ID: {asked['id']}\r\nConnection: close\r\n{more}\r\n\r\n{body}"
        ).encode()

    def _how(self) -> str:
        if self._status != 200:
            return "refused"
        if self._framing.done and self._body.endswith(_MARK):
            return "whole"
        if _FRAME in self._body:
            return "framed"
        return "silent" if self._framing.done else "cut"

    def _code(self) -> str:
        """The code of the error, if there is one."""
        _, found, after = self._body.rpartition(b'"code":')
        return after.split(b'"')[1].decode() if found and after.count(b'"') > 1 else ""


async def main(address: str, port: int) -> None:
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    say(event="ready")
    playing = set()
    while line := await commands.readline():  # the end of it: the test is over
        task = asyncio.create_task(Client(json.loads(line)).play(address, port))
        playing.add(task)
        task.add_done_callback(playing.discard)
    os._exit(0)  # whatever is still open


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
