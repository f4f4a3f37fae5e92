"""Clients that report in: whether one still does, whichever worker of the host its report has come to.

Each stream that wants to know has a small file in a folder that all workers share: named by the stream's id, which
nobody can guess, and holding its process and a digest of its owner. Whoever gets a report touches it; the stream looks
at its time. No HTTP, no Flask.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
import time
from pathlib import Path

#: Where relay.gunicorn_conf tells its workers of the folder that they share.
FOLDER = "SSE_RELAY_RUN_DIR"

_ID = re.compile(r"[0-9a-f]{32}")
#: Seconds between two looks at a file.
_LOOK = 1.0

_swept: set[str] = set()


def folder() -> Path:
    """The folder that all workers of this service share, or else all processes of this user; made if need be.

    Raises OSError if it is not this user's alone: its name is known, and others may have made it.
    """
    given = os.environ.get(FOLDER)
    path = Path(given) if given else Path(tempfile.gettempdir(), f"flask-sse-relay-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(f"{path} must be a folder that belongs to this user alone (mode 0700)")
    return path


def is_id(text: str) -> bool:
    """Whether this may be a stream's id. Nothing else becomes a file's name."""
    return _ID.fullmatch(text) is not None


class Presence:
    """One stream's client. Until its first report it need not report at all."""

    def __init__(self, owner: str, within: float) -> None:
        """`owner`: who may report. `within`: seconds from one report to the next at the latest."""
        self.id = os.urandom(16).hex()
        self._within = within
        self._path: Path | None = None
        self._seen = 0  # the file's time when it was looked at last, nanoseconds; 0: no report yet
        self._reported = 0.0  # when that was first seen, monotonic seconds
        #: When to look again, monotonic seconds.
        self.look_at = time.monotonic() + _LOOK
        # On a full disk the stream goes on, and no report can come.
        with contextlib.suppress(OSError):
            path = _swept_folder() / self.id
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(descriptor, f"{os.getpid()} {_digest(owner, self.id)}".encode())
                os.utime(descriptor, (0, 0))
            finally:
                os.close(descriptor)
            self._path = path

    def missed(self) -> bool:
        """Whether the client has reported in before and has not for too long. Looks once a second at most."""
        now = time.monotonic()
        if now >= self.look_at:
            self.look_at = now + _LOOK
            try:
                seen = self._path.stat().st_mtime_ns if self._path is not None else 0
            except OSError:
                seen = self._seen  # somebody has cleaned up: no report can come any more
            if seen != self._seen:
                self._seen, self._reported = seen, now
        return self._seen != 0 and now - self._reported >= self._within

    def close(self) -> None:
        """The stream is over. Idempotent."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def report(stream_id: str, owner: str) -> bool:
    """A client reports in. False: it has no stream of this id (`is_id` must hold). Raises OSError."""
    path = folder() / stream_id
    try:
        pid, digest = path.read_text().split()
    except (OSError, ValueError):
        return False
    if digest != _digest(owner, stream_id):
        return False
    if not _lives(int(pid)):
        path.unlink(missing_ok=True)
        return False
    try:
        os.utime(path)
    except OSError:
        return False  # it has ended meanwhile
    return True


def _swept_folder() -> Path:
    """The folder; at the first call in a process without what killed workers have left in it."""
    path = folder()
    if str(path) not in _swept:
        _swept.add(str(path))
        for file in path.iterdir():
            if is_id(file.name):
                with contextlib.suppress(OSError, ValueError, IndexError):  # a full disk leaves it empty
                    pid = int(file.read_text().split()[0])
                    if not _lives(pid):
                        file.unlink()
    return path


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _digest(owner: str, stream_id: str) -> str:
    return hashlib.sha256(f"{stream_id} {owner}".encode("utf-8", "surrogateescape")).hexdigest()
