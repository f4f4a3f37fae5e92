"""From what was seen to what is wrong: findings, each with a name, an explanation and a cure. No I/O.

One fault has one finding. A cache that fills holds events back, and so does a compressor: what is a fault's
consequence is told with it and not once more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from relay.doctor import hops

if TYPE_CHECKING:
    from relay.doctor.probe import Answer
    from relay.doctor.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is for scripts, the rest for people."""

    name: str
    explanation: str
    cure: str


@dataclass(slots=True)
class Refusal:
    """An answer to the request for ticks that is no stream: its status, and what the relay says if it was the relay."""

    status: int
    code: str
    message: str
    headers: hops.Headers
    with_key: bool


@dataclass(slots=True)
class Observations:
    """All that was seen; None or empty: not looked at, or not there."""

    refusal: Refusal | None = None
    pace: Timeline | None = None
    sized: Timeline | None = None  # the same pace in a body of announced length
    twice: tuple[Timeline, Timeline] | None = None  # the answers to one request made two times
    broken: Timeline | None = None  # one that the relay broke off on purpose
    silences: list[tuple[float, Timeline]] = field(default_factory=list)  # seconds of silence asked for
    http2: bool | None = None
    health: dict[str, Any] | None = None
    health_answer: Answer | None = None
    settings_faults: tuple[str, ...] = ()

    @property
    def heartbeat(self) -> float:
        """Seconds; 0: off, or not known."""
        return float(self.pace.told.get("heartbeat", 0)) if self.pace else 0.0

    @property
    def hold(self) -> float:
        return float(self.pace.told.get("hold", 0)) if self.pace else 0.0


def findings(seen: Observations) -> list[Finding]:
    """What is wrong, the worst first."""
    found = [*_settings(seen), *_refused(seen)]
    if seen.pace is not None:
        found += _on_the_way(seen, seen.pace)
        found += _hop_before(seen, seen.pace)
        found += _silence(seen)
    found += _edge(seen)
    found += _health(seen)
    return found


# Each fault.


def _settings(seen: Observations) -> list[Finding]:
    if not seen.settings_faults:
        return []
    return [
        Finding(
            "settings",
            "The settings in this folder and its environment are wrong, and a service does not start with them: "
            + "; ".join(seen.settings_faults)
            + ".",
            "Correct them in .env or the environment; `relay settings -v` says what each takes.",
        )
    ]


_REFUSED = {
    "host_not_allowed": "Set RELAY_CLIENT_KEYS, or RELAY_ALLOW_ANONYMOUS=on if something in front decides who may "
    "call. If only the proxy's name arrives, it lacks `proxy_set_header Host $http_host;`.",
    "address_not_allowed": "Set RELAY_CLIENT_KEYS, or RELAY_ALLOW_ANONYMOUS=on if something in front decides who may "
    "call.",
    "too_many_ticks": "Wait a minute and ask again.",
}


def _refused(seen: Observations) -> list[Finding]:
    refusal = seen.refusal
    if refusal is None:
        return []
    said = f": {refusal.message.rstrip('.')}" if refusal.message else ""
    if refusal.status == 401 and refusal.code in ("invalid_api_key", ""):
        if refusal.with_key:
            return [
                Finding(
                    "key_refused",
                    f"The client key is not taken (401{said}).",
                    "Give one of RELAY_CLIENT_KEYS with --key or in RELAY_CLIENT_KEY; if it is one, something on the "
                    "way takes the header `Authorization` away.",
                )
            ]
        return [
            Finding(
                "key_needed",
                f"A client key is needed, and none was given (401{said}).",
                "Give one of RELAY_CLIENT_KEYS with --key or in RELAY_CLIENT_KEY.",
            )
        ]
    if refusal.code in _REFUSED:
        cure = _REFUSED[refusal.code]
    elif refusal.status in (502, 504):
        cure = "See that the service runs and that the proxy in front has its address."
    elif refusal.status == 503:
        cure = "See whether the service is restarting or full: GET /health."
    else:
        cure = (
            "See who answers so: the relay's log has a line for each request that it refused. If it is a login in "
            "front, --header passes what it wants."
        )
    by = "" if refusal.code else f" by something that is not the relay{_given_away(refusal.headers)}"
    return [Finding("refused", f"The request for the test stream was refused{by} ({refusal.status}{said}).", cure)]


def _on_the_way(seen: Observations, pace: Timeline) -> list[Finding]:
    """What was done to the body. A cache and a compressor hold back too, so they are asked about first."""
    cached = _cached(seen, pace)
    if cached:
        return cached
    found = []
    arrival = pace.arrival
    if pace.encoding:
        found.append(_compressed(pace, arrival))
    elif arrival == "at the end":
        first, last = pace.ticks[0], pace.ticks[-1]
        found.append(
            Finding(
                "buffered",
                f"Something on the way holds the stream back until it has ended: the relay sent {len(pace.ticks)} "
                f"events over {last.sent - first.sent:.1f} s, and they arrived within "
                f"{(last.arrived - first.arrived) * 1000:.0f} ms of each other at the end"
                f"{_given_away(pace.answer.headers)}.{_lost(pace)}",
                _cure(pace),
            )
        )
    elif arrival == "in lumps":
        size = sum(len(data) for _, data in pace.answer.pieces) / pace.lumps
        found.append(
            Finding(
                "lumps",
                f"Something on the way gathers events: the relay sent {len(pace.ticks)}, one each "
                f"{pace.interval:.1f} s, and they arrived in {pace.lumps} lumps of about {_size(size)}, up to "
                f"{pace.held_back:.1f} s late{_given_away(pace.answer.headers)}.{_lost(pace)}",
                _cure(pace),
            )
        )
    elif seen.sized is not None and seen.sized.arrival in ("at the end", "in lumps"):
        found.append(
            Finding(
                "buffered",
                f"Response buffering is on somewhere on the way{_given_away(seen.sized.answer.headers)}. Event streams "
                "get through as they are now, chunk by chunk; an answer with a Content-Length was held back by "
                f"{seen.sized.held_back:.1f} s, and what a slow client does not take piles up there while the relay "
                f"goes on paying for more.{_lost(seen.sized)}",
                _cure(seen.sized),
            )
        )
    if not pace.complete and pace.told:
        way = {"cut": "was cut", "clean": "ended as if it were whole", "waiting": "stood still"}[pace.ended]
        found.append(
            Finding(
                "cut",
                f"The stream {way} after {len(pace.ticks)} of {pace.of} events, {pace.answer.ended_at:.1f} s after the "
                f"request{_given_away(pace.answer.headers)}.",
                "Raise what limits the duration or size of an answer in the proxies on the way: a stream may last for "
                "hours.",
            )
        )
    return found


def _cached(seen: Observations, pace: Timeline) -> list[Finding]:
    same = seen.twice is not None and bool(seen.twice[0].run) and seen.twice[0].run == seen.twice[1].run
    headers = [sign for one in (pace, *(seen.twice or ())) for sign in hops.of_a_cache(one.answer.headers)]
    if not same and not headers:
        return []
    said = f" It says so: {', '.join(dict.fromkeys(headers))}." if headers else ""
    what = (
        "two requests got one and the same stream, the second without the relay being asked"
        if same
        else "an answer is marked as one that was stored"
    )
    late = " It also holds each stream back while it stores it." if pace.arrival != "steady" else ""
    return [
        Finding(
            "cached",
            f"A cache on the way keeps event streams: {what}{_given_away(pace.answer.headers)}.{said}{late} One "
            "client gets what another has asked for, and a client that leaves is not noticed.",
            "Turn the cache off for these paths (in nginx `proxy_cache off;` and no `proxy_ignore_headers "
            "Cache-Control`). The relay says `Cache-Control: no-cache, no-store`, which is being ignored.",
        )
    ]


def _compressed(pace: Timeline, arrival: str) -> Finding:
    late = {
        "at the end": " All events arrived at the end, because the compressor waits for more.",
        "in lumps": " Events arrived in lumps, because the compressor waits for more.",
    }.get(arrival, "")
    if not pace.ticks:
        late = " What is in it could not be read here."
    return Finding(
        "compressed",
        f"Something on the way compresses the stream (Content-Encoding: {pace.encoding})"
        f"{_given_away(pace.answer.headers)}.{late} The relay sends it as it is, with `no-transform`.",
        "Leave text/event-stream out of what is compressed (in nginx `gzip off;` for this location, or no "
        "text/event-stream in gzip_types; in a Flask app leave it out of COMPRESS_MIMETYPES and "
        "COMPRESS_STREAMING).",
    )


def _hop_before(seen: Observations, pace: Timeline) -> list[Finding]:
    """How the last hop speaks to the relay, and whether a cut arrives as one."""
    told = pace.told.get("seen", {})
    broken = seen.broken
    looks_whole = broken is not None and broken.is_of_the_relay and broken.ended == "clean"
    if told.get("protocol") == "HTTP/1.0":
        return [
            Finding(
                "http10",
                "The last hop speaks HTTP/1.0 to the relay. There a body ends with its connection, so that half an "
                "answer "
                + (
                    "looks like a whole one: so did a stream that the relay broke off on purpose."
                    if looks_whole
                    else "may look like a whole one."
                )
                + " Each request needs a new connection, too.",
                'In nginx `proxy_http_version 1.1;` and `proxy_set_header Connection "";` in this location.',
            )
        ]
    if pace.answer.version == "HTTP/1.0":
        return [
            Finding(
                "http10",
                "The answer comes as HTTP/1.0: its end cannot be told from a cut, and proxies may hold it back"
                f"{_given_away(pace.answer.headers)}.",
                "Let the server at the edge, and each one behind it, speak HTTP/1.1.",
            )
        ]
    if looks_whole:
        return [
            Finding(
                "cut_looks_whole",
                "A stream that the relay broke off on purpose arrived with a clean end: half an answer looks like a "
                f"whole one{_given_away(pace.answer.headers)}.",
                "A hop on the way speaks HTTP/1.0 to the next one, or reads answers whole. In nginx "
                "`proxy_http_version 1.1;` in each of them.",
            )
        ]
    return []


def _silence(seen: Observations) -> list[Finding]:
    """Heartbeats against the time-outs on the way."""
    beat = seen.heartbeat
    found = []
    cut = [
        (timeline.silent, asked)
        for asked, timeline in seen.silences
        if timeline.told and not timeline.complete and timeline.ended != "waiting"
    ]
    if not beat:
        found.append(
            Finding(
                "heartbeats_off",
                "The relay sends no heartbeats: a proxy with a time-out cuts each stream whose upstream thinks for "
                "longer" + (f", here after {min(cut)[0]:.1f} s." if cut else "."),
                "Set RELAY_HEARTBEAT, such as 15s.",
            )
        )
    elif cut:
        after = min(cut)[0]
        where = _time_outs(seen)
        if after <= beat:
            found.append(
                Finding(
                    "silence_cut",
                    f"Something on the way cuts a stream after {after:.1f} s of silence; the relay's first heartbeat "
                    f"would come after {beat:g} s. Each answer that pauses for so long is lost.",
                    f"Raise that time-out above {beat:g} s, better to minutes ({where}), or lower RELAY_HEARTBEAT "
                    f"below {after:.0f} s.",
                )
            )
        else:
            held, lower = "", ""
            if seen.hold >= after:
                held = ", and so does a stream whose upstream is silent for so long before it begins"
                lower = f", or lower RELAY_HOLD ({seen.hold:g} s) below {after:.0f} s for the streams alone"
            found.append(
                Finding(
                    "short_timeout",
                    f"Something on the way ends what is silent for {after:.1f} s. Event streams that have begun live, "
                    f"since heartbeats come every {beat:g} s; but an answer that is no stream and takes longer "
                    f"fails{held}.",
                    f"Raise that time-out above RELAY_FIRST_BYTE_TIMEOUT ({where}){lower}.",
                )
            )
    return found


def _time_outs(seen: Observations) -> str:
    known = hops.known(seen.pace.answer.headers) if seen.pace else []
    return "; ".join(hop.timeout for hop in known) or "`proxy_read_timeout` in nginx, an idle time-out elsewhere"


def _edge(seen: Observations) -> list[Finding]:
    if seen.http2 is not False:
        return []
    return [
        Finding(
            "no_http2",
            "The edge does not offer HTTP/2. Browsers open six connections to a host without it, and each stream is "
            "one: the seventh tab waits.",
            "Turn it on where TLS ends (in nginx `listen 443 ssl http2;`, from 1.25.1 `http2 on;`).",
        )
    ]


def _health(seen: Observations) -> list[Finding]:
    health = seen.health
    if health is None:
        return []
    upstream = health.get("upstream")
    upstream = upstream if isinstance(upstream, dict) else {}
    status = health.get("status")
    if upstream.get("key") == "rejected":
        return [
            Finding(
                "upstream_key_rejected",
                f"The upstream refuses the relay's key ({upstream.get('status_code')}).",
                "Put a valid key into RELAY_UPSTREAM_KEY and restart; `relay check-key` asks on the spot.",
            )
        ]
    if status == "down":
        why = f": {upstream['error']}" if upstream.get("error") else ""
        return [
            Finding(
                "upstream_down",
                f"The relay does not reach its upstream{why}.",
                "See that RELAY_UPSTREAM_URL is right and can be reached from where the relay runs.",
            )
        ]
    if status == "degraded":
        return [
            Finding(
                "upstream_degraded",
                f"The upstream answers with {upstream.get('status_code')}.",
                "It is the upstream's own trouble, or RELAY_HEALTH_PATH names something that it does not have.",
            )
        ]
    if status == "draining":
        return [Finding("draining", "The relay is about to stop or restart.", "Ask again when it is up.")]
    return []


# Words.


def _given_away(headers: hops.Headers) -> str:
    signs = hops.signs(headers)
    return f" (its headers: {', '.join(signs)})" if signs else ""


def _lost(pace: Timeline) -> str:
    """Whether the relay's order not to buffer arrived here."""
    if pace.answer.header("x-accel-buffering").lower() == "no":
        return " The relay's `X-Accel-Buffering: no` came through: whoever holds back does not obey it."
    return " The relay's `X-Accel-Buffering: no` did not come through: nginx takes it away where it has read it."


def _cure(pace: Timeline) -> str:
    known = hops.known(pace.answer.headers)
    if not known:
        return (
            "Turn response buffering off in each proxy on the way (in nginx `proxy_buffering off;`). To find which: "
            "run the doctor against the relay itself, then against each hop further out."
        )
    return (
        "Turn response buffering off: "
        + "; ".join(hop.cure for hop in known)
        + ". If it is none of them, run the doctor against the relay itself, then against each hop further out."
    )


def _size(size: float) -> str:
    return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size:.0f} bytes"
