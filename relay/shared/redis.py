"""What workers and hosts count together, in Redis. Waits are short, and without Redis each worker counts by itself.

Only what needs it imports this module's library: `import relay.shared` does without.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from relay import errors
from relay.observe import log
from relay.observe.metrics import metrics
from relay.shared.nodes import behind

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

#: Seconds for a connection and for an answer. A Redis nearby answers within a millisecond.
_WAIT = 0.25
#: Requests of one worker that ask Redis at the same time, each on its own connection.
_AT_ONCE = 20
#: Seconds for which a request waits until it may ask: thousands of questions to a Redis that answers.
_TURN = 5.0
#: Seconds for which nobody asks again after a failure: a Redis that hangs holds one request in so many seconds.
_PAUSE = 2.0

#: Milliseconds that a lease lasts unless its worker renews it: how long a worker's death keeps its clients' budgets.
_LEASE_MS = 10_000
#: Seconds between two renewals: two of them may fail before a lease runs out.
_RENEW = 3.0
#: Leases that are sent at once: the worker that puts them together serves nobody else meanwhile.
_AT_A_TIME = 200
#: Seconds after which a client that has no stream free is looked at once more. Leases are given back behind the
#: response, so one that ends a stream and asks for the next may be faster.
_LOOK_AGAIN = 0.05

# All clocks are Redis', in milliseconds: hosts need not agree on the time. A client's leases are a sorted set by the
# time at which they run out; the set goes with the last of them.
_NOW = "local now = redis.call('TIME')\nnow = now[1] * 1000 + math.floor(now[2] / 1000)\n"
_TAKE = f"""{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
_KEEP = f"""{_NOW}
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""

_Answer = TypeVar("_Answer")


class Store:
    """The Redis at one URL, as one relay of this process sees it. Connects when it is first asked."""

    def __init__(self, url: str) -> None:
        """Raises ValueError or TypeError for a URL that redis-py does not understand."""
        import redis
        from redis.exceptions import RedisClusterException

        #: The client for a key, and `drop` for all of them.
        self.nodes = behind(url, _WAIT)
        self._failures = (redis.RedisError, RedisClusterException, OSError)
        # Not the pool bounds the connections: its error for "all are busy" is the one for "there is no Redis".
        self._turns = threading.BoundedSemaphore(_AT_ONCE)
        self._away = False
        self._ask_at = 0.0  # while it is away: when somebody tries again, monotonic seconds
        self._workers = 1  # of this host, when it was last found away

    def ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """What `question`, which uses the client, returns. None: no answer came, or none was waited for.

        Raises Full if too many others are asking.
        """
        if self._away and time.monotonic() < self._ask_at:
            metrics().limits_failed()
            return None
        if not self._turns.acquire(timeout=_TURN):
            raise errors.Full(
                f"{_AT_ONCE} requests at a time ask RELAY_LIMITS_URL in each worker, and too many others wait for it",
                retry_after=1,
            )
        try:
            return self.ask_now(question)
        finally:
            self._turns.release()

    def ask_now(self, question: Callable[[], _Answer]) -> _Answer | None:
        """The same, however many others are asking."""
        if self._away:
            now = time.monotonic()
            if now < self._ask_at:
                metrics().limits_failed()
                return None
            self._ask_at = now + _PAUSE  # one tries; those who come meanwhile do not wait
        try:
            answer = question()
        except self._failures as error:
            metrics().limits_failed()
            self._failed(error)
            return None
        if self._away:
            self._away = False
            log.event("limits_back", message="RELAY_LIMITS_URL answers again: workers count together")
        return answer

    def share(self, limit: int) -> int:
        """What this worker allows of `limit` when it counts by itself. How many hosts there are it cannot know."""
        return max(limit // self._workers, 1)

    def _failed(self, error: Exception) -> None:
        # A master that has become a replica, or is loading, keeps its connections and refuses every question. New ones
        # look the name up anew.
        self.nodes.drop()
        self._ask_at = time.monotonic() + _PAUSE
        if not self._away:
            self._workers = _workers()
            self._away = True
            log.event(
                "limits_away",
                message="RELAY_LIMITS_URL does not answer: this worker counts by itself, for its share of each limit",
                workers=self._workers,
                # What redis-py says of Sentinels in brackets is how it connects to them.
                error=f"{type(error).__name__}: {error}".partition(" : <")[0][:200],
            )


def _workers() -> int:
    """How many workers serve with this one: its parent's children of the same command line; else WEB_CONCURRENCY."""
    own, count = Path("/proc/self/cmdline"), 0
    try:
        for task in Path(f"/proc/{os.getppid()}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):  # it has ended
                    count += Path(f"/proc/{child}/cmdline").read_bytes() == own.read_bytes()
    except OSError:  # no Linux, or the parent's are not for everybody to see
        count = 0
    said = os.environ.get("WEB_CONCURRENCY", "")
    return count or (int(said) if said.isdecimal() else 0) or 1


class Leases:
    """How many streams each client has open, at all workers and hosts together.

    A worker renews its leases, in a thread (under gevent: a greenlet) of their own. Those of one that died run out.
    """

    def __init__(self, store: Store, name: str, most: int) -> None:
        """`name`: whose streams these are, the relay's. `most`: for one client."""
        self._store = store
        self._prefix = f"relay:streams:{name}:"
        self._most = most
        self._worker = os.urandom(8).hex()
        self._numbers = itertools.count()
        self._held: dict[str, str] = {}  # each lease's name, and the set that it is in
        self._open: Counter[str] = Counter()  # how many of them are in each set
        self._over: deque[tuple[str, str]] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, client: str) -> str:
        """A lease's name; empty if the client has as many as it may. Raises Full if too many others are asking.

        With no answer from Redis the client may have this worker's share, of which those that it has here are a part.
        """
        lease, key = f"{self._worker}:{next(self._numbers)}", self._prefix + client

        def taken() -> int:
            answer: Any = self._store.nodes.client(key).eval(_TAKE, 1, key, self._most, _LEASE_MS, lease)
            return int(answer)

        answer = self._store.ask(taken)
        if answer == 0:
            time.sleep(_LOOK_AGAIN)
            answer = self._store.ask(taken)
            if answer == 0:
                return ""
        with self._lock:
            if answer is None and self._open.get(key, 0) >= self._store.share(self._most):
                return ""
            self._open[key] += 1
            self._held[lease] = key  # one that was not counted now will be when it is renewed
        if self._thread is None:
            self._start()
        return lease

    def give_back(self, lease: str) -> None:
        """Never waits: it is sent from elsewhere."""
        with self._lock:
            key = self._held.pop(lease, None)
            if key is not None:
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]
        if key is not None:
            self._over.append((key, lease))
            self._wake.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # it does not cross a fork
                self._thread = threading.Thread(target=self._keep, name="relay-leases", daemon=True)
                self._thread.start()

    def _keep(self) -> None:
        # One thread sends both, so that a renewal never overtakes a lease that is given back.
        renew_at = time.monotonic() + _RENEW
        while True:
            self._wake.wait(max(renew_at - time.monotonic(), 0))
            self._wake.clear()
            try:
                self._send_back()
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + _RENEW
                    self._renew()
            except Exception:  # noqa: BLE001 - a thread that ends would let all leases run out
                log.logger.exception("leases in Redis could not be renewed")
                time.sleep(_RENEW)

    def _send_back(self) -> None:
        while self._over:
            pairs = [self._over.popleft() for _ in range(min(len(self._over), _AT_A_TIME))]
            self._send(pairs, lambda pipe, key, leases: pipe.zrem(key, *leases))  # one that is lost runs out by itself

    def _renew(self) -> None:
        held = [(key, lease) for lease, key in list(self._held.items())]
        for start in range(0, len(held), _AT_A_TIME):
            self._send(
                held[start : start + _AT_A_TIME],
                lambda pipe, key, leases: pipe.eval(_KEEP, 1, key, _LEASE_MS, *leases),
            )

    def _send(self, pairs: list[tuple[str, str]], command: Callable[[Pipeline, str, list[str]], object]) -> None:
        """Send a command for each key among `pairs` of key and lease: a cluster has no commands for several keys."""
        sets: dict[str, list[str]] = {}
        for key, lease in pairs:
            sets.setdefault(key, []).append(lease)

        def sent() -> bool:
            pipes: dict[Redis, Pipeline] = {}
            for key, leases in sets.items():
                client = self._store.nodes.client(key)
                if client not in pipes:
                    pipes[client] = client.pipeline(transaction=False)
                command(pipes[client], key, leases)
            for pipe in pipes.values():
                pipe.execute()
            return True

        self._store.ask_now(sent)
