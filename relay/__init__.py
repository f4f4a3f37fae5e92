"""relay: carries an upstream's Server-Sent Events through Flask to a client, byte for byte and at once.

`Relay` mounts it in an app; `create_app` is the service. Importing this package imports neither Flask nor requests:
nothing that needs `ssl` may run before gevent has patched it, and gunicorn's configuration imports relay.settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relay.version import __version__

if TYPE_CHECKING:
    from relay.service.app import create_app
    from relay.web.extension import Relay

__all__ = ["Relay", "__version__", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "Relay":
        from relay.web.extension import Relay

        return Relay
    if name == "create_app":
        from relay.service.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
