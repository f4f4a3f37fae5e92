"""How many connections each worker of the service has, in memory that they share, so that one with few gets the next.

All workers wait on the same listeners, and the kernel wakes the one that began to wait first: it would have three of
four streams. A worker with more connections than another leaves a new one to it for a moment.
"""

from __future__ import annotations

import mmap
from typing import Any

import gevent
from gevent.server import StreamServer

#: Seconds for which a connection is left to the others. One that stands still must not keep it waiting.
_LEAVE = 0.003
#: More connections than another's by this factor and this number are too many.
_FACTOR, _NUMBER = 1.02, 1

_shared: memoryview | None = None  # a number for each worker: 0 for none, else one more than its connections


def share(workers: int) -> None:
    """In the master, before it makes workers: have room for so many, and as many again that drain after a reload."""
    global _shared  # noqa: PLW0603 - what is inherited by all workers is one thing
    _shared = memoryview(mmap.mmap(-1, 4 * (4 * workers + 16))).cast("I")


def forget(age: int) -> None:
    """The worker of this age (gunicorn's number of it) accepts no more, or is gone."""
    if _shared is not None:
        _shared[age % len(_shared)] = 0


class Load:
    """One worker's number of connections, and whether another has fewer."""

    def __init__(self, age: int) -> None:
        self._slot = age % len(_shared) if _shared is not None else 0
        self.set(0)

    def set(self, connections: int) -> None:
        """Tell the others."""
        if _shared is not None:
            _shared[self._slot] = connections + 1

    def is_more_than_others(self) -> bool:
        """Whether a worker that accepts has so many fewer that the next connection should be its."""
        if _shared is None:
            return False
        mine, least = _shared[self._slot], min(filter(None, _shared.tolist()), default=0)
        return mine > least * _FACTOR + _NUMBER


class Server(StreamServer):  # type: ignore[misc]
    """Accepts a client unless another worker should."""

    load: Load  # this worker's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._was_left = False  # nobody may have taken it

    def do_read(self) -> Any:
        if not self._was_left and self.load.is_more_than_others():
            self._was_left = True
            self.stop_accepting()
            gevent.spawn_later(_LEAVE, self._accept_again)
            return None
        self._was_left = False
        return super().do_read()

    def _accept_again(self) -> None:
        if self.started:
            self.start_accepting()
