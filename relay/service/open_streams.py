"""The open streams of all workers, for `GET /streams` on the admin address. No address, key or prompt is among it.

Each worker listens on a Unix socket in the folder that they share, and tells whoever connects what it has open; whoever
is asked for the list asks them all. So the list is as fresh as the question, and costs nothing while nobody asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from relay.observe import log
from relay.shared import reports
from relay.stream.drain import drain

#: Seconds that a worker has to answer in: one that is busy for longer shows as silent.
_PATIENCE = 1.0

Entries = list[dict[str, Any]]


def here() -> Entries:
    """The open streams of this process, the oldest first."""
    reports = [stream.report() for stream in list(drain.open) if hasattr(stream, "report")]
    return sorted(reports, key=lambda report: -report["age_s"])


def everywhere() -> tuple[Entries, list[int]]:
    """The open streams of all workers, and the process ids of those that did not answer in time."""
    found: dict[int, Entries] = {os.getpid(): here()}
    asked: dict[int, threading.Thread] = {}
    for path in _sockets():
        pid = int(path.stem.partition("-")[2])
        if pid not in found:
            asked[pid] = threading.Thread(target=_ask, args=(path, pid, found), daemon=True)
            asked[pid].start()
    give_up = time.monotonic() + _PATIENCE
    for thread in asked.values():
        thread.join(max(give_up - time.monotonic(), 0))
    answered = [entry for entries in list(found.values()) for entry in entries]
    return sorted(answered, key=lambda report: -report["age_s"]), sorted(asked.keys() - found.keys())


def serve() -> None:
    """Answer the other workers from now on, if there is a folder that is shared with them."""
    if reports.FOLDER not in os.environ:
        return
    listener = socket.socket(socket.AF_UNIX)
    try:
        reports.folder()  # made, if the operator has named one that is not there
        path = _socket_of(os.getpid())
        path.unlink(missing_ok=True)
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        log.logger.error("the other workers cannot ask this one for its open streams: %s", error)
        return
    listener.listen(16)
    threading.Thread(target=_answer, args=(listener,), name="relay-listing", daemon=True).start()


def forget(pid: int) -> None:
    """The worker of this process id has ended."""
    if reports.FOLDER in os.environ:
        _socket_of(pid).unlink(missing_ok=True)


def _answer(listener: socket.socket) -> None:
    while True:
        try:
            asker, _ = listener.accept()
            with asker:
                asker.settimeout(_PATIENCE)
                asker.sendall(json.dumps(here()).encode())
        except OSError:
            time.sleep(0.1)  # the asker has left, or there are no file descriptors


def _ask(path: Path, pid: int, found: dict[int, Entries]) -> None:
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as worker:
        worker.settimeout(_PATIENCE)
        try:
            worker.connect(str(path))
        except ConnectionRefusedError:
            found[pid] = []  # it has ended
            return
        with worker.makefile("rb") as answer:
            found[pid] = json.loads(answer.read())


def _socket_of(pid: int) -> Path:
    return Path(os.environ[reports.FOLDER], f"streams-{pid}.sock")


def _sockets() -> list[Path]:
    folder = os.environ.get(reports.FOLDER)
    return sorted(Path(folder).glob("streams-*.sock")) if folder else []
