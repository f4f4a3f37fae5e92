"""Whether an answer is what the upstream sent, byte by byte while it comes in, and when each of its events was sent.

No input or output. An answer that is not verbatim is read on by its events' marks: one that was only framed anew still
has all of them, in order, and its end.
"""

from __future__ import annotations

from bench import work

#: What became of a stream. All but the first two are faults; CHANGED has all events and an end, but other bytes.
OK, CHANGED, LOST, CUT, REFUSED, FAILED = "ok", "changed", "lost", "cut", "refused", "failed"

#: Bytes of a stream framed anew in which a mark may have begun: more than a mark has.
_KEPT = 64
_NONE: list[int] = []


class Chunks:
    """The framing of a chunked body. `feed` takes bytes off the wire and gives the body's; `over` after its last."""

    __slots__ = ("_left", "_line", "over")

    def __init__(self) -> None:
        self._left = 0  # bytes of the present chunk that are still to come, with the line end after them
        self._line = b""  # a size line that is not whole yet
        self.over = False

    def feed(self, raw: bytes) -> bytes:
        """Raises ValueError where there is no size."""
        if self._line:
            raw, self._line = self._line + raw, b""
        pieces = []
        at, end, left = 0, len(raw), self._left
        while at < end:
            if left == 0:
                eol = raw.find(b"\r\n", at)
                if eol < 0:
                    self._line = raw[at:]
                    break
                size = int(raw[at:eol], 16)
                if size == 0:
                    if raw.find(b"\r\n", eol + 2) < 0:  # the empty trailer
                        self._line = raw[at:]
                    else:
                        self.over = True
                    break
                left = size + 2
                at = eol + 2
            stop = at + left
            pieces.append(raw[at : max(at, min(stop - 2, end))])
            left = max(stop - end, 0)
            at = stop
        self._left = left
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Answer:
    """One answer. `feed` it what arrives, and `end` it when the connection does."""

    __slots__ = ("_at", "_chunks", "_done", "_flood", "_gap", "_loose", "_next", "_rest", "_wanted", "over",
                 "retry_after", "status")  # fmt: skip

    def __init__(self, wanted: int, flood: bytes | None = None) -> None:
        """`wanted`: how many events there must be, 0 for any number. `flood`: the body, if all of it is known."""
        self._wanted = wanted
        self._flood = flood
        self._at = 0  # bytes of `flood` that have come
        self._chunks: Chunks | None = None
        self._rest = b""  # what cannot be judged before more has come: of the head, then of the body
        self._loose = False  # not verbatim
        self._gap = False  # an event is missing, or out of order
        self._next = 0  # the number of the event that must come next
        self._done = False  # the stream's end has come, and nothing after it
        self.status = 0
        self.retry_after = False  # it says when to come again
        self.over = False  # nothing more is to come

    @property
    def events(self) -> int:
        """How many have come."""
        return self._next if self._flood is None else min(work.events_in(self._at), self._wanted)

    @property
    def verdict(self) -> str:
        if self.status == 0:
            return FAILED
        if self.status != 200:
            return REFUSED
        if not self.over:
            return CUT
        if not self._done or (self._wanted and self.events != self._wanted):
            return LOST
        return self.faulty or OK

    @property
    def faulty(self) -> str:
        """What is wrong with what has come so far; empty: nothing."""
        if self._gap:
            return LOST
        return CHANGED if self._loose else ""

    def feed(self, raw: bytes) -> list[int]:
        """Take bytes off the wire. Gives the times at which the events that they complete were sent."""
        if self.status == 0:
            raw = self._read_head(raw)
            if not raw:
                return _NONE
        chunks = self._chunks
        if chunks is None:
            body = raw
        else:
            try:
                body = chunks.feed(raw)
            except ValueError:
                self._gap = self.over = True
                return _NONE
            self.over = chunks.over
        if self._flood is not None:
            return self._check_flood(body)
        if self._rest:
            body = self._rest + body
        times = self._read_marks(body) if self._loose else self._check(body)
        if self.over and self._rest and not self._loose:
            times += self._give_up()
        return times

    def end(self) -> list[int]:
        """The connection has ended. Gives the same as `feed`, for what could not be judged before."""
        if not self.status or self._chunks is not None:
            return _NONE
        self.over = True
        return self._give_up() if self._rest and not self._loose else _NONE

    def _read_head(self, raw: bytes) -> bytes:
        """Take the head off; gives what comes after it."""
        raw = self._rest + raw
        head, found, body = raw.partition(b"\r\n\r\n")
        if not found:
            self._rest = raw
            return b""
        self._rest = b""
        self.status = int(head[9:12])
        head = head.lower()
        if b"\r\ntransfer-encoding: chunked" in head:
            self._chunks = Chunks()
        if self.status != 200:
            self.retry_after = b"\r\nretry-after: " in head
            self.over = True
            return b""
        return body

    def _check(self, body: bytes) -> list[int]:
        """Take events that must be as they were sent."""
        times = []
        at, size, number = 0, len(body), self._next
        while at < size:
            kind = number % work.LENGTHS
            stop = at + work.EVENT[kind]
            if (
                stop <= size
                and body.startswith(work.BEFORE, at)
                and body.startswith(b"%07d t=" % number, at + work.NUMBER_AT)
                and body.startswith(work.AFTER[kind], at + work.AFTER_AT)
                and (time := body[at + work.TIME_AT : at + work.AFTER_AT]).isdigit()
            ):
                times.append(int(time))
                number += 1
                at = stop
            elif at + len(work.END) == size and body.startswith(work.END, at) and not self._done:
                self._done = True
                at = size
            else:
                # Not whole yet, unless there are bytes enough for whatever could stand here.
                self._loose = self._done or size - at >= max(work.EVENT[kind], len(work.END))
                break
        self._next = number
        self._rest = body[at:]
        if self._loose:
            times += self._give_up()
        return times

    def _give_up(self) -> list[int]:
        """What is left is no event as it was sent: from now on look for marks."""
        self._loose = True
        return self._read_marks(self._rest)

    def _check_flood(self, body: bytes) -> list[int]:
        flood = self._flood or b""
        if flood.startswith(body, self._at):
            self._at += len(body)
            self._done = self._at == len(flood)
            return _NONE
        self._loose = True
        self._next = self.events
        self._flood = None
        return self._read_marks(flood[work.start_of(self._next) : self._at] + body)

    def _read_marks(self, body: bytes) -> list[int]:
        """Take events by their marks, whatever stands around them."""
        times = []
        at = 0
        for mark in work.MARK.finditer(body):
            number = int(mark[1])
            self._gap = self._gap or number != self._next
            self._next = number + 1
            times.append(int(mark[2]))
            at = mark.end()
        self._done = self._done or work.DONE in body
        self._rest = body[max(at, len(body) - _KEPT) :]
        return times
