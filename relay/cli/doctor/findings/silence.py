"""How long the hops let a connection be silent, against the relay's heartbeats. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.cli.doctor import hops
from relay.cli.doctor.observations import Finding

if TYPE_CHECKING:
    from relay.cli.doctor.observations import Observations


def time_outs(seen: Observations) -> list[Finding]:
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
        where = _where(seen)
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


def _where(seen: Observations) -> str:
    known = hops.known(seen.pace.answer.headers) if seen.pace else []
    return "; ".join(hop.timeout for hop in known) or "`proxy_read_timeout` in nginx, an idle time-out elsewhere"
