"""The upstream's idle connections: taken and put back, and dropped when they are too old to be trusted."""

from __future__ import annotations

import os
import socket
import ssl
import time
import weakref
from collections import deque
from typing import Any

#: Seconds that a connection is used again: the upstream's name may have moved since it was made.
_AGE = 300.0


class Connection:
    """One connection. `reused`: it has carried a request before this one."""

    __slots__ = ("idle_since", "made", "reused", "sock")

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.made = self.idle_since = time.monotonic()
        self.reused = False

    def close(self) -> None:
        """Idempotent."""
        self.sock.close()


class Pool:
    """Idle connections of one process: what crosses a fork belongs to the process that made it."""

    def __init__(self, most: int, idle: float) -> None:
        """`most`: how many are kept. `idle`: seconds for which one is kept."""
        self._idle = idle
        self._connections: deque[Connection] = deque(maxlen=most)
        self._process = os.getpid()
        weakref.finalize(self, _close_all, self._connections)  # not __del__: the sockets' own may come first

    def take(self) -> Connection | None:
        """The connection that was put back last, if it may be used again: nothing may have arrived on it, an end least
        of all. None: there is none."""
        connections = self._connections
        if self._process != os.getpid():
            self.clear()
            self._process = os.getpid()
        if not connections:
            return None
        now = time.monotonic()
        while True:
            try:
                connection = connections.pop()
            except IndexError:
                return None
            if now - connection.idle_since < self._idle and now - connection.made < _AGE and _silent(connection.sock):
                connection.reused = True
                return connection
            connection.close()

    def put(self, connection: Connection) -> None:
        """Keep a connection whose last answer was read to its end."""
        now = connection.idle_since = time.monotonic()
        connections = self._connections
        while connections and now - connections[0].idle_since >= self._idle:
            self._drop_oldest()
        if not self._idle or now - connection.made >= _AGE:
            connection.close()
            return
        if len(connections) == connections.maxlen:
            self._drop_oldest()
        connections.append(connection)

    def clear(self) -> None:
        """Close all of them. In a forked process this closes its copies only, and the other's go on."""
        _close_all(self._connections)

    def _drop_oldest(self) -> None:
        try:
            self._connections.popleft().close()
        except IndexError:
            pass  # another thread was faster


def _close_all(connections: deque[Connection]) -> None:
    try:
        while True:
            connections.popleft().close()
    except IndexError:
        pass


def _silent(sock: Any) -> bool:
    try:
        sock.settimeout(0)
        sock.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except (OSError, ValueError):
        pass
    return False


def shut(sock: socket.socket) -> None:
    """End a connection that another thread or greenlet uses: it is woken, and cleans up."""
    try:
        getattr(sock, "socket", sock).shutdown(socket.SHUT_RDWR)  # beneath TLS within TLS
    except OSError:
        pass
