"""What the service reads its settings from: the process's environment, and a `.env` file where that is silent.

What the values mean is not its business: relay.settings checks them. It puts nothing into os.environ, so that a reload
sees the file as it is then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from relay.settings import SettingsError

_held: dict[str, object] | None = None


def environment() -> dict[str, object]:
    """What `hold` was given last; before that, what `read` gives."""
    return dict(read() if _held is None else _held)


def read(file: Path | None = Path(".env")) -> dict[str, str]:
    """The environment over a file, for the service `.env` in its folder. Without python-dotenv there is none.

    `file` None: the environment alone. Whoever made a folder could name the upstream there that a key is sent to, so
    that commands read a file only when they are told to.

    Values in the file are taken literally: `${…}` in a key is part of the key. A name without `=` sets nothing. Raises
    SettingsError for a file that cannot be read.
    """
    values: dict[str, str] = {}
    if file is not None and file.is_file():
        try:
            from dotenv import dotenv_values
        except ModuleNotFoundError:
            pass
        else:
            try:
                found = dotenv_values(file, interpolate=False, encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError((f"{file} cannot be read: {error}",)) from error
            values.update({name: value for name, value in found.items() if value is not None})
    values.update(os.environ)
    return values


def open_to_others(values: Mapping[str, object]) -> str:
    """A sentence if a file with secrets can be read by other users of this machine, else an empty one."""
    files = [Path(".env")]
    keys, certificate = str(values.get("RELAY_CLIENT_KEYS", "")).strip(), values.get("RELAY_UPSTREAM_CERT")
    if keys.startswith("@"):
        files.append(Path(keys[1:]))
    if certificate:
        files.append(Path(str(certificate)))
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            if file.stat().st_mode & 0o077 and (file.name != ".env" or b"KEY" in file.read_bytes()):
                found.append(str(file))
    if not found:
        return ""
    return f"{', '.join(found)}: other users of this machine can read the keys in it; chmod 600 {' '.join(found)}"


def hold(values: Mapping[str, object]) -> None:
    """Give `values` to every later call of `environment`, in this process and those forked from it.

    gunicorn's master holds what it has checked: a `.env` that is faulty when a reload or a replaced worker comes does
    not keep the workers from starting.
    """
    global _held  # noqa: PLW0603 - what the process runs with is one thing
    _held = dict(values)
