"""Host names: asked for seldom, by one caller at a time, and again after a connection has failed.

Under gevent a look-up takes a thread of a small pool, even for an address in digits, and those threads fight the loop
for the interpreter: thousands of streams must not each ask. A look-up that hangs is shared by all who wait for the
same name, so that it takes one thread of the pool and not all of them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from typing import Any

#: Seconds that an answer is used. Load balancers in the cloud change their addresses within a minute.
KEPT = 30.0

#: What `socket.getaddrinfo` gives for one address.
AddressInfo = tuple[Any, Any, int, str, tuple[Any, ...]]


class _LookUp:
    """A look-up under way or done."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.addresses: list[AddressInfo] = []
        self.error: OSError | None = None
        self.until = float("inf")


_look_ups: dict[tuple[str, int], _LookUp] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """The threads that hold the lock or look a name up are not in the new process."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    _look_ups.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def resolve(host: str, port: int) -> list[AddressInfo]:
    """The addresses of a host for TCP, in the resolver's order, at least one.

    Raises socket.gaierror. Takes as long as the resolver does; others who ask for the same name wait with it.
    """
    literal = _literal(host, port)
    if literal is not None:
        return [literal]
    key = (host, port)
    with _lock:
        look_up = _look_ups.get(key)
        mine = look_up is None or time.monotonic() >= look_up.until
        if mine:
            look_up = _look_ups[key] = _LookUp()
    assert look_up is not None  # noqa: S101 - for the type checker
    if mine:
        try:
            look_up.addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
            look_up.until = time.monotonic() + KEPT
        except OSError as error:
            look_up.error = error.with_traceback(None)
            forget(host, port)
        except BaseException:  # the caller was told to give up: whoever waits asks for themselves
            look_up.error = socket.gaierror(socket.EAI_AGAIN, "the look-up was given up")
            forget(host, port)
            raise
        finally:
            look_up.done.set()
    else:
        look_up.done.wait()
    if look_up.error is not None:
        # Each who waits gets one of their own: in one that all raise, the frames of all would add up.
        raise type(look_up.error)(*look_up.error.args)
    return look_up.addresses


def forget(host: str, port: int) -> None:
    """Ask again next time: a connection has failed, and the addresses may be old."""
    with _lock:
        _look_ups.pop((host, port), None)


def _literal(host: str, port: int) -> AddressInfo | None:
    """An address in digits, which nobody needs to be asked for."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    if ip.version == 4:
        return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)
    return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, 0)
