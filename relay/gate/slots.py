"""Admission: a lease for each open stream, released exactly once. Knows nothing of HTTP."""

from __future__ import annotations

import resource
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from relay import errors

#: Open files that are not a stream's: listeners, logs, the pool's idle connections, health probes.
_OTHER_FILES = 100
#: A stream's: the client's socket and the upstream's.
_FILES_PER_STREAM = 2
#: Seconds after which a client that was refused may come again.
_RETRY_AFTER = 1


class Shared(Protocol):
    """Where the streams of one client are counted for all workers together. Both may be called from any thread."""

    def take(self, client: str) -> str:
        """A name for the stream; empty if the client has as many as it may. May wait a moment."""

    def give_back(self, lease: str) -> None:
        """The stream of this name is over. Does not wait."""


class Lease:
    """The right to one open stream, or a place in the queue for it: `granted` says which."""

    __slots__ = ("_admission", "client", "granted", "lent", "over", "shared", "wake")

    def __init__(self, admission: Admission, client: str, wake: Callable[[], None]) -> None:
        self._admission = admission
        self.client = client
        self.wake = wake
        self.granted = False
        self.over = False
        self.lent = False  # its client uploads, and it has no slot meanwhile
        self.shared = ""  # its name where streams are counted together

    def release(self) -> None:
        """Give it back, or leave the queue. Idempotent, from several threads at once too."""
        self._admission.take_back(self)


class Admission:
    """So many streams at a time, so many of them for one client, and a queue in front."""

    def __init__(self, maximum: int, per_client: int = 0, shared: Shared | None = None) -> None:
        """`per_client` 0: no limit for one client. `shared`: who counts a client's streams; None: this does."""
        self.maximum = maximum
        self.open = 0
        self._most = per_client
        self._per_client = 0 if shared else per_client  # the limit that is kept here
        self._shared = shared
        self._of_client: dict[str, int] = {}
        self._queue: deque[Lease] = deque()
        self._lock = threading.Lock()

    def request(self, client: str, wake: Callable[[], None]) -> Lease:
        """A lease for `client`, granted at once or, when others have given theirs back, later: then `wake` is called.

        Whoever does not want to wait releases it. Raises TooMany if the client has as many as it may.
        """
        lease = Lease(self, client, wake)
        if self._shared is not None:
            lease.shared = self._shared.take(client)
            if not lease.shared:
                raise self._too_many()
        with self._lock:
            if self._per_client:
                if self._of_client.get(client, 0) >= self._per_client:
                    raise self._too_many()
                self._of_client[client] = self._of_client.get(client, 0) + 1
            self._grant_or_queue(lease)
        return lease

    def lend(self, lease: Lease) -> None:
        """Let others have the slot while the client of this one uploads: slow clients must not take all of them.

        The lease still counts as one of its client's.
        """
        with self._lock:
            lease.granted = False
            lease.lent = True
            heir = self._pass_on()
        if heir is not None:
            heir.wake()

    def claim(self, lease: Lease) -> None:
        """Take a slot again, or a place in the queue for one."""
        with self._lock:
            lease.lent = False
            self._grant_or_queue(lease)

    def _grant_or_queue(self, lease: Lease) -> None:
        if self.open < self.maximum:
            self.open += 1
            lease.granted = True
        else:
            self._queue.append(lease)

    def _pass_on(self) -> Lease | None:
        """Give a slot to the first in the queue, whom the caller wakes once it has let go of the lock; else free it."""
        if not self._queue:
            self.open -= 1
            return None
        heir = self._queue.popleft()
        heir.granted = True
        return heir

    def full(self) -> errors.Full:
        """The error of a request that found no slot."""
        return errors.Full(
            f"the relay serves {self.maximum} streams at a time in each worker (RELAY_MAX_STREAMS), and all are taken",
            retry_after=_RETRY_AFTER,
        )

    def _too_many(self) -> errors.TooMany:
        return errors.TooMany(
            f"this client has as many open streams as it may (RELAY_MAX_STREAMS_PER_CLIENT is {self._most})",
            code="too_many_streams",
            retry_after=_RETRY_AFTER,
        )

    def take_back(self, lease: Lease) -> None:
        """What Lease.release does, once."""
        heir = None
        with self._lock:
            if lease.over:
                return
            lease.over = True
            if self._per_client:
                left = self._of_client[lease.client] - 1
                if left:
                    self._of_client[lease.client] = left
                else:
                    del self._of_client[lease.client]
            if lease.lent:
                pass
            elif not lease.granted:
                self._queue.remove(lease)
            else:
                heir = self._pass_on()
        if heir is not None:
            heir.wake()
        if self._shared is not None:
            self._shared.give_back(lease.shared)


def streams_that_files_allow() -> int:
    """How many streams this process can hold open with its limit of file descriptors (RLIMIT_NOFILE)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1_000_000
    return max((soft - _OTHER_FILES) // _FILES_PER_STREAM, 1)
