"""gunicorn's configuration for the relay: `gunicorn -c python:relay.gunicorn_conf` from any folder.

Importing it patches the process for gevent and reads the environment, so nothing but gunicorn (and gunicorn.conf.py
beside a checkout) should. With a faulty setting it says which and ends with status 78 (EX_CONFIG), no traceback. What
a SIGHUP can change is looked at before it touches anything (`_reload`).
"""

# First, before anything can import urllib3: a TLS class picked up before gevent has patched it ends in a
# RecursionError at the first HTTPS request.
from gevent import monkey

monkey.patch_all()

import contextlib  # noqa: E402
import fcntl  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from relay.gate.keys import short_keys  # noqa: E402
from relay.service import cpus, load, open_streams  # noqa: E402
from relay.settings import (  # noqa: E402
    Settings,
    SettingsError,
    environment,
)
from relay.shared import lame_duck, reports  # noqa: E402
from relay.version import __version__, on_disk  # noqa: E402

#: Streams a worker takes when RELAY_MAX_STREAMS is not set.
_STREAMS = 900
#: Open files a worker is given at most: far more than 2 for each of 900 streams, far less than what some containers
#: call unlimited (a billion), over which programs like to loop.
_FILES = 65_536

_running: dict[str, Any] = {}
#: What a reload would begin to use, as it was when it was last used.
_used: dict[str, object] = {}
_folders: list[str] = []  # that go when the service ends
#: Free bytes below which a folder in memory is passed over for one on the disk.
_ROOM = 4 * 1024 * 1024
_LOCK = "alive"  # the file in each that is locked until then
#: The environment and its settings as they are used.
_as_given: dict[str, Any] = {}


def configure() -> dict[str, Any]:
    """Every gunicorn setting that the relay chooses, by name. In brackets: the default that each replaces."""
    try:
        values, settings, workers = _read()
    except SettingsError as fault:
        if _running:
            return _running  # it has become faulty since the reload looked at it
        print(fault, file=sys.stderr, flush=True)  # noqa: T201 - no log exists yet
        sys.exit(os.EX_CONFIG)
    _hold(values, settings)
    streams = settings.max_streams or _STREAMS

    _running.update(
        {
            # What is served when the command line names no application. [none]
            "wsgi_app": "relay.service.app:create_app()",
            # Two listeners, each with a pool of connections of its own: health and metrics answer on the second even
            # when the first is full. [127.0.0.1:8000]
            "bind": [settings.bind, *([settings.admin_bind] if settings.admin_bind else [])],
            # One process for each CPU that it may use; a container's quota counts, the host's CPUs do not. [1]
            "workers": workers,
            # gunicorn's gevent worker, where an open stream costs a greenlet and not a thread, and a drain. [sync]
            "worker_class": "relay.worker.Worker",
            # Connections to each listener and worker: when they are used up, accepting stops and everybody waits in
            # the dark. So twice the streams: the rest are idle keep-alive connections, requests that wait for a slot,
            # and those that are told at once that there is none. Of these a relay with few streams has as many, and
            # RELAY_QUEUE counts from the accept on. [1000]
            "worker_connections": 2 * max(streams, _STREAMS) + 200,
            # Connections that the kernel holds while all workers are busy: a burst of clients that reconnect at once.
            # The kernel lowers it to net.core.somaxconn. [2048]
            "backlog": 4096,
            # A worker whose event loop has not turned for so long is killed. It says nothing about how long a stream
            # may take: the loop turns on while streams wait. [30]
            "timeout": 60,
            # After SIGTERM or a reload the relay ends what is still open at RELAY_DRAIN, with an error frame; gunicorn
            # kills what is left, with nothing. It must come second. [30]
            "graceful_timeout": math.ceil(settings.drain) + 5,
            # Idle client connections. Longer than the proxy in front keeps them (nginx/snippets/relay-upstream.conf:
            # 3 s) and clients without one do (httpx 5 s, Node 5 s, aiohttp 15 s, a load balancer 60 s): the side that
            # closes first must be the one that sends requests, or a request meets a closed connection. [2]
            "keepalive": math.ceil(settings.keepalive),
            # EventSource can only put what it has to say into the URL. 8190 is the most that gunicorn allows. [4094]
            "limit_request_line": 8190,
            # One header, its name included; 8 KiB is a common limit, and must fit. [8190]
            "limit_request_field_size": 16_380,
            # Streams live for hours; a worker that is due for a restart stops accepting until its last one ends.
            # [0, spelled out because many guides set it]
            "max_requests": 0,
            # Loading the application in the master would open its connections there, before the fork. [False]
            "preload_app": False,
            # With a socket for each worker, connections wait in the queue of a full one while another is idle. [False]
            "reuse_port": False,
            # Who is speaking, and over which scheme, is decided in one place: RELAY_TRUSTED_PROXIES. gunicorn's own
            # opinion could differ from it (SCRIPT_NAME moves routes; two scheme headers make an HTML 400).
            # [127.0.0.1,::1; SCRIPT_NAME,PATH_INFO; X-Forwarded-Proto and two more]
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "secure_scheme_headers": {},
            # The same parser wherever it runs: `auto` takes gunicorn_h1c if something else has installed it. [auto]
            "http_parser": "python",
            # Inside gunicorn HTTP/2 serves one stream of a connection at a time: nginx ends it. [h1]
            "http_protocols": "h1",
            # Each worker touches a file once a second; on a disk that is busy this blocks the loop, and with it all
            # streams. [the temporary folder]
            "worker_tmp_dir": _memory_folder(),
            # Nobody here uses gunicornc, and its socket is one more way in. [False]
            "control_socket_disable": True,
            # The relay logs each request itself, when it has ended: gunicorn's line would have its query, and with it
            # prompts and tickets. [None: off]
            "accesslog": None,
            # Shown by ps and top, if setproctitle is installed. [gunicorn]
            "proc_name": "relay",
            "on_starting": _start,
            "when_ready": _be_lame_first,
            "child_exit": _worker_ended,
            "on_exit": _end,
        }
    )
    return _running


def _read() -> tuple[dict[str, str], Settings, int]:
    """The environment, its settings and the number of workers, as they are now. Raises SettingsError."""
    values = environment.read()
    return values, Settings.from_mapping(values, service=True), _workers(values)


def _hold(values: dict[str, str], settings: Settings) -> None:
    # Client keys out of a file as they are now: a file that is faulty when a worker is replaced must not keep it from
    # starting. What is held has the keys in its place.
    _as_given.update(values=values, settings=settings)
    environment.hold({**values, "RELAY_CLIENT_KEYS": settings.client_keys} if settings.client_keys else values)


def _reload(server: Any, reload: Callable[[], None]) -> None:
    """On SIGHUP: have gunicorn `reload`, which drains all workers, if something has changed and can change so.

    gunicorn asks nobody before it does: a reload that changes nothing would end all streams at RELAY_DRAIN, and one
    that changes an address would close the listeners.
    """
    if lame_duck.stopping():
        server.log.error("Not reloaded: the service is about to stop")
        return
    try:
        _, settings, workers = _read()
    except SettingsError as fault:
        server.log.error("Not reloaded, running on as before:\n%s", fault)  # noqa: TRY400 - it says all
        return
    moved = [
        f"{name} is {now}, and the service listens on {before}"
        for name, now, before in (
            ("RELAY_BIND", settings.bind, _as_given["settings"].bind),
            ("RELAY_ADMIN_BIND", settings.admin_bind, _as_given["settings"].admin_bind),
        )
        if now != before
    ]
    installed = on_disk()
    if moved:
        server.log.error("Not reloaded: %s. An address can only change in a restart.", "; ".join(moved))
    elif installed != __version__:
        server.log.error(
            "Not reloaded: relay %s is installed and %s runs, which a reload would mix. Restart, or send SIGUSR2.",
            installed,
            __version__,
        )
    elif _in_use(server, settings, workers) == _used:
        server.log.info("Not reloaded: nothing has changed")
    else:
        globals().update(configure())  # `-c python:relay.gunicorn_conf` does not run this file again
        _used.clear()
        _used.update(_in_use(server, settings, workers))
        reload()


def _in_use(server: Any, settings: Settings, workers: int) -> dict[str, object]:
    """What a reload would begin to use: the settings, and what stands in the files that they and gunicorn name."""
    files = [settings.upstream_ca, settings.upstream_cert, server.cfg.config]
    found: dict[str, object] = {"settings": settings, "workers": workers}
    for file in filter(None, files):
        with contextlib.suppress(OSError):
            found[str(file)] = Path(str(file)).read_bytes()
    return found


def _workers(values: dict[str, str]) -> int:
    text = values.get("WEB_CONCURRENCY", "").strip()
    if not text:
        return cpus.allowed()
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise SettingsError((f"WEB_CONCURRENCY = {text!r}: must be a number of workers, 1 to 1024",))
    return int(text)


def _memory_folder() -> str | None:
    folder = Path("/dev/shm")  # noqa: S108 - gunicorn makes an unnamed file there
    return str(folder) if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else None


def _start(server: Any) -> None:
    _used.update(_in_use(server, _as_given["settings"], _workers(_as_given["values"])))
    server.reload = partial(_reload, server, server.reload)  # gunicorn has no hook that can say no
    _raise_file_limit()
    load.share(server.cfg.workers)
    _tell_what_is_counted_apart(server)
    if seen := environment.open_to_others(_as_given["values"]):
        server.log.warning(seen)
    if weak := short_keys(_as_given["settings"].client_keys):
        server.log.warning(weak)
    # Workers count into files that whoever is asked for the metrics adds up. Each start begins with an empty folder:
    # files of an earlier one would be added too.
    _share(server, "PROMETHEUS_MULTIPROC_DIR", "relay-metrics-", "metrics are those of the worker that is asked")
    # Where workers leave word for each other: that a client has reported in, and what each has open.
    _share(server, reports.FOLDER, "relay-run-", "each worker knows of its own streams and tickets only")
    try:
        lame_duck.share()
    except OSError as error:
        server.log.error("A drain cannot be asked for by POST /drain or a file: %s", error)  # noqa: TRY400


def _be_lame_first(server: Any) -> None:
    """Have SIGTERM stop the master RELAY_LAME_DUCK later, and a second one at once. Until then all goes on, but for the
    workers, who are not ready any more."""
    stop: Any = signal.getsignal(signal.SIGTERM)

    def leave(sig: int, frame: object) -> None:
        if os.getpid() != server.pid or server.reexec_pid or server.master_pid:
            # A worker that has just been made and has no handlers of its own yet; or, after SIGUSR2, one of two
            # masters: the other accepts from the same addresses, and no balancer needs to look elsewhere.
            stop(sig, frame)
            return
        left = _as_given["settings"].lame_duck - (lame_duck.since() or 0.0)
        again = lame_duck.stopping()
        lame_duck.begin(lasts=left > 0)
        if left <= 0 or again:
            stop(sig, frame)
        else:
            signal.setitimer(signal.ITIMER_REAL, left)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, lambda _sig, frame: stop(signal.SIGTERM, frame))


def _share(server: Any, variable: str, prefix: str, without: str) -> None:
    """Name a folder for all workers in this variable, unless the operator has. A full disk must not keep it from
    serving."""
    if variable in os.environ:
        return
    try:
        memory = _memory_folder()
        full = memory is None or shutil.disk_usage(memory).free < _ROOM
        os.environ[variable] = _own_folder(Path(tempfile.gettempdir() if full or memory is None else memory), prefix)
    except OSError as error:
        server.log.error("No folder for what workers share can be made (%s): %s", error, without)  # noqa: TRY400


def _own_folder(parent: Path, prefix: str) -> str:
    """A new folder for this user alone, which goes when the service ends; or, if it is killed, when one starts again.

    A lock tells the living from the dead, in other containers that share the memory too; the kernel gives it up with
    the last process that has it. Raises OSError.
    """
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid == os.geteuid() and not _alive(left):
                shutil.rmtree(left)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    _folders.append(folder)
    # Locked before it has its name, so that nobody finds it unlocked. It stays open, in the workers too.
    unnamed = Path(folder, f".{_LOCK}")
    fcntl.flock(os.open(unnamed, os.O_WRONLY | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    unnamed.rename(Path(folder, _LOCK))
    return folder


def _alive(folder: Path) -> bool:
    """Whether a service still has this folder. Raises OSError if it has no lock, or not yet."""
    descriptor = os.open(folder / _LOCK, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _tell_what_is_counted_apart(server: Any) -> None:
    settings: Settings = _as_given["settings"]
    workers = server.cfg.workers
    limits = {
        "RELAY_RATE_LIMIT": settings.rate_limit is not None,
        "RELAY_MAX_STREAMS_PER_CLIENT": settings.max_streams_per_client > 0,
    }
    if any(limits.values()) and workers > 1 and not settings.shares_limits:
        server.log.warning(
            "%s: each of the %d workers counts for itself, so that a client may have up to %d times as much. "
            "RELAY_LIMITS_URL=redis://... lets them count together.",
            " and ".join(name for name, on in limits.items() if on),
            workers,
            workers,
        )


def _worker_ended(_server: object, worker: Any) -> None:
    with contextlib.suppress(OSError):  # a folder that cannot be written to
        open_streams.forget(worker.pid)
    load.forget(worker.age)
    # A worker that was killed cannot take back its open streams. Its counters stay: they must never go down.
    try:
        from prometheus_client.multiprocess import mark_process_dead
    except ModuleNotFoundError:
        return
    mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def _end(_server: object) -> None:
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)


def _raise_file_limit() -> None:
    # The usual soft limit of 1024 is less than 900 streams need: each is a client's socket and an upstream's. Only the
    # soft one is raised, which everybody may; workers inherit it.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(_FILES, 3 * int(_running["worker_connections"]))
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


globals().update(configure())
