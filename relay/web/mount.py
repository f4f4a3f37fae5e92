"""What one relay holds in one app: its settings, its upstream, its limits. Opens and starts nothing by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay.gate.keys import ClientKeys, is_google
from relay.gate.rates import Rates
from relay.gate.slots import Admission, streams_that_files_allow
from relay.observe import log
from relay.observe.metrics import metrics
from relay.record import Record
from relay.settings import SettingsError
from relay.shared.redis import Leases, Store
from relay.stream import waiting
from relay.stream.drain import drain
from relay.upstream.endpoint import Upstream
from relay.upstream.health import Health
from relay.web import server
from relay.wire.headers import RequestHeaders, check_field

if TYPE_CHECKING:
    from flask import Flask

    from relay.settings import Settings

_DEFAULT_STREAMS = 900
#: The end reasons of a request that the upstream has not answered, and whether it was there all the same.
_UNANSWERED = {"connect_timeout": False, "upstream_error": False, "send_timeout": True, "first_byte_timeout": True}
_DEFAULT_STREAMS_IN_THREADS = 8

HeadersHook = Callable[[], Mapping[str, str]]
EndHook = Callable[[Record], None]


class Mount:
    """`service`: it is the service's own, and not in a shop's app."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        service: bool = False,
        request_headers: HeadersHook | None = None,
        on_end: EndHook | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.service = service
        self.keys = ClientKeys(
            settings.client_keys, ticket_secret=settings.ticket_secret, google=is_google(settings.upstream_host)
        )
        #: The relay or its clients have keys of their own, so that a client's credentials must not go upstream.
        self.own_credentials = settings.adds_key or bool(settings.client_keys)
        self.health = Health(name, settings, self._upstream_at_last)
        self.started = time.monotonic()
        self.headers = RequestHeaders(
            drop=settings.drop_headers,
            keep=settings.pass_headers,
            hook=request_headers is not None,
            own_credentials=self.own_credentials,
            transparent=settings.transparent,
        )
        counts = settings.rate_limit is not None or settings.max_streams_per_client > 0
        self._store = _store(settings.limits_url) if counts and settings.shares_limits else None
        self.rates = Rates(settings.rate_limit, name, self._store) if settings.rate_limit is not None else None
        self._hook = request_headers
        #: The upstream is the operator's own and no key is at stake here: its redirects lead where it says.
        self.trusts_upstream = settings.transparent and not self.own_credentials and request_headers is None
        #: Then it also decides which pages may call.
        self.leaves_cors = self.trusts_upstream and not settings.cors_origins
        self.body_memory = max(settings.body_memory, settings.max_body)  # or one of that size would never pass
        self._on_end = on_end
        self.knows_server = False  # what it lacks has been said: at the first stream
        self._beside: bool | None = None  # known once the app has its rules: at the first request
        self.wants_model = on_end is not None  # the record of a stream names model and tenant only for the hook
        #: A chat request goes upstream in Anthropic's shape and not in OpenAI's.
        self.speaks_anthropic = any(name.lower() == "anthropic-version" for name, _ in settings.upstream_headers)
        drain.allow(settings.drain)

    @cached_property
    def without_heartbeats(self) -> Settings:
        """The settings of a stream whose client wants no heartbeats, or gets them from somebody else."""
        return replace(self.settings, heartbeat=0.0, hold=0.0)

    @cached_property
    def upstream_path(self) -> str:
        """The path of the upstream's URL, as what a relayed path begins with: `v1/`, or nothing."""
        path = urlsplit(self.settings.upstream_url or "").path.strip("/")
        return f"{path}/" if path else ""

    @cached_property
    def upstream(self) -> Upstream:
        """The upstream; the embedded demo, which this starts, if none is set."""
        url = self.settings.upstream_url
        if url is None:
            from relay.upstream import demo

            url = demo.start()
        return Upstream(self.settings, url)

    def _upstream_at_last(self) -> Upstream:
        return self.upstream

    @cached_property
    def admission(self) -> Admission:
        """Made at the first request: only then is it certain on what kind of server this runs."""
        settings = self.settings
        wanted = settings.max_streams
        if wanted is None:
            wanted = _DEFAULT_STREAMS if waiting.cooperative() else _streams_in_threads(settings.threads)
        most = settings.max_streams_per_client
        shared = Leases(self._store, self.name, most) if self._store is not None and most else None
        return Admission(min(wanted, streams_that_files_allow()), most, shared)

    def look_at_server(self, environ: Mapping[str, Any], client: Any) -> None:
        """At the first stream: say what the server cannot guarantee. `client`: its socket, or None."""
        self.knows_server = True
        settings = self.settings
        guessed = settings.max_streams is None and settings.threads is None
        server.warn(
            environ,
            client,
            streams=self.admission.maximum if guessed else None,
            most=settings.max_streams or 0,
            threads=settings.threads,
        )

    def beside(self, app: Flask) -> bool:
        """Whether the app has rules of its own that may know paths below the mount."""
        if self._beside is None:
            ours = f"{self.name}."
            mine = [rule.rule for rule in app.url_map.iter_rules(f"{self.name}.relay")]
            prefix = min(mine, key=len).partition("<")[0]
            known = (r.rule.partition("<") for r in app.url_map.iter_rules() if not r.endpoint.startswith(ours))
            self._beside = not self.service and any(
                fixed.startswith(prefix) or (variable and prefix.startswith(fixed)) for fixed, variable, _ in known
            )
        return self._beside

    def call_hook(self) -> dict[str, str]:
        """The headers that the shop's hook sets for this call. Raises ValueError for one that cannot be sent."""
        headers: dict[str, str] = {}
        if self._hook is not None:
            for name, value in self._hook().items():
                check_field(name, value)
                headers[name] = value
        return headers

    # What becomes of a stream (relay.stream.relayed.Watch).

    def answered(self, status: int, record: Record) -> None:
        """The upstream has answered with this status: the best evidence of it that there is."""
        self.health.answered(status, record.first_byte or 0.0, own_key=record.own_key)

    def ended(self, record: Record) -> None:
        """A stream has ended, or a request for one was refused: count it, log it, tell the shop."""
        count = metrics()
        if record.admitted:
            if record.first_byte is None and record.reason in _UNANSWERED:
                self.health.failed(record.reason, reachable=_UNANSWERED[record.reason])
            count.ended(record)
        elif record.status:
            count.refused(record.reason)
        log.ended(record)

    def finished(self, record: Record) -> None:
        """The last byte of a stream is out: what the app does now delays nobody."""
        if self._on_end is not None and record.admitted:
            try:
                self._on_end(record)
            except Exception:  # noqa: BLE001 - the shop's own code; it harms nothing but the log
                log.app_fault("on_end failed for request %s", record.request_id)


def _streams_in_threads(threads: int | None) -> int:
    """The streams that a relay takes of so many threads: the app's pages need some, too."""
    return _DEFAULT_STREAMS_IN_THREADS if threads is None else max(threads - max(threads // 4, 1), 1)


def _store(url: str) -> Store:
    try:
        return Store(url)
    except (TypeError, ValueError):  # whose words may repeat its password
        raise SettingsError(("RELAY_LIMITS_URL = (not shown): is no URL that redis-py understands",)) from None
