"""The relay's settings: one frozen object, from a mapping, every fault at once.

`SETTINGS` is the table that everything derives from, `Settings.from_mapping` the way
to an object. Nothing here reads the process's environment.
"""

from __future__ import annotations

from relay.settings.addresses import loopback, split_bind
from relay.settings.model import Settings, SettingsError
from relay.settings.table import GROUPS, SETTINGS, Setting

__all__ = [
    "GROUPS",
    "SETTINGS",
    "Setting",
    "Settings",
    "SettingsError",
    "loopback",
    "split_bind",
]
