"""The one table of settings: name, kind, default, meaning.

Parsing, `.env.example` and the README's table all come from it. A setting that is
added here needs an attribute of the same name in `Settings`, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.settings.addresses import (
    BIND,
    BIND_OR_OFF,
    HEALTH_PATH,
    HOSTS,
    LIMITS_URL,
    MOUNT,
    NETWORKS,
    ORIGINS,
    PEM_FILE,
    PEM_KEY_FILE,
    PROXY,
    UPSTREAM_URL,
)
from relay.settings.credentials import (
    ALLOW,
    CLIENT_KEYS,
    HEADER_NAMES,
    HEADERS,
    KEPT_HEADER_NAMES,
    KEY,
    KEY_HEADER,
    QUERY,
    TICKET_SECRET,
)
from relay.settings.values import NAME, NAMES, RATE, SWITCH, Kind, count, duration, size

PREFIX = "RELAY_"

_KIB, _GIB = 2**10, 2**30  # bytes
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400  # seconds

# 10 ms, well above the event loop's own delays under load (a first event's p99: 8 ms); tests go down to it.
_SHORTEST = 0.01


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, the environment's variable and the app's config key alike.

    `default` is the text that an `.env` file would hold, empty where the setting is off or unset by default; with
    `none_if_unset` it is what somebody else decides on, and not set is None in `Settings`. The value of a `secret`
    one appears in no message.
    """

    name: str
    kind: Kind
    default: str
    meaning: str
    secret: bool = False
    none_if_unset: bool = False

    @property
    def attribute(self) -> str:
        """The name of the attribute of `Settings`."""
        return self.name.removeprefix(PREFIX).lower()

    @property
    def allowed(self) -> str:
        """What it takes, in words: unit, bounds, and what 0 does."""
        return self.kind.allowed


_UPSTREAM = (
    Setting(
        "RELAY_UPSTREAM_URL",
        UPSTREAM_URL,
        "",
        "base URL; what follows the mount is appended to it; demo, or unset in the service: the embedded demo",
    ),
    Setting(
        "RELAY_UPSTREAM_KEY",
        KEY,
        "",
        "sent upstream in place of the client's own key; unset: the client's own goes through",
        secret=True,
    ),
    Setting(
        "RELAY_UPSTREAM_KEY_HEADER",
        KEY_HEADER,
        "Authorization",
        "Authorization sends Bearer KEY; any other, such as x-api-key or api-key, the bare key",
    ),
    Setting("RELAY_UPSTREAM_HEADERS", HEADERS, "", "headers added to every upstream request, probes too", secret=True),
    Setting("RELAY_UPSTREAM_QUERY", QUERY, "", "query added to every upstream request, probes too", secret=True),
    Setting("RELAY_UPSTREAM_CA", PEM_FILE, "", "PEM bundle to trust; unset: certifi's"),
    Setting(
        "RELAY_UPSTREAM_CERT",
        PEM_KEY_FILE,
        "",
        "PEM file of a client certificate and its key, for an upstream that wants one",
    ),
    Setting(
        "RELAY_UPSTREAM_PROXY",
        PROXY,
        "",
        "outbound HTTP proxy; the environment's proxy variables and .netrc are not read",
        secret=True,
    ),
)

_CALLS = (
    Setting("RELAY_MOUNT", MOUNT, "/v1", "the service's prefix; / relays every path but the relay's own"),
    Setting(
        "RELAY_ALLOW",
        ALLOW,
        "",
        "what may be called; unset: with an upstream key inference and GET models, else everything",
    ),
    Setting("RELAY_MODELS", NAMES, "", "models that may be asked for, others get 403; unset: any"),
    Setting("RELAY_CHAT_MODEL", NAME, "gpt-4.1", "the model of the prompt endpoints when none is named"),
)

_CALLERS = (
    Setting(
        "RELAY_CLIENT_KEYS",
        CLIENT_KEYS,
        "",
        "keys of which a client must show one; unset: anyone who can connect",
        secret=True,
    ),
    Setting(
        "RELAY_TICKET_SECRET",
        TICKET_SECRET,
        "",
        "what tickets are signed with; unset: a random secret that the workers of this host share",
        secret=True,
    ),
    Setting(
        "RELAY_ALLOW_ANONYMOUS",
        SWITCH,
        "off",
        "let clients beyond this machine spend the upstream key without a client key",
    ),
    Setting(
        "RELAY_TRUSTED_PROXIES",
        NETWORKS,
        "127.0.0.1,::1",
        "whose X-Forwarded-For and X-Forwarded-Proto are believed; a unix socket's peer always is",
    ),
    Setting(
        "RELAY_TRANSPARENT",
        SWITCH,
        "off",
        "for an upstream of your own: cookies, Origin, Set-Cookie and CORS headers go through too",
    ),
    Setting(
        "RELAY_INCLUDE_USAGE",
        SWITCH,
        "off",
        "relayed requests for a streamed chat completion ask for usage too; they are then not as they came",
    ),
    Setting("RELAY_DROP_HEADERS", HEADER_NAMES, "", "more request headers that must not go upstream"),
    Setting(
        "RELAY_PASS_HEADERS",
        KEPT_HEADER_NAMES,
        "",
        "request headers that go upstream although a proxy in front may have added them",
    ),
    Setting("RELAY_CORS_ORIGINS", ORIGINS, "", "origins allowed to call from a page"),
    Setting("RELAY_CORS_EXPOSE", HEADER_NAMES, "", "more response headers that pages of these origins may read"),
)

_TIMES = (
    Setting(
        "RELAY_CONNECT_TIMEOUT",
        duration(_SHORTEST, 5 * _MINUTE),
        "5s",
        "name resolution, TCP, a proxy's tunnel and TLS together; 504 after it",
    ),
    Setting(
        "RELAY_SEND_TIMEOUT",
        duration(_SHORTEST, _HOUR),
        "60s",
        "an upstream that takes nothing of a request for so long; 504 after it",
    ),
    Setting(
        "RELAY_UPSTREAM_IDLE",
        duration(_SHORTEST, 30, zero="uses none again"),
        "15s",
        "how long an idle connection to the upstream is kept; less than the upstream's own limit",
    ),
    Setting(
        "RELAY_FIRST_BYTE_TIMEOUT",
        duration(_SHORTEST, _DAY),
        "600s",
        "from the request's last byte to the upstream's headers; 504 after it",
    ),
    Setting(
        "RELAY_IDLE_TIMEOUT",
        duration(_SHORTEST, _DAY, zero="waits for ever"),
        "300s",
        "between two upstream bytes; heartbeats and waiting for the client do not count",
    ),
    Setting(
        "RELAY_WRITE_TIMEOUT",
        duration(_SHORTEST, _DAY, zero="waits for ever"),
        "60s",
        "a client that takes no byte for so long is gone",
    ),
    Setting(
        "RELAY_HEARTBEAT",
        duration(_SHORTEST, _HOUR, zero="turns it off"),
        "15s",
        "comment to the client after so much silence",
    ),
    Setting(
        "RELAY_HOLD",
        duration(_SHORTEST, _HOUR, zero="waits until the first-byte timeout"),
        "20s",
        "how long a request for a stream waits for the upstream's status before 200 and heartbeats",
    ),
)

_LIMITS = (
    Setting(
        "RELAY_NO_RETRY_STATUS",
        count(400, 599, unset=True),
        "",
        "status of failures that may have been billed, for SDKs that ignore `x-should-retry` (424); unset: their own",
        none_if_unset=True,
    ),
    Setting(
        "RELAY_MAX_STREAMS",
        count(1, 100_000, unset=True),
        "900",
        "open streams per worker, more get 503; unset under plain threads: 8, or three of four RELAY_THREADS",
        none_if_unset=True,
    ),
    Setting(
        "RELAY_THREADS",
        count(1, 100_000, unset=True),
        "",
        "under plain threads: how many each of the server's processes has; not all of them become streams",
        none_if_unset=True,
    ),
    Setting(
        "RELAY_QUEUE",
        duration(_SHORTEST, _HOUR, zero="refuses at once"),
        "0s",
        "how long a request may wait for a slot before that 503",
    ),
    Setting(
        "RELAY_MAX_STREAMS_PER_CLIENT",
        count(1, 100_000, zero="turns it off"),
        "0",
        "open streams per verified client key, else per address; more get 429",
    ),
    Setting("RELAY_RATE_LIMIT", RATE, "", "requests per verified client key, else per address; more get 429"),
    Setting(
        "RELAY_LIMITS_URL",
        LIMITS_URL,
        "memory://",
        "where limits are counted; in memory each worker counts for itself",
        secret=True,
    ),
    Setting("RELAY_MAX_BODY", size(1, 16 * _GIB), "32MiB", "request body; 413 beyond it"),
    Setting(
        "RELAY_BODY_MEMORY",
        size(1, 256 * _GIB),
        "256MiB",
        "all request bodies that a worker holds at once, at least RELAY_MAX_BODY; 503 beyond it",
    ),
    Setting("RELAY_BUFFER", size(_KIB, _GIB), "256KiB", "most upstream bytes held for one slow client"),
)

_HEALTH = (
    Setting(
        "RELAY_HEALTH_PATH", HEALTH_PATH, "models", "what the probe GETs below the upstream URL; must cost nothing"
    ),
    Setting(
        "RELAY_HEALTH_TTL",
        duration(_SHORTEST, _HOUR, zero="probes each time"),
        "10s",
        "how long a probe's answer serves everyone",
    ),
    Setting(
        "RELAY_HEALTH_TIMEOUT",
        duration(_SHORTEST, _MINUTE),
        "3s",
        "how long a probe may take; a caller waits at most 1s, then gets the last known state",
    ),
)

_SERVER = (
    Setting(
        "RELAY_DRAIN",
        duration(_SHORTEST, _DAY, zero="cuts streams at once"),
        "25s",
        "how long open streams may go on after SIGTERM or a reload",
    ),
    Setting(
        "RELAY_LAME_DUCK",
        duration(_SHORTEST, _HOUR, zero="drains at once"),
        "0s",
        "after SIGTERM: not ready but still accepting for so long, until balancers have seen it; then the drain",
    ),
    Setting(
        "RELAY_KEEPALIVE",
        duration(_SHORTEST, _HOUR, zero="closes after each response"),
        "65s",
        "idle client connections; more than the proxy's own in front",
    ),
    Setting("RELAY_BIND", BIND, "127.0.0.1:8000", "the service's address; unset while PORT is set: 0.0.0.0:$PORT"),
    Setting(
        "RELAY_ADMIN_BIND",
        BIND_OR_OFF,
        "127.0.0.1:8001",
        "health, metrics and the list of open streams, which answer even when the service is full",
    ),
    Setting(
        "RELAY_ADMIN_HOSTS",
        HOSTS,
        "",
        "names by which the admin address may be called, besides localhost and IP addresses",
    ),
)

# The groups of the README's table and of `.env.example`, in their order.
GROUPS: tuple[tuple[str, tuple[Setting, ...]], ...] = (
    ("The upstream", _UPSTREAM),
    ("What may be called", _CALLS),
    ("Who may call, and what goes through", _CALLERS),
    ("Times", _TIMES),
    ("Limits", _LIMITS),
    ("Health", _HEALTH),
    ("The server", _SERVER),
)

SETTINGS: tuple[Setting, ...] = tuple(setting for _, settings in GROUPS for setting in settings)
