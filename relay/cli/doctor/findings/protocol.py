"""How the hops speak: HTTP/1.0, in which an end cannot be told from a cut, no HTTP/2 at the edge, and connections that
are kept too briefly. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.cli.doctor import hops
from relay.cli.doctor.observations import Finding

if TYPE_CHECKING:
    from relay.cli.doctor.observations import Observations
    from relay.cli.doctor.timeline import Timeline


def hop_before(seen: Observations, pace: Timeline) -> list[Finding]:
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
                f"{hops.given_away(pace.answer.headers)}.",
                "Let the server at the edge, and each one behind it, speak HTTP/1.1.",
            )
        ]
    if looks_whole:
        return [
            Finding(
                "cut_looks_whole",
                "A stream that the relay broke off on purpose arrived with a clean end: half an answer looks like a "
                f"whole one{hops.given_away(pace.answer.headers)}.",
                "A hop on the way speaks HTTP/1.0 to the next one, or reads answers whole. In nginx "
                "`proxy_http_version 1.1;` in each of them.",
            )
        ]
    return []


def edge(seen: Observations) -> list[Finding]:
    """What browsers are offered."""
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


def keep_alive(seen: Observations) -> list[Finding]:
    """How long the edge keeps a connection that nobody uses."""
    if seen.kept is None:
        return []
    return [
        Finding(
            "short_keep_alive",
            f"The server at this address closes a connection that was idle for {seen.kept:.1f} s. A client, or a proxy "
            "in front, that sends its next request at that moment gets an error, a 502 of the proxy's: a POST is not "
            "sent again by itself.",
            "Let it keep connections for longer than those in front of it do: gunicorn with `--keep-alive 65` (the "
            "service: RELAY_KEEPALIVE), nginx with `keepalive_timeout 65s;`.",
        )
    ]
