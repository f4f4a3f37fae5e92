"""What the doctor asks, in which order, and what it makes of the answers.

One request after another measures the pace, the cache and the end; beside them, each on a connection of its own, run
one with the same pace and a length, and those that wait in silence. It takes as long as the longest silence.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from relay.cli.doctor import probe
from relay.cli.doctor.observations import Observations, Refusal
from relay.cli.doctor.probe import Answer, Target, Unreachable
from relay.cli.doctor.timeline import Timeline, read

#: The measured stream: 15 events in 2.8 s. Padded, so that nginx's usual buffers of 4 and 8 KiB show as lumps.
_PACE = "n=15&ms=200&pad=600"
#: One that ends at once, to see its end.
_SHORT = "n=2&ms=50"
#: Seconds without a byte after which no more are waited for.
_PATIENCE = 15.0
#: The silence tried in any case is longer than the relay's own by so much, and by a second.
_BEYOND = 1.05
_LONGEST_SILENCE = 120.0
#: Seconds for which an idle connection is looked at. What closes it earlier is shorter than what usual clients and
#: proxies keep (5 s in httpx and Node, 60 s in nginx): they send while it is being closed.
_IDLE = 4.5
#: What is tried where a URL names no mount: the service's default, and one that is mounted at the root.
_MOUNTS = ("/v1", "")
_BUSY = 3  # times that a relay which says "too many" is asked again

Progress = Callable[[str], None]
_Result = TypeVar("_Result")


@dataclass(slots=True)
class Examination:
    """What was asked of whom, and what was seen."""

    target: Target
    seen: Observations = field(default_factory=Observations)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Wishes:
    """`headers`: sent with every request. `silences`: further seconds of silence to try. `quick`: try none at all.

    `mount`: the one to try first if the URL names none.
    """

    headers: list[tuple[str, str]] = field(default_factory=list)
    with_key: bool = False
    silences: Sequence[float] = ()
    quick: bool = False
    mount: str | None = None


def examine(target: Target, wishes: Wishes, progress: Progress) -> Examination:
    """Look at a chain. Raises Unreachable if there is no relay to be found at its end."""
    progress(f"asking {target.url}")
    found = Examination(_find(target, wishes))
    seen = found.seen
    if target.scheme == "https":
        seen.http2 = probe.offers_http2(target)
    _ask_health(found, wishes)
    if seen.health is not None and found.target.path != target.path:
        found.notes.append(f"The relay was found at {found.target.url}.")
    first = _ticks(found.target, wishes, _once("n=1"), _PATIENCE)
    if not first.is_of_the_relay:
        seen.refusal = _refusal(first.answer, wishes)
        return found
    silences = [] if wishes.quick else _silences(first, wishes, found.notes)
    longest = max(silences, default=0.0)
    progress("measuring how events arrive" + (f", and {longest:g} s of silence" if longest else ""))
    with _Clock(longest, progress):
        waiting = [(seconds, _beside(_silence, found.target, wishes, seconds)) for seconds in silences]
        sized = _beside(_ticks, found.target, wishes, _once(f"{_PACE}&framing=length"), _PATIENCE)
        kept = None if wishes.quick else _beside(_kept, found.target, wishes)
        _measure(found, wishes)
        seen.sized = sized.result()
        seen.kept = kept.result() if kept is not None else None
        for seconds, future in waiting:
            timeline = future.result()
            if timeline is not None and timeline.is_of_the_relay:
                seen.silences.append((seconds, timeline))
            else:
                found.notes.append(f"{seconds:g} s of silence could not be tried: {_what_instead(timeline)}.")
    return found


def _beside(function: Callable[..., _Result], *arguments: object) -> Future[_Result]:
    """Call it in a thread of its own, for which Ctrl-C does not wait as it would for an executor's."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - raised where the result is wanted
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class _Clock:
    """Says now and then how much longer it takes."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self._until = time.monotonic() + seconds
        self._progress = progress
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(5.0):
            left = self._until - time.monotonic()
            if left > 1:
                self._progress(f"waiting in silence, {left:.0f} s more")


def _find(target: Target, wishes: Wishes) -> Target:
    """The mount: the URL's own, or what is likely. Raises Unreachable if a relay is at none."""
    if target.path:
        paths = list(dict.fromkeys([target.path, *(target.path.removesuffix(end) for end in _OF_A_CALL)]))
    else:
        paths = list(dict.fromkeys([*([] if wishes.mount is None else [wishes.mount]), *_MOUNTS]))
    answers = []
    guarded = None
    for path in paths:
        here = target.at(path)
        answer = probe.get(here, "/_relay/health/live", wishes.headers, patience=_PATIENCE)
        report = _json(answer)
        error = report.get("error")
        said, code = (error.get("message", ""), error.get("code")) if isinstance(error, dict) else ("", None)
        if report.get("status") == "ok":
            return here
        # Nobody is let in here. It may be the mount, or what a mount further up relays: that is asked for first.
        if answer.status in (401, 403) and code != "path_not_allowed":
            guarded = guarded or here
        if guarded is not None:
            continue
        answers.append(f"{answer.status} at {path or '/'}")
        if 300 <= answer.status < 400 and answer.header("location"):
            raise Unreachable(f"{here.url} redirects to {_cleaned(answer.header('location'))}; ask there")
        if answer.status in (502, 503, 504):
            raise Unreachable(
                f"{target.authority} answers {answer.status}: a proxy is there, but does not reach the relay behind it"
                + (f" ({said.rstrip('.')})" if said else "")
                + ". Is the service up, and at the address that the proxy has?"
            )
    if guarded is not None:
        return guarded
    raise Unreachable(
        f"{target.authority} answers, but there is no relay ({', '.join(answers)}); give the URL with the relay's "
        "mount, such as https://relay.example.com/v1"
    )


def _cleaned(location: str) -> str:
    """Where a redirect leads, without the path that was asked for and any query."""
    return location.partition("?")[0].removesuffix("/_relay/health/live")[:200]


#: What people paste: a client's whole URL.
_OF_A_CALL = ("/chat/completions", "/completions", "/responses", "/messages", "/models", "/_relay/ticks", "/health")


def _ask_health(found: Examination, wishes: Wishes) -> None:
    answer = probe.get(found.target, "/_relay/health", wishes.headers, patience=_PATIENCE)
    report = _json(answer)
    if "upstream" not in report:
        found.notes.append(f"Health was not to be had here ({answer.status}).")
        return
    found.seen.health_answer = answer
    found.seen.health = report
    if isinstance(report["upstream"], dict) and report["upstream"].get("demo"):
        found.notes.append("It relays from the embedded demo upstream: RELAY_UPSTREAM_URL is not set.")


def _measure(found: Examination, wishes: Wishes) -> None:
    """Pace, cache, end."""
    seen, target = found.seen, found.target
    pace = _ticks(target, wishes, _once(_PACE), _PATIENCE)
    if pace.arrival in ("in lumps", "uneven"):
        pace = _ticks(target, wishes, _once(_PACE), _PATIENCE)  # once may be the network
    if not pace.is_of_the_relay:
        seen.refusal = _refusal(pace.answer, wishes)
        return
    if pace.arrival == "uneven":
        found.notes.append(f"Events arrived unevenly, up to {pace.held_back:.1f} s late, but not in lumps.")
    seen.pace = pace
    # The same request twice: each stream that the relay makes has a mark of its own.
    query = _once(_SHORT)
    seen.twice = _ticks(target, wishes, query, _PATIENCE), _ticks(target, wishes, query, _PATIENCE)
    seen.broken = _ticks(target, wishes, _once(f"{_SHORT}&end=cut"), _PATIENCE)


def _once(query: str) -> str:
    """A query that was never asked before, for caches."""
    return f"{query}&nonce={os.urandom(8).hex()}"


def _silences(first: Timeline, wishes: Wishes, notes: list[str]) -> list[float]:
    """Seconds to try: what the relay itself may be silent for, and what was asked for."""
    own = max(float(first.told.get("heartbeat") or 0), float(first.told.get("hold") or 0))
    if own * _BEYOND + 1 > _LONGEST_SILENCE:
        notes.append(f"The relay may be silent for {own:g} s, which is longer than what can be tried.")
    tried = {float(int(min(own * _BEYOND + 1, _LONGEST_SILENCE) + 0.999))} if own else {20.0}
    return sorted(tried | {float(seconds) for seconds in wishes.silences})


def _silence(target: Target, wishes: Wishes, seconds: float) -> Timeline | None:
    try:
        return _ticks(target, wishes, _once(f"n=2&ms=10&silence={seconds:.0f}"), seconds + _PATIENCE)
    except Unreachable:
        return None


def _kept(target: Target, wishes: Wishes) -> float | None:
    try:
        return probe.idle_until_closed(target, "/_relay/health/live", wishes.headers, patience=_PATIENCE, most=_IDLE)
    except Unreachable:
        return None


def _what_instead(timeline: Timeline | None) -> str:
    return "no answer came" if timeline is None else f"the answer was {timeline.answer.status}"


def _ticks(target: Target, wishes: Wishes, query: str, patience: float) -> Timeline:
    """Ask for ticks as a browser would. A relay that is asked too often is asked again a little later."""
    headers = [
        *wishes.headers,
        ("Accept", "text/event-stream"),
        ("Accept-Encoding", "gzip"),
    ]
    for left in range(_BUSY, -1, -1):
        answer = probe.get(target, f"/_relay/ticks?{query}", headers, patience=patience)
        if answer.status != 429 or not left:
            return read(answer)
        wait = answer.header("retry-after")
        time.sleep(min(int(wait), 5) if wait.isascii() and wait.isdecimal() else 2)
    raise AssertionError  # the last turn returns


def _refusal(answer: Answer, wishes: Wishes) -> Refusal:
    error = _json(answer).get("error")
    error = error if isinstance(error, dict) else {}
    return Refusal(
        answer.status, str(error.get("code", "")), str(error.get("message", "")), answer.headers, wishes.with_key
    )


def _json(answer: Answer) -> dict[str, Any]:
    try:
        value = json.loads(answer.body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
