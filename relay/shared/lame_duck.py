"""Whether this service is about to stop: not ready any more, and still accepting, until balancers have seen it.

Its master says so to its workers, in memory that they share, when it is told to stop; or somebody says so beforehand,
with a file in the folder that the workers share (`POST /drain`). No HTTP, no Flask.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from pathlib import Path

from relay.shared import reports

#: The file's name.
_FILE = "drain"

_stopping: mmap.mmap | None = None  # one byte, set once the master was told to stop: 1, or 2 if it goes on for a while
_file: Path | None = None  # what is said beforehand


def share() -> None:
    """In the master, before it makes workers. What was said to an earlier service in the same folder is over.

    Raises OSError: there is a file that cannot be removed, or the folder is not this user's alone.
    """
    global _stopping, _file  # noqa: PLW0603 - what is inherited by all workers is one thing
    _stopping, _file = mmap.mmap(-1, 1), None
    if reports.FOLDER in os.environ:
        file = reports.folder() / _FILE
        file.unlink(missing_ok=True)
        _file = file


def begin(*, lasts: bool) -> None:
    """In the master, told to stop: at once, or after a while that `lasts`."""
    if _stopping is not None:
        _stopping[0] = 2 if lasts else 1


def stopping() -> bool:
    """Whether the master was told to stop."""
    return _stopping is not None and _stopping[0] != 0


def lasts() -> bool:
    """Whether this service goes on for a while, not ready any more."""
    return (_stopping is not None and _stopping[0] == 2) or since() is not None


def begun() -> bool:
    """Whether this service is to get no new requests any more."""
    return stopping() or since() is not None


def since() -> float | None:
    """For how many seconds the file has been there; None: there is none."""
    try:
        return None if _file is None else max(time.time() - _file.stat().st_mtime, 0.0)
    except OSError:
        return None


def say() -> None:
    """Make the file, if there is none: its age counts. Raises OSError: the workers share no folder, or it cannot be
    written to."""
    if _file is None:
        raise OSError("the workers share no folder")
    with contextlib.suppress(FileExistsError):
        _file.touch(0o600, exist_ok=False)


def take_back() -> None:
    """Remove the file, if there is one. Raises OSError."""
    if _file is not None:
        _file.unlink(missing_ok=True)
