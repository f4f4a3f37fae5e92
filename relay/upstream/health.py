"""What is known of the upstream, and asking when that is stale. Knows nothing of Flask and of requests in flight."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from relay import errors
from relay.observe.metrics import metrics

if TYPE_CHECKING:
    from relay.settings import Settings
    from relay.upstream.endpoint import Upstream

#: Seconds that a caller waits for a probe under way before it gets the last known state.
_PATIENCE = 1.0
#: Seconds that a probe has beyond RELAY_HEALTH_TIMEOUT, to say by itself what it waited for.
_SPARE = 0.1
#: Seconds after which the metrics are told again of what has not changed: what another worker has told them since would
#: stand otherwise.
_TELL_AGAIN = 1.0
#: Relayed requests in a row without an answer after which the upstream is no better than degraded, whatever it answers
#: a probe, and the seconds for which that holds.
_FAILURES, _FAILING = 5, 60.0


@dataclass(frozen=True, slots=True)
class Known:
    """One piece of evidence of the upstream. `status_code` None: it did not answer HTTP, and `error` says why."""

    status_code: int | None
    latency_ms: float | None
    key: str
    at: float  # seconds since the epoch
    monotonic: float
    source: str
    error: str | None = None
    failing: bool = False  # it answers probes, and no requests

    @property
    def status(self) -> str:
        """`ok`, `degraded` (it answers, but with a failure of its own or by refusing the key) or `down`."""
        if self.status_code is None:
            return "down"
        return "degraded" if self.status_code >= 500 or self.key == "rejected" or self.failing else "ok"

    def report(self) -> dict[str, Any]:
        report = {
            "reachable": self.status_code is not None,
            "status_code": self.status_code,
            "latency_ms": None if self.latency_ms is None else round(self.latency_ms, 1),
            "key": self.key,
            "checked_at": datetime.fromtimestamp(self.at, UTC).isoformat(timespec="seconds"),
            "source": self.source,
        }
        if self.error:
            report["error"] = self.error
        return report


class Health:
    """The state of one upstream. At most one probe is under way, and its answer serves everybody for a while."""

    def __init__(self, mount: str, settings: Settings, upstream: Callable[[], Upstream]) -> None:
        self._mount = mount
        self._settings = settings
        self._upstream = upstream
        self._known: Known | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._probing: threading.Event | None = None
        self._answer_by = 0.0  # when the probe under way has had its time
        self._told: tuple[bool, bool | None] | None = None
        self._tell_at = 0.0
        self._failures = 0  # relayed requests in a row without an answer
        self._failed_at = -math.inf  # the last of them, monotonic seconds
        self._failure = ""

    def known(self, *, ask: bool = True) -> Known:
        """As `_asked`, and what becomes of relayed requests."""
        known = self._asked(ask=ask)
        if self._failures < _FAILURES or time.monotonic() - self._failed_at > _FAILING or known.status_code is None:
            return known
        why = f"none of the last {self._failures} requests was answered ({self._failure})"
        return replace(known, failing=True, error=why)

    def _asked(self, *, ask: bool = True) -> Known:
        """What is known now, asking the upstream if that is stale. Takes at most a second, whatever the upstream does.

        While a probe takes longer than that, the last known state; if there is none, `down` with the reason. With
        `ask` False nobody is asked and nothing waited for.
        """
        known = self._known
        ttl = self._settings.health_ttl
        if known is not None and time.monotonic() - known.monotonic < ttl:
            return known
        if not ask:
            return known or _failed("the upstream has not been asked yet")
        timeout = self._settings.health_timeout
        if self._process != os.getpid():  # the thread that probes is in the process that this was forked from
            self._process, self._lock, self._probing = os.getpid(), threading.Lock(), None
        with self._lock:
            probing = self._probing
            if probing is None:
                probing = self._probing = threading.Event()
                self._answer_by = time.monotonic() + timeout + _SPARE
                threading.Thread(target=self._probe, args=(probing,), name="relay-probe", daemon=True).start()
        probing.wait(min(_PATIENCE, timeout + _SPARE))
        with self._lock:
            # Whatever it hangs in, such as a look-up of the name or a handshake, whose steps have clocks of their own.
            if self._probing is probing and time.monotonic() >= self._answer_by:
                self._learn(_failed(f"the upstream did not answer within {timeout:g} s"))
        return self._known or _failed("the upstream has not answered the first probe yet")

    def answered(self, status: int, seconds: float, *, own_key: bool = True) -> None:
        """A relayed request was answered with this status after so many seconds: better evidence than any probe.

        `own_key` False: not the relay's key went along, but one of the shop's hook, of which nothing is said here.
        """
        before = self._known
        self._failures = 0
        own_key = own_key and self._settings.adds_key
        if status == 401 and own_key:
            key = "rejected"
        elif 200 <= status < 300 and own_key:
            key = "accepted"
        else:  # other refusals may be of the path or the model, and a redirect looks at no key
            key = before.key if before is not None else "not checked"
        self._learn(Known(status, seconds * 1000, key, time.time(), time.monotonic(), "traffic"))

    def failed(self, reason: str, *, reachable: bool) -> None:
        """A relayed request was not answered: by nobody, or by an upstream that was there. The next who asks has it
        probed."""
        self._failures += 1
        self._failed_at = time.monotonic()
        self._failure = reason
        known = self._known
        if known is not None:
            self._known = replace(known, monotonic=-math.inf)
        if not reachable:
            self._tell(reachable=False, key_accepted=None)

    def _probe(self, done: threading.Event) -> None:
        """Ask once and remember the answer."""
        try:
            self._learn(self._ask())
        finally:
            with self._lock:
                self._probing = None
            done.set()

    def _learn(self, known: Known) -> None:
        self._known = known
        accepted = {"accepted": True, "rejected": False}.get(known.key)
        self._tell(reachable=known.status_code is not None, key_accepted=accepted)

    def _tell(self, *, reachable: bool, key_accepted: bool | None) -> None:
        """Tell the metrics, of which the latest word of all workers counts."""
        now = time.monotonic()
        if (reachable, key_accepted) != self._told or now >= self._tell_at:
            self._told, self._tell_at = (reachable, key_accepted), now + _TELL_AGAIN
            metrics().upstream(self._mount, reachable=reachable, key_accepted=key_accepted)

    def _ask(self) -> Known:
        settings = self._settings
        started = time.monotonic()
        try:
            status = self._upstream().probe(f"/{settings.health_path}", within=settings.health_timeout)
        except errors.RelayError as error:
            return _failed(error.message)
        latency = (time.monotonic() - started) * 1000
        key = "not checked"
        if settings.adds_key:
            key = "rejected" if status in (401, 403) else "accepted" if 200 <= status < 300 else "not checked"
        return Known(status, latency, key, time.time(), time.monotonic(), "probe")


def _failed(error: str) -> Known:
    return Known(None, None, "not checked", time.time(), time.monotonic(), "probe", error)
