"""What the server that runs an app cannot guarantee to a stream, and what to do about it: told once, in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relay.observe import log
from relay.stream import waiting
from relay.stream.waiting.client_socket import watchable

_told: set[str] = set()  # by this process, whose server is the same for all its relays


def warn(
    environ: Mapping[str, Any], client: Any, *, streams: int | None, most: int = 0, threads: int | None = None
) -> None:
    """Log what is missing here, each of it once per process.

    `client`: the client's socket, or None. `streams`: how many a relay allows at a time where nobody has set anything.
    `most` and `threads`: RELAY_MAX_STREAMS (0: unset) and RELAY_THREADS.
    """
    for sentence in missing(environ, client, streams=streams, most=most, threads=threads):
        if sentence not in _told:
            _told.add(sentence)
            log.logger.warning("%s", sentence)


def missing(
    environ: Mapping[str, Any], client: Any, *, streams: int | None, most: int = 0, threads: int | None = None
) -> list[str]:
    """What this server lacks, by the environ of a request to it (PEP 3333)."""
    software = _software(environ)
    lacks = []
    if not waiting.cooperative():
        if (of_threads := _of_threads(environ, software, streams)) is not None:
            lacks.append(of_threads)
        elif threads is not None and most >= threads:
            lacks.append(
                f"RELAY_MAX_STREAMS is {most} and RELAY_THREADS {threads}: with so many open streams no thread is left "
                "for the rest of the app. Set RELAY_MAX_STREAMS below it, or leave it unset."
            )
    if client is None and environ.get("HTTP_VERSION") != "2":
        lacks.append(
            f"The server ({software}) does not show the relay its clients' sockets: a client that leaves is noticed "
            "only at the next write to it, such as a heartbeat (RELAY_HEARTBEAT), one that takes nothing is never cut "
            "off (RELAY_WRITE_TIMEOUT), and a stream that was cut may look whole. gunicorn with -k gevent or "
            "-k gthread, and Flask's own server, show them."
        )
    elif not watchable(client):
        lacks.append(
            f"The server ({software}) speaks TLS or HTTP/2 itself, where the relay cannot see that a client has left: "
            "it is noticed only at the next write, such as a heartbeat (RELAY_HEARTBEAT). Let a proxy in front, such "
            "as nginx, end TLS and speak HTTP/1.1 to this server."
        )
    return lacks


def _of_threads(environ: Mapping[str, Any], software: str, streams: int | None) -> str | None:
    if not environ.get("wsgi.multithread"):
        killed = ", and --timeout (30 s unless it is set) kills it with its worker" if software == "gunicorn" else ""
        return (
            f"The server ({software}) serves one request at a time in each process: an open stream keeps all others "
            f"waiting{killed}. Use gunicorn with -k gevent, or with -k gthread and --threads."
        )
    if streams is None:
        return None
    return (
        f"The relay serves {streams} streams at a time: on this server ({software}) each takes a thread, and the rest "
        "of the app needs some too. Set RELAY_THREADS to the number of the server's threads (gunicorn's and "
        "waitress's --threads) and a quarter of them is left to it; or use gevent workers."
    )


def _software(environ: Mapping[str, Any]) -> str:
    """The server's name without its version; not all say it."""
    return str(environ.get("SERVER_SOFTWARE") or "unnamed").partition("/")[0]
