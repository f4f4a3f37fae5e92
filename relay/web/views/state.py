"""What a relay says of itself, and the ticket for those who may use it. None of it goes upstream."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flask import Response, request

from relay import errors
from relay.gate.origin import check_origin
from relay.gate.tickets import TICKET_SECONDS
from relay.shared import lame_duck
from relay.stream.drain import drain
from relay.version import __version__
from relay.web.views import answers

if TYPE_CHECKING:
    from relay.web.mount import Mount


def ticket(mount: Mount) -> Response:
    """A ticket for EventSource, which cannot send a client key in a header."""
    if not mount.keys:
        raise errors.NotFound("no client keys are set (RELAY_CLIENT_KEYS), so nobody needs a ticket")
    check_origin(request.environ, mount.settings)
    digest = mount.keys.check(request.environ)
    assert digest is not None  # noqa: S101 - there are keys
    return answers.as_json({"ticket": mount.keys.tickets.make(digest), "expires_in": TICKET_SECONDS})


def health(mount: Mount) -> Response:
    """The report for people and probes: 503 when the upstream is down or the relay is about to stop."""
    draining = _leaves()
    known = mount.health.known(ask=not draining)  # a balancer must see a drain at once, whatever the upstream does
    status = "draining" if draining else known.status
    response = answers.as_json(
        {
            "status": status,
            "upstream": known.report() | ({"demo": True} if mount.settings.upstream_url is None else {}),
            "streams": {"open": mount.admission.open, "max": mount.admission.maximum},
            "version": __version__,
            "uptime_s": round(time.monotonic() - mount.started, 1),
        }
    )
    response.status_code = 503 if status in ("down", "draining") else 200
    return response


def live(_mount: Mount) -> Response:
    """The process works."""
    return answers.as_json({"status": "ok"})


def ready(_mount: Mount) -> Response:
    """Whether new requests are welcome: 200, or 503 while the relay is about to stop. An upstream that is down does not
    change that."""
    draining = _leaves()
    response = answers.as_json({"status": "draining" if draining else "ok"})
    response.status_code = 503 if draining else 200
    return response


def _leaves() -> bool:
    return drain.draining or lame_duck.begun()
