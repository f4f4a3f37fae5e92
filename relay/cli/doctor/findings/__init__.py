"""From what was seen to what is wrong: findings, each with a name, an explanation and a cure. No I/O.

One fault has one finding. A cache that fills holds events back, and so does a compressor: what is a fault's
consequence is told with it and not once more.

`service` tells of the relay's own settings and health, `refusal` of who does not let the doctor in, `delivery` of what
became of the body on the way, `protocol` of how the hops speak, `silence` of their time-outs.
"""

from __future__ import annotations

from relay.cli.doctor.findings import delivery, protocol, refusal, service, silence
from relay.cli.doctor.observations import Finding, Observations

__all__ = ["Finding", "Observations", "findings"]


def findings(seen: Observations) -> list[Finding]:
    """What is wrong, the worst first."""
    found = [*service.settings(seen), *refusal.refused(seen)]
    if seen.pace is not None:
        found += delivery.on_the_way(seen, seen.pace)
        found += protocol.hop_before(seen, seen.pace)
        found += silence.time_outs(seen)
    found += protocol.edge(seen)
    found += protocol.keep_alive(seen)
    found += service.health(seen)
    return found
