"""Whether connections to the upstream are worth waiting for: a circuit breaker.

After five failures in a row a request that needs a new connection fails at once, but for one at a time, which tries
whether the upstream is back. Knows no sockets, and only of this process' connections.
"""

from __future__ import annotations

import math
import os
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
#: Seconds without a failure after which requests connect as usual: whoever comes then asks nobody to wait for them.
_FORGOTTEN = 30.0
#: Seconds beyond its time after which a try is taken for stuck, such as in a resolver.
_STUCK = 1.0


class Breaker:
    """The connections of one upstream. Each way to make one raises RelayError."""

    def __init__(self, keep: Callable[[Connection], None], stuck: Callable[[], None]) -> None:
        """`keep`: takes a connection that nobody has waited for. `stuck`: told of a try that does not end."""
        self._keep = keep
        self._stuck = stuck
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._failed_at = self._connected_at = -math.inf  # the last ones, monotonic seconds
        self._why, self._code = "", ""  # of the last failure
        self._trial: _Trial | None = None  # under way

    def connect(self, make: Callable[[], Connection], within: float) -> Connection:
        """A connection, by `make`, which takes `within` seconds at most. Raises RelayError."""
        if self._process != os.getpid():
            self._begin()  # the thread that tries is in the process that this was forked from
        if self._failures >= _MOST and time.monotonic() - self._failed_at < _FORGOTTEN:
            return self._try(make, within)
        return self._made(make, within)

    def _made(self, make: Callable[[], Connection], within: float) -> Connection:
        began = time.monotonic()
        try:
            connection = make()
        except errors.RelayError as failure:
            self._failed(failure, began)
            raise
        except BaseException:
            # Given up by whoever waited: the client has left, or its clock, which began before this one, has run out.
            if time.monotonic() - began > within * _NEARLY:
                self._failed(errors.ConnectTimeout(f"no connection within {within:g} s (RELAY_CONNECT_TIMEOUT)"), began)
            raise
        self._failures, self._connected_at = 0, time.monotonic()
        return connection

    def _failed(self, failure: errors.RelayError, began: float) -> None:
        with self._lock:
            if began < self._connected_at:
                return  # another connection has come about since
            self._failures += 1
            self._failed_at = time.monotonic()
            self._why = failure.message
            self._code = failure.code if isinstance(failure, errors.UpstreamUnreachable) else ""

    def _try(self, make: Callable[[], Connection], within: float) -> Connection:
        now = time.monotonic()
        with self._lock:
            before = self._trial
            if before is not None and now < before.began + within + _STUCK:
                raise self._refusal()
            trial = self._trial = _Trial(now)
        if before is not None:
            self._stuck()

        def work() -> None:
            try:
                connection = self._made(make, within)
            except errors.RelayError as failure:
                trial.failure = failure.detached()
            else:
                if not trial.hand_over(connection):
                    self._keep(connection)
            finally:
                self._ended(trial)

        try:
            threading.Thread(target=work, name="relay-trial", daemon=True).start()
        except RuntimeError:  # there are as many threads as there may be
            self._ended(trial)
            raise self._refusal() from None
        try:
            trial.done.wait(_PATIENCE)
        finally:
            connection = trial.leave()
        if connection is not None:
            return connection
        raise trial.failure or self._refusal()

    def _ended(self, trial: _Trial) -> None:
        if self._trial is trial:
            self._trial = None
        trial.done.set()

    def _refusal(self) -> errors.UpstreamUnreachable:
        return errors.UpstreamUnreachable(
            f"{self._why}, {self._failures} times in a row; one request at a time tries again",
            code=self._code or None,
            retry_after=1,
        )


class _Trial:
    """A connection that is being made for a request, which may not wait for it to the end."""

    def __init__(self, began: float) -> None:
        self.began = began
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
