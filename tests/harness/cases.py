"""Bodies to relay, and ways to cut them up for sending.

Our own cases are always there. Recorded streams and edge cases are read where they lie, in
`shared` beside the repo (or where RELAY_SHARED says), and are no part of the project; without
them there are none. No I/O beyond reading those files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness import REPO

End = Literal["clean", "abort"]

# A blank line in any mix of line ends; a CR LF is one end, not two.
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2,}")
_SHARED = Path(os.environ.get("RELAY_SHARED") or REPO.parent / "shared")


@dataclass(frozen=True)
class Case:
    """A response: its body in the pieces in which it was sent, and how it ended."""

    name: str
    pieces: tuple[bytes, ...]
    content_type: str = "text/event-stream"
    status: int = 200
    end: End = "clean"
    method: str = "POST"

    @cached_property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    @property
    def is_event_stream(self) -> bool:
        return self.content_type.partition(";")[0].strip().lower() == "text/event-stream"

    @property
    def headers(self) -> list[tuple[str | bytes, str | bytes]]:
        return [("Content-Type", self.content_type)] if self.content_type else []


def recorded() -> list[Case]:
    """The recorded streams of `../shared/streams`; none if it is not there."""
    index = _SHARED / "streams" / "index.json"
    if not index.is_file():
        return []
    cases = []
    for entry in json.loads(index.read_text()):
        body = (index.parent / entry["file"]).read_bytes()
        case = Case(
            entry["file"],
            (body,),
            entry["content_type"],
            entry["status"],
            method=entry["method"],
        )
        assert case.sha256 == entry["sha256"], f"{entry['file']} is not what its index says"
        cases.append(case)
    return cases


def edge_cases() -> list[Case]:
    """The cases of `../shared/edge-cases`; none if it is not there."""
    path = _SHARED / "edge-cases" / "cases.json"
    if not path.is_file():
        return []
    return [
        Case(entry["name"], tuple(_pieces(entry["chunks"])), end=entry["end"]) for entry in json.loads(path.read_text())
    ]


def _pieces(chunks: list[Any]) -> list[bytes]:
    """A chunk is hex; or [hex, [hex of a byte, times], hex]; or {"chunk": …, "times": n}."""
    pieces: list[bytes] = []
    for chunk in chunks:
        if isinstance(chunk, dict):
            pieces += _pieces([chunk["chunk"]]) * chunk["times"]
        elif isinstance(chunk, list):
            before, (byte, times), after = chunk
            pieces.append(bytes.fromhex(before) + bytes.fromhex(byte) * times + bytes.fromhex(after))
        else:
            pieces.append(bytes.fromhex(chunk))
    return pieces


def at_event_boundary(body: bytes) -> bool:
    """Whether an event stream that stands here has nothing begun: a frame may follow.

    True at the start and after a blank line (WHATWG HTML section 9.2.6).
    """
    if not body:
        return True
    lines = re.split(rb"\r\n|\n|\r", body)
    # What follows the last line end is empty, and so is the line before it.
    return len(lines) >= 2 and lines[-1] == lines[-2] == b""


# Ways to send a body


def whole(body: bytes) -> list[bytes]:
    return [body] if body else []


def by_events(body: bytes) -> list[bytes]:
    """Cut after each run of blank lines."""
    cuts = [0, *(match.end() for match in _BLANK_LINE.finditer(body)), len(body)]
    return [body[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def at_random(body: bytes, seed: int, most: int = 40) -> list[bytes]:
    """At most `most` pieces, cut where the seed says; close cuts are as likely as far ones."""
    rng = random.Random(seed)
    cuts = {rng.randrange(len(body) + 1) for _ in range(rng.randrange(most))}
    cuts |= {cut + rng.randrange(1, 4) for cut in list(cuts)[: most // 4]}
    marks = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    return [body[a:b] for a, b in itertools.pairwise(marks) if a < b]


def by_bytes(body: bytes) -> list[bytes]:
    return [body[i : i + 1] for i in range(len(body))]
