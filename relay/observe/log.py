"""The relay's log: one JSON line for each request, when it has ended. Never a prompt, key, cookie or query value.

A mounted relay logs to the logger `relay`, at level INFO, and its app decides what becomes of that. The service writes
its lines to standard output itself, each with one call: lines of several workers do not mix, and the logging module
would cost more than all the rest of a line.
"""

from __future__ import annotations

import json
import logging
import os
import select
import stat
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from relay.observe.metrics import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.errors import RelayError
    from relay.record import Record

logger = logging.getLogger("relay")


def app_fault(message: str, *arguments: object) -> None:
    """Log what somebody must learn, with the exception that is being handled: on standard error where the app has
    disabled the logger, as `dictConfig` does unless told otherwise."""
    if logger.isEnabledFor(logging.ERROR):
        logger.error(message, *arguments, exc_info=sys.exc_info()[0] is not None)
        return
    sys.stderr.write(f"relay: {message % arguments}\n")
    if sys.exc_info()[0] is not None:
        traceback.print_exc()


_encode = json.JSONEncoder(separators=(", ", ": ")).encode


#: Bytes that a pipe with room for any takes at once, so that they neither wait nor mix with others' (POSIX, PIPE_BUF).
_LONGEST = select.PIPE_BUF - 200
#: Characters that are left of each field of a longer line. JSON takes up to twelve bytes for one.
_CUTS = (200, 20)


def _within(line: dict[str, Any], form: Callable[[dict[str, Any]], str]) -> str:
    """A line in its form, its long fields cut if a pipe would not take it at once: whatever a client or an upstream has
    put there, it is no longer than this."""
    text = form(line)
    for cut in _CUTS:
        if len(text) <= _LONGEST // 4 or len(text.encode()) <= _LONGEST:
            break
        text = form({name: value[:cut] if isinstance(value, str) else value for name, value in line.items()})
    return text


def _to_logger(line: dict[str, Any]) -> None:
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", _within(line, _encode))


_emit: Callable[[dict[str, Any]], None] = _to_logger


def _room(descriptor: int) -> Callable[[], bool]:
    """Whether a line can be written without waiting. A reader that stands still must not stop the streams.

    Under gevent `select.poll` gives way to other greenlets, and a line's place in the log with it: its own is used.
    """
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)):
        return lambda: True  # files have no readers to wait for
    poll: Any = getattr(select, "poll", None)
    if "gevent.monkey" in sys.modules:
        poll = sys.modules["gevent.monkey"].get_original("select", "poll")
    poller = poll()
    poller.register(descriptor, select.POLLOUT)
    return lambda: bool(poller.poll(0))


class _Output:
    """Lines to a file descriptor. One that cannot be written is counted, and reported when one can be again: a full
    disk must not end a stream, and a reader that stands still must not stop one."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._format = for_people if os.isatty(descriptor) else _encode
        self._lost = 0
        self._has_room = _room(descriptor)

    def __call__(self, line: dict[str, Any]) -> None:
        data = self._bytes(line)
        if self._lost:
            data = self._bytes({"event": "log_lines_lost", "lines": self._lost}) + data
        try:
            written = self._has_room()
            if written:
                os.write(self._descriptor, data)
        except OSError:
            written = False
        if written:
            self._lost = 0
        else:
            self._lost += 1
            metrics().log_line_lost()

    def _bytes(self, line: dict[str, Any]) -> bytes:
        return (_within(line, self._format) + "\n").encode()


def for_people(line: dict[str, Any]) -> str:
    """A line as a person in front of a terminal wants it."""
    at = time.strftime("%H:%M:%S")
    if line["event"] == "refused":
        return f"{at}  {line['method']:<7} {line['status']} refused: {line['reason']}  ({line['request_id']})"
    if line["event"] != "request":
        return f"{at}  {line['event']}: " + ", ".join(
            f"{value}" if name == "message" else f"{name} {value}"
            for name, value in line.items()
            if name not in ("event", "worker")
        )
    first = "no first byte" if line["first_byte_ms"] is None else f"first byte {line['first_byte_ms']:.0f} ms"
    return (
        f"{at}  {line['method']:<7} {line['status']} {line['reason']}: {line['total_ms'] / 1000:.1f} s, {first}, "
        f"{line['events']} events, {line['bytes']} bytes  ({line['request_id']})"
    )


def to_standard_output() -> None:
    """From now on, in this process, lines go to standard output: as JSON, or for people if it is a terminal."""
    global _emit  # noqa: PLW0603 - a process has one log
    _emit = _Output(1)


def event(name: str, **what: object) -> None:
    """A line about the service itself."""
    _emit({"event": name, **what, "worker": os.getpid()})


def fault(error: Exception, doing: str, request_id: str) -> None:
    """The traceback of an exception that nothing was prepared for; `doing`: at what it came up."""
    logger.error("a fault of the relay's while %s (request %s)", doing, request_id, exc_info=error)


def refused(error: RelayError, request_id: str, method: str, client: str, route: str) -> None:
    """The line of a request that the relay answered itself, before it would have become a stream."""
    _emit(
        {
            "event": "refused",
            "request_id": request_id,
            "client": client,
            "method": method,
            "route": route,
            "status": error.status,
            "reason": error.code,
            "worker": os.getpid(),
        }
    )


def ended(record: Record) -> None:
    """The line of a request that has ended, or that has found no slot."""
    _emit(
        {
            "event": "refused" if record.status and not record.admitted else "request",
            "request_id": record.request_id,
            "client": record.client,
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "reason": record.reason,
            "first_byte_ms": None if record.first_byte is None else round(record.first_byte * 1000, 1),
            "total_ms": round(record.seconds * 1000, 1),
            "bytes": record.bytes,
            "events": record.events,
            "heartbeats": record.heartbeats,
            "longest_gap_ms": round(record.longest_gap * 1000, 1),
            "upstream": record.upstream_host,
            "upstream_request_id": record.upstream_request_id,
            "worker": os.getpid(),
        }
    )
