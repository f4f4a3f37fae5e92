"""`Settings`: from a mapping to one frozen object, with every fault at once.

Reads the mapping that it is given and the files that this names; not the process's
environment, and no `.env` file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay.settings.addresses import DEMO, PORTS
from relay.settings.credentials import carries_key
from relay.settings.rules import adds_key, broken_rules
from relay.settings.table import PREFIX, SETTINGS, Setting
from relay.settings.values import FaultError
from relay.wire.target import ALLOW_EVERYTHING, DEFAULT_ALLOW_WITH_KEY, AllowRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.settings.addresses import Network

# The longest value that a message repeats.
_SHOWN = 120

# What the commands read (`relay chat`, `relay doctor`): it may stand in the environment that the service gets.
_OF_COMMANDS = frozenset({"RELAY_CLIENT_KEY"})

_BY_NAME = {setting.name: setting for setting in SETTINGS}


class SettingsError(ValueError):
    """What is wrong with a mapping: `faults` are its sentences, the text all of them."""

    def __init__(self, faults: tuple[str, ...]) -> None:
        many = "setting is" if len(faults) == 1 else "settings are"
        lines = "".join(f"\n  {fault}" for fault in faults)
        super().__init__(f"{len(faults)} {many} wrong:{lines}")
        self.faults = faults


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings of one relay, checked. Times are seconds, sizes are bytes.

    Made by `from_mapping`; `dataclasses.replace` gives a changed copy, unchecked. The
    table in `relay.settings.table` says what each one means. Here is only what their
    types leave open.
    """

    upstream_url: str | None  # without a trailing slash; None is the embedded demo
    upstream_key: str | None
    upstream_key_header: str
    upstream_headers: tuple[tuple[str, str], ...]
    upstream_query: str  # without the question mark
    upstream_ca: str | None
    upstream_cert: str | None
    upstream_proxy: str | None
    mount: str  # "" is the root
    allow: tuple[AllowRule, ...]
    models: frozenset[str] | None  # None is any
    chat_model: str
    client_keys: tuple[str, ...]
    ticket_secret: str | None
    allow_anonymous: bool
    trusted_proxies: tuple[Network, ...]
    transparent: bool
    include_usage: bool
    drop_headers: frozenset[str]  # in lower case
    pass_headers: frozenset[str]  # in lower case
    cors_origins: tuple[str, ...]  # as browsers write them, or "*"
    cors_expose: frozenset[str]  # in lower case
    connect_timeout: float
    send_timeout: float
    upstream_idle: float  # 0 is off
    first_byte_timeout: float
    idle_timeout: float  # 0 is none
    write_timeout: float  # 0 is none
    heartbeat: float  # 0 is off
    hold: float  # 0 is until the first-byte timeout
    no_retry_status: int | None  # None: each failure has its own
    max_streams: int | None  # None is not set: the worker's kind decides
    threads: int | None  # None is not set
    queue: float
    max_streams_per_client: int  # 0 is off
    rate_limit: str | None
    limits_url: str
    max_body: int
    body_memory: int
    buffer: int
    health_path: str  # without a leading slash
    health_ttl: float
    health_timeout: float
    drain: float
    lame_duck: float
    keepalive: float  # 0 is off
    bind: str
    admin_bind: str | None  # None is off
    admin_hosts: frozenset[str]  # in lower case

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], *, service: bool = False) -> Settings:
        """Check `mapping` and return its settings.

        Values are texts, as in an environment, or typed, as in an app's config; None
        is the same as not set. Names that do not begin with `RELAY_` are ignored, and
        so are those that Kubernetes injects for a service called relay.

        `service=True` is for the service: `PORT` is read, the demo serves in place of
        a missing upstream on loopback, and an upstream key is not for strangers.

        Raises SettingsError, which lists every fault and no secret.
        """
        given = {
            name: value
            for name, value in mapping.items()
            if name.startswith(PREFIX) and value is not None and name not in _OF_COMMANDS and not _injected(name)
        }
        faults = [_unknown(name) for name in given if name not in _BY_NAME]
        values: dict[str, Any] = {}
        if service and "RELAY_BIND" not in given and mapping.get("PORT"):
            try:
                given["RELAY_BIND"] = _everywhere(mapping["PORT"])
            except FaultError as fault:
                faults.append(f"PORT = {_shown(mapping['PORT'])}: {fault.sentence}")
        for setting in SETTINGS:
            value = given.get(setting.name)
            try:
                values[setting.attribute] = _parse(setting, value)
            except FaultError as fault:
                faults.append(_describe(setting, value, fault))
        faults += broken_rules(values, service=service)
        if faults:
            raise SettingsError(tuple(faults))
        if values["upstream_url"] == DEMO:
            values["upstream_url"] = None
        if values["allow"] is None:
            values["allow"] = DEFAULT_ALLOW_WITH_KEY if adds_key(values) else ALLOW_EVERYTHING
        return cls(**values)

    @cached_property
    def upstream_host(self) -> str:
        """The upstream's host, with its port if one is given, for logs; or `demo`."""
        return urlsplit(self.upstream_url).netloc if self.upstream_url else "demo"

    @cached_property
    def adds_key(self) -> bool:
        """Whether requests go upstream with a key of the relay's: `upstream_key`, a fixed header's or query's."""
        return carries_key(self.upstream_key, self.upstream_headers, self.upstream_query)

    @property
    def shares_limits(self) -> bool:
        """Whether limits are counted for all workers and hosts together: in Redis, at `limits_url`."""
        return not self.limits_url.startswith("memory:")

    def __repr__(self) -> str:
        """Every setting but the secret ones, of which only shows whether they are set."""
        shown = ", ".join(f"{field.name}={self._repr_of(field.name)}" for field in fields(self))
        return f"Settings({shown})"

    def _repr_of(self, attribute: str) -> str:
        value = getattr(self, attribute)
        secret = _BY_NAME[PREFIX + attribute.upper()].secret
        return "(not shown)" if secret and value else repr(value)


def _parse(setting: Setting, value: object) -> object:
    if value is not None:
        return setting.kind.parse(value)
    return None if setting.none_if_unset else setting.kind.parse(setting.default)


def _everywhere(port: object) -> str:
    """Return the bind for a platform's `PORT`."""
    text = str(port).strip()
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) not in PORTS:
        raise FaultError("must be a port, 1 to 65535")
    return f"0.0.0.0:{int(text)}"


def _describe(setting: Setting, value: object, fault: FaultError) -> str:
    hidden = setting.secret or not fault.show
    shown = "(not shown)" if hidden else _shown(value)
    sentence = fault.sentence or f"must be {setting.allowed}"
    return f"{setting.name} = {shown}: {sentence}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer beyond sys.get_int_max_str_digits()
        return "(too long to show)"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _injected(name: str) -> bool:
    """Whether Kubernetes sets this variable for a service that is called relay."""
    return name == "RELAY_PORT" or name.startswith(("RELAY_PORT_", "RELAY_SERVICE_"))


def _unknown(name: str) -> str:
    known = [setting.name.removeprefix(PREFIX) for setting in SETTINGS]
    meant = name.removeprefix(PREFIX).upper()
    close = [whole for whole in known if whole.startswith(f"{meant}_")] or get_close_matches(meant, known, n=1)
    hint = f"did you mean {PREFIX}{close[0]}?" if close else ".env.example has them all"
    return f"{name if name.isprintable() else repr(name)}: no such setting; {hint}"
