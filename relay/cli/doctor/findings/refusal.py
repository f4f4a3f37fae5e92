"""Who does not let the doctor in, and how it would be let in. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.cli.doctor import hops
from relay.cli.doctor.observations import Finding

if TYPE_CHECKING:
    from relay.cli.doctor.observations import Observations

#: The relay's own codes, and what helps.
_REFUSED = {
    "host_not_allowed": "Set RELAY_CLIENT_KEYS, or RELAY_ALLOW_ANONYMOUS=on if something in front decides who may "
    "call. If only the proxy's name arrives, it lacks `proxy_set_header Host $http_host;`.",
    "address_not_allowed": "Set RELAY_CLIENT_KEYS, or RELAY_ALLOW_ANONYMOUS=on if something in front decides who may "
    "call.",
    "too_many_ticks": "Wait a minute and ask again.",
}


def refused(seen: Observations) -> list[Finding]:
    """Why there was no stream to look at, if there was none."""
    refusal = seen.refusal
    if refusal is None:
        return []
    said = f": {refusal.message.rstrip('.')}" if refusal.message else ""
    if refusal.status == 401 and not refusal.code:
        # Which of the two it wants cannot be seen.
        return [
            Finding(
                "key_refused" if refusal.with_key else "key_needed",
                "Something that is not the relay wants to know who asks"
                + (", and the client key does not tell it" if refusal.with_key else "")
                + f" (401{said}){hops.given_away(refusal.headers)}.",
                "Give what a login in front, or your app's own, wants with --header, such as "
                "`--header 'Cookie: session=…'`; a client key goes into --key or RELAY_CLIENT_KEY.",
            )
        ]
    if refusal.status == 401 and refusal.code == "invalid_api_key":
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
    by = "" if refusal.code else f" by something that is not the relay{hops.given_away(refusal.headers)}"
    return [Finding("refused", f"The request for the test stream was refused{by} ({refusal.status}{said}).", cure)]
