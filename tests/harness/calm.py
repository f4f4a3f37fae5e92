"""Tests that play against clocks of the relay's that are shorter than a busy machine may stand still for.

Such a test says nothing where the machine did: a heartbeat that came too late may have been the relay's fault or the
scheduler's. So it is played again then, and only then; what fails while everybody got on has failed.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from harness import DEADLINE, servers

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

_LOOK = 0.02  # seconds between two looks
_Test = TypeVar("_Test", bound="Callable[..., None]")


class Pulse:
    """Notes the longest time for which this process, or one of the servers that run, stood still: a context manager."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._over = threading.Event()
        ports = [server.port for server in servers.running]
        looks: list[Callable[[], None]] = [lambda: None, *(functools.partial(_answers, port) for port in ports)]
        self._threads = [threading.Thread(target=self._look, args=(look,), daemon=True) for look in looks]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.longest()

    def longest(self) -> float:
        """Seconds. Ends the looking."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        return self._longest

    def _look(self, look: Callable[[], None]) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            time.sleep(_LOOK)  # not `wait`, which the end would cut short
            look()
            self._longest = max(self._longest, time.monotonic() - began - _LOOK)


def _answers(port: int) -> None:
    """Ask a server for anything at all."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while sock.recv(65_536):
            pass


def undisturbed(most: float, tries: int = 4) -> Callable[[_Test], _Test]:
    """For a test whose clocks bear it that somebody stands still for `most` seconds, and no more.

    Where it fails and somebody did, it is played again, with the same fixtures: so it may not count on being the first.
    """

    def decorate(test: _Test) -> _Test:
        @functools.wraps(test)
        def played(*args: Any, **kwargs: Any) -> None:
            for left in range(tries - 1, -1, -1):
                with Pulse() as pulse:
                    try:
                        test(*args, **kwargs)
                    except (Exception, pytest.fail.Exception) as error:
                        stood_still = pulse.longest()
                        if not left or stood_still <= most:
                            raise
                        print(f"again, for something stood still for {stood_still:.2f} s: {error}"[:500])
                    else:
                        return

        return played  # type: ignore[return-value]

    return decorate
