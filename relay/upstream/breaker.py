"""Whether connections to the upstream are worth waiting for: a circuit breaker.

After five failures in a row a request that needs a new connection fails at once, but for one at a time, which tries
whether the upstream is back. Knows no sockets, and only of this process' connections.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from relay import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.upstream.pool import Connection

#: Failures in a row.
_MOST = 5
#: Seconds that a request waits for its own try. The try goes on without it, for the requests to come.
_PATIENCE = 0.5
#: The part of its time after which a connection that is given up has failed.
_NEARLY = 0.9


class Breaker:
    """The connections of one upstream. Each way to make one raises RelayError."""

    def __init__(self, keep: Callable[[Connection], None]) -> None:
        """`keep`: takes a connection that nobody has waited for."""
        self._keep = keep
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._why, self._code = "", ""  # of the last one
        self._trial: _Trial | None = None  # under way

    def connect(self, make: Callable[[], Connection], within: float) -> Connection:
        """A connection, by `make`, which takes `within` seconds at most. Raises RelayError."""
        if self._failures >= _MOST:
            return self._try(make)
        began = time.monotonic()
        try:
            return self._made(make)
        except errors.RelayError:
            raise
        except BaseException:
            # Given up by whoever waited: the client has left, or its clock, which began before this one, has run out.
            if time.monotonic() - began > within * _NEARLY:
                self._failed(errors.ConnectTimeout(f"no connection within {within:g} s (RELAY_CONNECT_TIMEOUT)"))
            raise

    def _made(self, make: Callable[[], Connection]) -> Connection:
        try:
            connection = make()
        except errors.RelayError as failure:
            self._failed(failure)
            raise
        self._failures = 0
        return connection

    def _failed(self, failure: errors.RelayError) -> None:
        with self._lock:
            self._failures += 1
            self._why = failure.message
            self._code = failure.code if isinstance(failure, errors.UpstreamUnreachable) else ""

    def _try(self, make: Callable[[], Connection]) -> Connection:
        with self._lock:
            if self._trial is not None:
                raise self._refusal()
            trial = self._trial = _Trial()

        def work() -> None:
            try:
                connection = self._made(make)
            except errors.RelayError as failure:
                trial.failure = failure.detached()
            else:
                if not trial.hand_over(connection):
                    self._keep(connection)
            finally:
                self._trial = None
                trial.done.set()

        threading.Thread(target=work, name="relay-trial", daemon=True).start()
        try:
            trial.done.wait(_PATIENCE)
        finally:
            connection = trial.leave()
        if connection is not None:
            return connection
        raise trial.failure or self._refusal()

    def _refusal(self) -> errors.UpstreamUnreachable:
        return errors.UpstreamUnreachable(
            f"{self._why}, {self._failures} times in a row; one request at a time tries again",
            code=self._code or None,
            retry_after=1,
        )


class _Trial:
    """A connection that is being made for a request, which may not wait for it to the end."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.failure: errors.RelayError | None = None
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._left = False

    def hand_over(self, connection: Connection) -> bool:
        """False: the request has left."""
        with self._lock:
            if not self._left:
                self._connection = connection
            return not self._left

    def leave(self) -> Connection | None:
        """The request waits no longer, and takes what there is."""
        with self._lock:
            self._left = True
            return self._connection
