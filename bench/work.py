"""The work that everybody is given, as bytes: what a stream of the upstream looks like, and how a client asks for one.

No input or output. The upstream and the client that checks it both build on this, so a byte that a relay has changed
is a difference to what stands here. An event is an OpenAI chat chunk, since some relays parse it; its content carries
the event's number and the time at which it was sent.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

PATH = "/v1/chat/completions"

_CHUNK = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench","choices":['
)
#: Bytes before an event's number, and between it and the time.
BEFORE = _CHUNK + b'{"index":0,"delta":{"content":"i='
BETWEEN = b" t="
#: Digits of an event's number and of the time in it (monotonic nanoseconds; 0 in a stream that does not wait).
NUMBER, TIME = 7, 19
_AFTER = b'"},"finish_reason":null}]}\n\n'
#: Words of a model are of many lengths, and so are the chunks that carry them. The shortest event has 256 bytes, so
#: that the sizes of all have three digits.
LENGTHS = 32
_SHORTEST = 256
#: Bytes of a large event.
LARGE = 64 * 1024
#: Bytes after the time, by the event's number modulo LENGTHS. 7 has no factor in common with it: neighbours differ.
AFTER = [
    b" " + b"x" * (_SHORTEST + i * 7 % LENGTHS - len(BEFORE) - NUMBER - len(BETWEEN) - TIME - 1 - len(_AFTER)) + _AFTER
    for i in range(LENGTHS)
]
#: Offsets in an event.
NUMBER_AT = len(BEFORE)
TIME_AT = NUMBER_AT + NUMBER + len(BETWEEN)
AFTER_AT = TIME_AT + TIME
EVENT = [AFTER_AT + len(after) for after in AFTER]

END = _CHUNK + b'{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'

#: Finds the events in a stream that somebody has framed anew.
MARK = re.compile(rb"i=(\d{%d}) t=(\d{%d}) " % (NUMBER, TIME))
DONE = b"[DONE]"

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n"
)
_CHUNK_HEAD = [b"%x\r\n" % length for length in EVENT]
_BEFORE_CHUNK = [head + BEFORE for head in _CHUNK_HEAD]
_AFTER_CHUNK = [after + b"\r\n" for after in AFTER]
END_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(END), END)


def event_chunk(number: int, now: int) -> bytes:
    """An event as the upstream writes it."""
    kind = number % LENGTHS
    return b"%s%07d t=%019d%s" % (_BEFORE_CHUNK[kind], number, now, _AFTER_CHUNK[kind])


@lru_cache(maxsize=2)
def flood_chunks(events: int) -> list[bytes]:
    """A stream that does not wait, as it goes over the wire after its head."""
    return [*(event_chunk(number, 0) for number in range(events)), END_CHUNK]


@lru_cache(maxsize=1)
def large_chunk() -> bytes:
    """An event of 64 KiB: one that brings a picture, say."""
    event = BEFORE + b"x" * (LARGE - len(BEFORE) - len(_AFTER)) + _AFTER
    return b"%x\r\n%s\r\n" % (len(event), event)


@lru_cache(maxsize=2)
def flood_body(events: int) -> bytes:
    """The same without its framing."""
    chunks = flood_chunks(events)[:-1]
    return b"".join([*(chunk[len(_CHUNK_HEAD[0]) : -2] for chunk in chunks), END])


_ENDS = list(accumulate(EVENT))


def events_in(size: int) -> int:
    """How many whole events stand in so many bytes of a body."""
    rounds, rest = divmod(size, _ENDS[-1])
    return rounds * LENGTHS + bisect_right(_ENDS, rest)


def start_of(number: int) -> int:
    """Where an event begins in a body."""
    rounds, rest = divmod(number, LENGTHS)
    return rounds * _ENDS[-1] + (_ENDS[rest - 1] if rest else 0)


@dataclass(frozen=True)
class Plan:
    """What a client asks the upstream for."""

    name: str
    events: int = 0  # 0: until the upstream is told to finish
    gap_us: int = 0  # microseconds from one event to the next; 0: as fast as they can be written
    blocks: bool = False  # then: many in one write, and not each in one of its own
    spread: bool = False  # the first event comes at a time of this stream's own within a gap, and not at once
    close: bool = False  # the upstream closes the connection after the stream
    large: bool = False  # without gaps: each event has 64 KiB

    def wish(self, at_us: int = -1) -> str:
        """What the upstream finds in the request, wherever it stands. `at_us` as in `request`."""
        at_us = at_us if self.spread else -1
        pouring = 2 if self.large else int(self.blocks)
        return f"bench:{self.events:07d},{self.gap_us:07d},{at_us:07d},{self.close:d},{pouring};"

    def request(self, port: int, at_us: int) -> bytes:
        """The request on the wire. `at_us`: the stream's own time within a gap, for `spread`."""
        message = {"role": "user", "content": self.wish(at_us)}
        body = json.dumps({"model": "bench", "stream": True, "messages": [message]}, separators=(",", ":"))
        return (
            f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer sk-bench\r\n"
            "Accept: text/event-stream\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()


WISH = re.compile(rb"bench:(\d+),(\d+),(-?\d+),(\d),(\d);")
