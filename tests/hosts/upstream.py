"""An upstream that runs on a host of the lab: `python upstream.py ADDRESS PORT`.

A request's JSON body, or its query if it is a GET, says how it is answered: `id`, `seconds` (the length of the stream)
and `every` (between two events). A line of JSON on standard output reports each request (`billed`) and each stream's
end: `done`, or `gone` when its peer has closed the connection or vanished. A line `release` on standard input ends all
open streams with `[DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_MODELS = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{"data":[]}'
_BACKLOG = 4096  # connections that may arrive at once
_IDLE = 30.0  # seconds until one without a request is closed: its peer may have vanished


def say(**what: Any) -> None:
    print(json.dumps(what | {"at": time.monotonic()}), flush=True)


class Upstream:
    def __init__(self) -> None:
        self._release = asyncio.Event()

    def release(self) -> None:
        self._release.set()
        self._release = asyncio.Event()  # for the streams to come

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection with its requests."""
        peer = writer.get_extra_info("peername")[0]
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            while True:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _IDLE)
                target = urlsplit(head.split(b" ")[1].decode())
                if head.startswith(b"POST"):
                    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                    asked = json.loads(await reader.readexactly(int(fields[b"content-length"])))
                elif target.query:
                    texts = dict(parse_qsl(target.query))
                    asked = texts | {name: float(texts[name]) for name in ("seconds", "every")}
                else:
                    writer.write(_MODELS)  # the relay's probe
                    continue
                say(event="billed", id=asked["id"], peer=peer)
                end = await self._answer(asked, reader, writer)
                say(event="end", id=asked["id"], how=end)
                if end == "gone":
                    break
        writer.transport.abort()

    async def _answer(self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(_HEAD)
        until = time.monotonic() + asked["seconds"]
        released = asyncio.create_task(self._release.wait())
        closed = asyncio.create_task(reader.read(1))  # the peer sends nothing while it is answered
        number = 0
        try:
            while not released.done() and (left := until - time.monotonic()) > 0:
                _event(writer, f'{{"n":{number}}}')
                number += 1
                await asyncio.wait(
                    {released, closed}, timeout=min(asked["every"], left), return_when=asyncio.FIRST_COMPLETED
                )
                if closed.done() or writer.is_closing():
                    return "gone"
        finally:
            released.cancel()
            closed.cancel()
            await asyncio.gather(released, closed, return_exceptions=True)
        _event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        return "done"


def _event(writer: asyncio.StreamWriter, data: str) -> None:
    text = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(text), text))


async def main(address: str, port: int) -> None:
    upstream = Upstream()
    await asyncio.start_server(upstream.serve, address, port, backlog=_BACKLOG)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    say(event="ready")
    while line := await commands.readline():  # the end of it: the test is over
        if line == b"release\n":
            upstream.release()
    os._exit(0)  # whatever is still open


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
