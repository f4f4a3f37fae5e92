"""What became of the body on the way: stored, compressed, held back or cut off. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.cli.doctor import hops
from relay.cli.doctor.observations import Finding

if TYPE_CHECKING:
    from relay.cli.doctor.observations import Observations
    from relay.cli.doctor.timeline import Timeline


def on_the_way(seen: Observations, pace: Timeline) -> list[Finding]:
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
                f"{hops.given_away(pace.answer.headers)}.{_lost(pace)}",
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
                f"{pace.held_back:.1f} s late{hops.given_away(pace.answer.headers)}.{_lost(pace)}",
                _cure(pace),
            )
        )
    elif seen.sized is not None and seen.sized.arrival in ("at the end", "in lumps"):
        found.append(
            Finding(
                "buffered",
                f"Response buffering is on somewhere on the way{hops.given_away(seen.sized.answer.headers)}. Event "
                "streams get through as they are now, chunk by chunk; an answer with a Content-Length was held back by "
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
                f"request{hops.given_away(pace.answer.headers)}.",
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
            f"A cache on the way keeps event streams: {what}{hops.given_away(pace.answer.headers)}.{said}{late} One "
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
        f"{hops.given_away(pace.answer.headers)}.{late} The relay sends it as it is, with `no-transform`.",
        "Leave text/event-stream out of what is compressed (in nginx `gzip off;` for this location, or no "
        "text/event-stream in gzip_types; in a Flask app leave it out of COMPRESS_MIMETYPES and "
        "COMPRESS_STREAMING).",
    )


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
