"""The service, or the factory's shop, where whoever asks for health waits for the probe as long as it takes.

Elsewhere a caller waits a second and is then told the last state that is known: on a busy machine that would be what
the upstream of the test before has answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import relay.upstream.health

if TYPE_CHECKING:
    from flask import Flask

relay.upstream.health._PATIENCE = 60.0


def service() -> Flask:
    from wsgi import app

    return app


def shop() -> Flask:
    from shops.factory import create_app

    return create_app()
