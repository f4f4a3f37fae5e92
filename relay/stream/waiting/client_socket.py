"""What a client's socket tells, and how it is broken off. Works on plain sockets and on gevent's."""

from __future__ import annotations

import _socket
import fcntl
import os
import socket
import ssl
import struct
import termios
import time
from typing import Any


def watchable(client: Any) -> bool:
    """Whether the client's going can be seen on this socket: not in TLS, where its bytes say nothing."""
    return client is not None and not isinstance(client, ssl.SSLSocket)


def gone(client: Any) -> bool | None:
    """True: the client has closed its side. False: nothing new. None: it sends more, so its end cannot be seen."""
    plain = getattr(client, "_sock", client)  # gevent's own would wait
    try:
        return None if plain.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) else True
    except BlockingIOError:
        return False
    except OSError:
        return True


def unsent(client: Any) -> int | None:
    """Bytes that the kernel holds for the client, not sent or not acknowledged; None: unknown."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(client.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    except (OSError, ValueError):
        return None


def unanswered(client: Any) -> float:
    """Seconds since the client's kernel has acknowledged anything, if it has been asked to since (tcp(7), TCP_INFO); 0:
    it owes no answer, or that is unknown.

    One whose window is closed owes none between two of the kernel's questions (RFC 9293 section 3.8.6.1), which come
    ever more rarely. TCP_USER_TIMEOUT would not count its answers.
    """
    try:
        info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK_RECEIVED + 4)
        retransmits, probes, in_flight, silent = _TCP_INFO.unpack_from(info)
    except (OSError, ValueError, AttributeError, struct.error):
        return 0.0
    return silent / 1000 if retransmits or probes or in_flight else 0.0


def close_with_reset(client: Any) -> None:
    """Make the connection end with a reset, and not with a FIN, when it is closed. What is unsent then is lost."""
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass


def cut(client: Any, *, reset: bool) -> None:
    """End the connection so that nothing more can be written to it, whoever tries: with a FIN, which ends a chunked or
    counted body too early, or with a `reset`, the only cut that an HTTP/1.0 client can see. A reset overtakes what is
    still on its way, so that is waited for, 2 s at most.

    A server that sends its FIN first (gunicorn's gthread and sync workers do) would turn SO_LINGER's reset into a clean
    end, so the descriptor gets another socket: with that the connection is closed here, and the server closes nothing.
    """
    try:
        if not reset:
            client.shutdown(socket.SHUT_WR)
            return
        give_up = time.monotonic() + 2.0
        while unsent(client) and time.monotonic() < give_up:
            time.sleep(0.005)
        close_with_reset(client)
        with socket.socket() as other:
            os.dup2(other.fileno(), client.fileno(), inheritable=False)
    except (OSError, ValueError):
        pass  # it is gone already


def break_off(client: Any) -> None:
    """End the connection under whoever is blocked in writing to it, and free what the kernel holds for the client."""
    close_with_reset(client)
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def stop_reading(client: Any) -> None:
    """End the wait of whoever reads from the client: no more bytes come. What is written to it still goes out."""
    try:
        # Not by the method of a TLS socket, which would write in plain text from then on, nor by gevent's.
        _socket.socket.shutdown(getattr(client, "_sock", client), socket.SHUT_RD)
    except OSError:
        pass


#: Seconds between two looks at a write that may be stuck, at most.
_LONGEST_LOOK = 15.0
#: Of Linux' struct tcp_info: tcpi_retransmits, tcpi_probes, tcpi_unacked and, at 56, tcpi_last_ack_recv (milliseconds).
_TCP_INFO, _LAST_ACK_RECEIVED = struct.Struct("=2x2B20xI28xI"), 56
_NEVER = float("inf")


class Writes:
    """Whether a client takes what is written to it. Progress is what its kernel acknowledges: a slow reader makes some
    long before its socket can be written to again, with the megabytes that may be waiting for it."""

    __slots__ = ("_began", "_client", "_limit", "_looked_at", "_nothing_at", "_progress", "_unsent", "every")

    def __init__(self, client: Any, limit: float) -> None:
        """`limit`: seconds without progress after which a write is stuck; 0: none ever is."""
        self._client = client
        self._limit = limit or _NEVER
        #: Seconds between two looks.
        self.every = min(self._limit / 4, _LONGEST_LOOK)
        self._began = -1.0  # the write that was looked at last, by the time it began
        self._progress = 0.0  # the last time it was seen to make some
        self._unsent = 0
        # Of `vanished`: the last look, and the last that saw nothing. The first one is not worth a question.
        self._looked_at = self._nothing_at = -_NEVER

    def vanished(self) -> bool:
        """Whether the client's host has left without a word: what it was sent, in however small writes, waits for an
        acknowledgement, and nothing at all has come from it for too long."""
        if self._client is None or self._limit == _NEVER:
            return False
        now = time.monotonic()
        # Where this process stood still in between, what waits now may have been sent just now.
        stood_still = now - self._looked_at > 2 * self.every + 1.0
        self._looked_at = now
        silent = 0.0 if stood_still or not unsent(self._client) else unanswered(self._client)
        if not silent:
            self._nothing_at = now
        return min(silent, now - self._nothing_at) >= self._limit

    def stuck(self, began: float) -> bool:
        """Whether the write that began then (monotonic seconds), and goes on, has made no progress for too long."""
        if self._client is None:
            return False
        now = time.monotonic()
        left = unsent(self._client)
        first = began != self._began
        if first:
            self._began = self._progress = began
        elif left is not None and left < self._unsent:
            self._progress = now
        self._unsent = left or 0
        # One look says nothing of progress, however late it comes: this process may have stood still.
        return not first and now - self._progress >= self._limit
