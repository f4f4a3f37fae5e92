"""Other work for the relay, beside the streams that bench.fairness measures. A process of its own, until told to end.

    python -m bench.beside KIND PORT

Ends when standard input does, and prints one JSON line: what it had the relay do. Reads answers and forgets them; what
is measured is the others.
"""

from __future__ import annotations

import json
import random
import select
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

from bench.work import PATH, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024 * 1024
#: Of the ordinary streams, here and in bench.fairness: microseconds from one event to the next.
GAP_US = 50_000
_MORE = 500
_READ = 256 * 1024
_PER_SECOND = 500
_TEXT = "/chat/stream"


class Beside:
    """What is done beside. `over` is set when it has to end."""

    def __init__(self, port: int) -> None:
        self._address = "127.0.0.1", port
        self.over = threading.Event()
        self.done: dict[str, int] = {}

    def streams(self, clients: int) -> None:
        """500 more streams of the ordinary kind, of so many clients (addresses)."""
        plan, chance = Plan("more", gap_us=GAP_US, spread=True), random.Random(5)
        epoll, open_ones, began = select.epoll(), {}, time.monotonic()
        while not self.over.is_set():
            while len(open_ones) < min(_MORE, (time.monotonic() - began) * _PER_SECOND):
                number = len(open_ones) % clients
                sock = socket.create_connection(self._address, 10, (f"127.0.{1 + number // 250}.{1 + number % 250}", 0))
                sock.sendall(plan.request(self._address[1], chance.randrange(0, GAP_US, 1000)))
                epoll.register(sock, select.EPOLLIN)
                open_ones[sock.fileno()] = sock
            for fd, _ in epoll.poll(0.02):
                if not open_ones[fd].recv(_READ):
                    epoll.unregister(fd)
                    self._count("ended")
        self._count("streams", len(open_ones))

    def reader(self, plan: Plan, path: str = PATH) -> None:
        """One client that reads a stream as fast as it comes, and asks for the next when it has ended."""
        body = json.dumps({"model": "bench", "stream": True, "messages": [{"role": "user", "content": plan.wish()}]})
        self._ask(path, body.encode())

    def poster(self, body: str, path: str = PATH, *, at_once: int = 1) -> None:
        """One client that posts bodies of 1 MiB, so many at once, each when the one before was answered."""
        others = [threading.Thread(target=self._ask, args=(path, body.encode()), daemon=True) for _ in range(at_once)]
        for each in others:
            each.start()
        for each in others:
            each.join()

    def _ask(self, path: str, body: bytes) -> None:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._address[1]}\r\nAuthorization: Bearer sk-bench\r\n"
            f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        while not self.over.is_set():
            with socket.create_connection(self._address, 10) as sock:
                try:
                    sock.sendall(head.encode() + body)
                except OSError:
                    pass  # refused before it was whole: the answer is there all the same
                self._read(sock)

    def _read(self, sock: socket.socket) -> None:
        status = ""
        try:
            while data := sock.recv(_READ):
                if not status:
                    status = data[9:12].decode()
                    self._count(status)
                self._count("bytes", len(data))
                if self.over.is_set():
                    return
        except OSError:
            self._count("broken")

    def _count(self, what: str, by: int = 1) -> None:
        self.done[what] = self.done.get(what, 0) + by


def _filled(before: str, piece: str, after: str) -> str:
    """1 MiB of JSON: as many pieces, with commas between them, as there is room for."""
    room = MIB - len(before) - len(after)
    return before + ",".join([piece] * (room // (len(piece) + 1))) + after


#: One event, so that what is left of a request is its body.
_ONE = json.dumps({"role": "user", "content": Plan("one", events=1, gap_us=1000).wish()})
_CHAT = f'{{"model":"bench","stream":true,"messages":[{_ONE},'
_MESSAGE = '{"role":"user","content":"Hello there"}'
_DEEP = (MIB - len(_CHAT) - 20) // 2
_MESSAGES = _filled(_CHAT, _MESSAGE, "]}")
_NESTED = f"{_CHAT}{'[' * _DEEP}{']' * _DEEP}]}}"
_MODELS = _filled(f'{_CHAT}{_MESSAGE}],"fallbacks":[', "[]", "]}")
_OTHER_VALUES = _filled(f'{{"prompt":"{Plan("one", events=1, gap_us=1000).wish()}","x":[', '{"a":[]}', "]}")
_FAST = Plan("fast", events=40_000, blocks=True)

#: By name: what it is for a person, and the work.
KINDS: dict[str, tuple[str, Callable[[Beside], None]]] = {
    "streams": ("500 more streams, one client", lambda it: it.streams(1)),
    "clients": ("500 more streams, 500 clients", lambda it: it.streams(_MORE)),
    "large": ("events of 64 KiB, as fast as they come", lambda it: it.reader(Plan("l", events=20_000, large=True))),
    "fast": ("events of 270 bytes, as fast as they come", lambda it: it.reader(_FAST)),
    "text": ("the same as plain text (/chat/stream)", lambda it: it.reader(_FAST, _TEXT)),
    "messages": ("1 MiB of messages, RELAY_MODELS", lambda it: it.poster(_MESSAGES)),
    "eight": ("the same, eight at once", lambda it: it.poster(_MESSAGES, at_once=8)),
    "nested": ("1 MiB of nested lists, RELAY_MODELS", lambda it: it.poster(_NESTED)),
    "models": ("1 MiB of lists of models, RELAY_MODELS", lambda it: it.poster(_MODELS)),
    "prompt": ("1 MiB of messages, /chat/stream", lambda it: it.poster(_MESSAGES, _TEXT)),
    "prompt-nested": ("1 MiB of nested lists, /chat/stream", lambda it: it.poster(_NESTED, _TEXT)),
    "prompt-values": ("1 MiB of other values, /chat/stream", lambda it: it.poster(_OTHER_VALUES, _TEXT)),
}


def main() -> None:
    kind, port = sys.argv[1:]
    it = Beside(int(port))
    worker = threading.Thread(target=KINDS[kind][1], args=(it,), daemon=True)
    began = time.monotonic()
    worker.start()
    sys.stdin.read()
    it.over.set()
    worker.join(5)
    print(json.dumps({**it.done, "seconds": time.monotonic() - began}))


if __name__ == "__main__":
    main()
