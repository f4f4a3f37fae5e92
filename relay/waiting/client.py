"""What a client's socket tells, and how it is broken off. Works on plain sockets and on gevent's."""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import termios
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


def close_with_reset(client: Any) -> None:
    """Make the connection end with a reset, and not with a FIN, when it is closed. What is unsent then is lost."""
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass


def break_off(client: Any) -> None:
    """End the connection under whoever is blocked in writing to it, and free what the kernel holds for the client."""
    close_with_reset(client)
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
