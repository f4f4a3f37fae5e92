"""What one relay holds in one app: its settings, its upstream, its limits. Opens and starts nothing by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from relay import log, waiting
from relay.drain import drain
from relay.headers import RequestHeaders, check_field
from relay.health import Health
from relay.keys import ClientKeys
from relay.limits import Admission, streams_that_files_allow
from relay.upstream import Upstream

if TYPE_CHECKING:
    from relay.settings import Settings

_DEFAULT_STREAMS = 900
_DEFAULT_STREAMS_IN_THREADS = 8

HeadersHook = Callable[[], Mapping[str, str]]


class Mount:
    """`service`: it is the service's own, and not in a shop's app."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        service: bool = False,
        request_headers: HeadersHook | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.service = service
        self.keys = ClientKeys(settings.client_keys)
        self.health = Health(name, settings, self._upstream_at_last)
        self.started = time.monotonic()
        self.headers = RequestHeaders(
            drop=settings.drop_headers,
            own_credentials=settings.adds_key or bool(settings.client_keys),
            transparent=settings.transparent,
        )
        self._hook = request_headers
        drain.allow(settings.drain)

    @cached_property
    def upstream(self) -> Upstream:
        """The upstream; the embedded demo, which this starts, if none is set."""
        url = self.settings.upstream_url
        if url is None:
            from relay import demo

            url = demo.start()
        return Upstream(self.settings, url)

    def _upstream_at_last(self) -> Upstream:
        return self.upstream

    @cached_property
    def admission(self) -> Admission:
        """Made at the first request: only then is it certain on what kind of server this runs."""
        settings = self.settings
        wanted = settings.max_streams
        if wanted is None and waiting.cooperative():
            wanted = _DEFAULT_STREAMS
        elif wanted is None:
            wanted = _DEFAULT_STREAMS_IN_THREADS
            log.logger.warning(
                "relay %r serves %d streams at a time: on this server each takes a thread, and the rest of the app "
                "needs some too. Set RELAY_MAX_STREAMS for another number, or use gevent workers.",
                self.name,
                wanted,
            )
        return Admission(min(wanted, streams_that_files_allow()), settings.max_streams_per_client)

    def call_hook(self) -> dict[str, str]:
        """The headers that the shop's hook sets for this call. Raises ValueError for one that cannot be sent."""
        headers: dict[str, str] = {}
        if self._hook is not None:
            for name, value in self._hook().items():
                check_field(name, value)
                headers[name] = value
        return headers
