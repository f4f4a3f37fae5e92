"""What is counted, under which names. Without prometheus_client everything here does nothing.

A mounted relay's metrics are in prometheus_client's default registry, so that a shop that exposes that one has them.
The service runs several workers: each writes into files of a common folder (PROMETHEUS_MULTIPROC_DIR, which
relay.gunicorn_conf makes), and whoever is asked adds them up.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from relay import errors
from relay.record import REASONS

if TYPE_CHECKING:
    from relay.record import Record

#: Seconds. An answer's first byte: from a cached one to a model that thinks for minutes.
_FIRST_BYTE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
#: A stream's whole life: from a refusal to hours.
_LIFE = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)
#: The longest silence within one: around the timeouts of the proxies that one meets (30, 60, 100, 300).
_GAP = (0.1, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 100, 300)

NAMES = (
    "relay_open_streams",
    "relay_requests_total",
    "relay_streams_ended_total",
    "relay_refused_total",
    "relay_first_byte_seconds",
    "relay_stream_seconds",
    "relay_longest_gap_seconds",
    "relay_relayed_bytes_total",
    "relay_heartbeats_total",
    "relay_tokens_total",
    "relay_upstream_reachable",
    "relay_upstream_key_accepted",
    "relay_limits_errors_total",
    "relay_log_lines_lost_total",
)

#: What prometheus_client names a process's files by, and their size when it makes them: ten times what a relay needs.
_FILES = ("counter", "histogram", "gauge_livesum", "gauge_livemostrecent")
_FILE_SIZE = 64 * 1024

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The relay's metrics in one process."""

    def __init__(self) -> None:
        self._on = False
        try:
            import prometheus_client as prometheus
        except ModuleNotFoundError:
            return
        try:
            _take_room(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
            self._make(prometheus)
        except OSError as error:
            logging.getLogger("relay").warning(
                "this process has no metrics: PROMETHEUS_MULTIPROC_DIR has no room for their files (%s)", error
            )
        except Exception as error:  # noqa: BLE001 - older than 0.18, or not itself: no reason to fail a request
            logging.getLogger("relay").warning(
                "there are no metrics: prometheus_client cannot make them (%s); 0.18 can", error
            )
        else:
            self._on = True

    def _make(self, prometheus: Any) -> None:
        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        mount = ["mount"]
        self._open = gauge("relay_open_streams", "Streams open now.", mount, multiprocess_mode="livesum")
        self._requests = counter("relay_requests", "Relayed requests by the status answered.", [*mount, "status"])
        self._ended = counter("relay_streams_ended", "Streams by the reason of their end.", [*mount, "reason"])
        self._refused = counter("relay_refused", "Requests that the relay refused, by its error's code.", ["reason"])
        self._first_byte = histogram(
            "relay_first_byte_seconds", "From a request to the upstream's answer to it.", mount, buckets=_FIRST_BYTE
        )
        self._seconds = histogram("relay_stream_seconds", "How long streams lasted.", mount, buckets=_LIFE)
        self._gap = histogram(
            "relay_longest_gap_seconds", "The longest silence of the upstream within a stream.", mount, buckets=_GAP
        )
        self._bytes = counter("relay_relayed_bytes", "Body bytes that came from upstream.", mount)
        self._tokens = counter("relay_tokens", "Tokens that answers reported.", [*mount, "kind"])
        self._heartbeats = counter("relay_heartbeats", "Comments that were sent in the upstream's silence.", mount)
        self._reachable = gauge(
            "relay_upstream_reachable", "1: the upstream answered lately.", mount, multiprocess_mode="livemostrecent"
        )
        self._key = gauge(
            "relay_upstream_key_accepted", "1: it took the key lately.", mount, multiprocess_mode="livemostrecent"
        )
        self._limits_errors = counter(
            "relay_limits_errors", "Questions to RELAY_LIMITS_URL without an answer: requests, streams, renewals."
        )
        self._lines_lost = counter("relay_log_lines_lost", "Lines of the log that nobody could take.")
        self._labelled: dict[tuple[Any, ...], Any] = {}

    def _child(self, metric: Any, *labels: str | int) -> Any:
        """A metric with these labels; looked up once, since `labels` takes locks and checks."""
        key = (metric, *labels)
        child = self._labelled.get(key)
        if child is None:
            child = self._labelled[key] = metric.labels(*labels)
        return child

    def prepare(self, mount: str) -> None:
        """Have every series of a mount, at 0: a rate over one that begins with its first event misses that event."""
        if not self._on:
            return
        for metric in (self._open, self._seconds, self._first_byte, self._gap, self._bytes, self._heartbeats):
            self._child(metric, mount)
        for reason in REASONS:
            self._child(self._ended, mount, reason)
        for kind in ("input", "output", "cache_read", "cache_write"):
            self._child(self._tokens, mount, kind)
        for code in errors.codes():
            self._child(self._refused, code)
        self._child(self._requests, mount, 200)

    def opened(self, mount: str) -> None:
        if self._on:
            self._child(self._open, mount).inc()

    def ended(self, record: Record) -> None:
        """A stream that `opened` was called for has ended."""
        if not self._on:
            return
        mount = record.mount
        self._child(self._open, mount).dec()
        self._child(self._requests, mount, record.status).inc()
        self._child(self._ended, mount, record.reason).inc()
        self._child(self._seconds, mount).observe(record.seconds)
        if record.first_byte is not None:
            self._child(self._first_byte, mount).observe(record.first_byte)
            self._child(self._gap, mount).observe(record.longest_gap)
        if record.bytes:
            self._child(self._bytes, mount).inc(record.bytes)
        if record.heartbeats:
            self._child(self._heartbeats, mount).inc(record.heartbeats)
        if record.usage is not None:
            usage = record.usage
            for kind, tokens in (
                ("input", usage.input_tokens),
                ("output", usage.output_tokens),
                ("cache_read", usage.cache_read_tokens),
                ("cache_write", usage.cache_write_tokens),
            ):
                if tokens:
                    self._child(self._tokens, mount, kind).inc(tokens)

    def refused(self, reason: str) -> None:
        """The relay answered a request itself, with the error of this code."""
        if self._on:
            self._child(self._refused, reason).inc()

    def limits_failed(self) -> None:
        """Something passed uncounted, because whoever counts did not answer."""
        if self._on:
            self._limits_errors.inc()

    def log_line_lost(self) -> None:
        """A line of the log could not be written."""
        if self._on:
            self._lines_lost.inc()

    def upstream(self, mount: str, *, reachable: bool, key_accepted: bool | None) -> None:
        """What the latest evidence says of the upstream. `key_accepted` None: it says nothing of the key."""
        if self._on:
            self._reachable.labels(mount).set(reachable)
            if key_accepted is not None:
                self._key.labels(mount).set(key_accepted)

    def expose(self) -> bytes:
        """All metrics of the service in Prometheus' text format, those of its other workers included."""
        if not self._on:
            return b""
        import prometheus_client as prometheus

        registry = prometheus.REGISTRY
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            from prometheus_client.multiprocess import MultiProcessCollector

            registry = prometheus.CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return prometheus.generate_latest(registry)


def _take_room(folder: str | None) -> None:
    """Have the disk hold this process's files of values before prometheus_client maps them into memory: a process that
    writes where a full disk has no room for it is killed by SIGBUS. Raises OSError if it has none."""
    if folder is None or not hasattr(os, "posix_fallocate"):
        return
    made = []
    try:
        for kind in _FILES:
            path = os.path.join(folder, f"{kind}_{os.getpid()}.db")  # noqa: PTH118 - as prometheus_client names it
            ours = not os.path.exists(path)  # noqa: PTH110 - an app may have metrics of its own in it
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if ours:
                made.append(path)
            try:
                os.posix_fallocate(descriptor, 0, _FILE_SIZE)
            finally:
                os.close(descriptor)
    except OSError:
        for path in made:
            os.unlink(path)  # noqa: PTH108
        raise


_metrics: Metrics | None = None
_making = threading.Lock()


def metrics() -> Metrics:
    """This process's metrics. Made at the first call, so that a forked worker has files of its own."""
    global _metrics  # noqa: PLW0603 - prometheus_client's registry is one for the process, too
    if _metrics is None:
        with _making:  # the first requests may come in several threads at once, and names can be registered once
            if _metrics is None:
                _metrics = Metrics()
    return _metrics
