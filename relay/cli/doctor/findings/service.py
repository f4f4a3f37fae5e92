"""What the service has to say of itself: its settings, its upstream and the upstream's key. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.cli.doctor.observations import Finding

if TYPE_CHECKING:
    from relay.cli.doctor.observations import Observations


def settings(seen: Observations) -> list[Finding]:
    """Faults of the settings in the folder in which the doctor runs."""
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


def health(seen: Observations) -> list[Finding]:
    """What the health report tells of, the upstream first."""
    report = seen.health
    if report is None:
        return []
    upstream = report.get("upstream")
    upstream = upstream if isinstance(upstream, dict) else {}
    status = report.get("status")
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
