"""RELAY_RATE_LIMIT: so many requests in a time for each client. The library `limits` counts, in memory or in Redis.

Knows nothing of HTTP but the names of its headers.
"""

from __future__ import annotations

import math
import time
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from relay import errors

if TYPE_CHECKING:
    from limits import RateLimitItem, WindowStats
    from limits.strategies import RateLimiter
    from redis import ConnectionPool

    from relay.shared.redis import Store


class Rates:
    """The budget of requests of each client of one relay."""

    def __init__(self, rate: str, name: str, store: Store | None) -> None:
        """`rate`: such as `60/minute`, several of them separated by semicolons. `name`: the relay's. `store`: where
        workers and hosts count together; None: in this process."""
        from limits import parse_many

        # The shortest time first: what it refuses does not cost anything of the longer ones' budgets.
        self._rates = sorted(parse_many(rate), key=lambda item: item.get_expiry())
        self._name = f"relay:{name}"  # among others who use `limits` in the same Redis
        self._store = store

    # A window that slides: a fixed one lets twice as many through around its end. It keeps two numbers for a client and
    # not a time for each request, and in Redis it goes by Redis' clock, not by the hosts'.

    @cached_property
    def _limiter(self) -> RateLimiter:
        # Made when it is needed: the storage in memory starts a timer.
        from limits.storage import MemoryStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        return SlidingWindowCounterRateLimiter(MemoryStorage())

    def _limiter_of(self, store: Store, rate: RateLimitItem, client: str) -> RateLimiter:
        # In a cluster each rate of a client has its node.
        return _limiter_at(store.nodes.client(rate.key_for(self._name, client)).connection_pool)

    def take(self, client: str) -> list[tuple[str, str]]:
        """Count a request of `client`; what is left of its budget, as response headers.

        Raises TooMany, and Full if too many others are waiting to be counted. Without an answer from Redis it counts
        in this process, for its share of each rate.
        """
        store = self._store
        counted = store.ask(lambda: self._count(client, store, together=True)) if store is not None else None
        if counted is None:
            counted = self._count(client, store, together=False)
        rate, most, budget, granted = counted
        remaining = budget.remaining - (rate.amount - most)
        seconds = math.ceil(budget.reset_time - time.time())
        if seconds <= 0:
            # Where time is counted in milliseconds, `limits` takes a window in its first one for one that is over.
            seconds = rate.get_expiry() if granted and remaining < most else 1
        # The names of draft-ietf-httpapi-ratelimit-headers-03 to -07, in seconds from now. Not X-RateLimit-…: these are
        # what upstreams send of their own budgets, partly as points in time, and a client must not take ours for those.
        headers = [
            ("RateLimit-Limit", str(most)),
            ("RateLimit-Remaining", str(remaining if granted else 0)),
            ("RateLimit-Reset", str(seconds)),
        ]
        if not granted:
            refusal = errors.TooMany(
                f"this client has sent more than {most} requests in {_words(rate)} (RELAY_RATE_LIMIT"
                f"{'' if most == rate.amount else ', shared out to workers while RELAY_LIMITS_URL does not answer'})",
                retry_after=seconds,
            )
            refusal.fields = headers
            raise refusal
        return headers

    def _count(
        self, client: str, store: Store | None, *, together: bool
    ) -> tuple[RateLimitItem, int, WindowStats, bool]:
        """The rate of which least is left (or the one that is used up), the most that it allows here, what is left of
        all of it, and whether that was enough. `together`: in the store; else here, for the share of this process."""
        tightest: tuple[RateLimitItem, int, WindowStats, bool] | None = None
        least = 0
        for rate in self._rates:
            if together and store is not None:
                limiter, most = self._limiter_of(store, rate, client), rate.amount
            else:
                limiter, most = self._limiter, store.share(rate.amount) if store is not None else rate.amount
            others = rate.amount - most
            granted = (
                not others or limiter.get_window_stats(rate, self._name, client).remaining > others
            ) and limiter.hit(rate, self._name, client)
            budget = limiter.get_window_stats(rate, self._name, client)
            if tightest is None or not granted or budget.remaining - others < least:
                tightest, least = (rate, most, budget, granted), budget.remaining - others
            if not granted:
                break
        assert tightest is not None  # noqa: S101 - for the type checker: there is at least one rate
        return tightest


@lru_cache(maxsize=32)  # more than a cluster has nodes
def _limiter_at(pool: ConnectionPool) -> RateLimiter:
    from limits.storage import RedisStorage
    from limits.strategies import SlidingWindowCounterRateLimiter

    return SlidingWindowCounterRateLimiter(RedisStorage("redis://", connection_pool=pool))


def _words(rate: RateLimitItem) -> str:
    name = rate.GRANULARITY.name
    return f"{rate.multiples} {name}{'s' if rate.multiples > 1 else ''}"
