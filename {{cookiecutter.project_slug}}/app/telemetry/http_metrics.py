"""Metrics of the HTTP server in one worker.

metrics_server.py adds up those of all workers.
"""

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sized

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.utils import floatToGoString

from app.settings import Settings
from app.telemetry.exemplars import Exemplars
from app.telemetry.process_metrics import dropped_log_lines
from app.telemetry.stdout import LOG_LINES

#: Maximum age of counts that are not in the files yet; the metrics process waits for them.
FLUSH_SECONDS = 0.1
DURATION = "http_server_request_duration_seconds"
LABELS = ("http_request_method", "http_route", "http_response_status_code")
#: Seconds to days: streams last.
STREAM_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)
STREAM_LABELS = ("kind", "http_route")
#: The route of the requests beyond `METRICS_MAX_LABEL_SETS`.
OTHER_ROUTE = "_OTHER"
#: The routes that are always counted by name: few, and the alerts select them.
_ALWAYS_NAMED = ("unmatched", "/health/")

logger = logging.getLogger("app.metrics")


class RouteCap:
    """Admits the routes of new label sets, up to `METRICS_MAX_LABEL_SETS` of them.

    Each label set needs 4 kB of /dev/shm in each worker, and 0.3 ms of each scrape.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.admitted = 0
        self.is_logged = False

    def __call__(self, route: str) -> str:
        """Return the route under which a new label set is counted: its own, or `_OTHER`."""
        if route.startswith(_ALWAYS_NAMED):
            return route
        if self.admitted < self.maximum:
            self.admitted += 1
            return route
        if not self.is_logged:
            self.is_logged = True
            text = "METRICS_MAX_LABEL_SETS=%d reached: further routes are counted as %s, from %s on"
            logger.warning(text, self.maximum, OTHER_ROUTE, route)
        return OTHER_ROUTE


class HttpMetrics:
    """The metrics of HTTP requests, named by OpenTelemetry's semantic conventions.

    A request adds to plain lists. A timer flushes them into prometheus_client's files, which costs
    more than counting.

    The metrics are made here, in a registry of their own, and not at import: a process that makes
    several applications, such as a test run, makes them several times.
    """

    def __init__(
        self, settings: Settings, in_flight: Sized, stream_counts: Mapping[str, int]
    ) -> None:
        """`in_flight`: the requests being served; its length is the gauge.

        `stream_counts`: the number of open streams by kind.
        """
        registry = CollectorRegistry()
        self.buckets = settings.metrics_buckets
        #: The upper bounds as in the label `le`.
        self.bounds = tuple(floatToGoString(bound) for bound in (*self.buckets, float("inf")))
        text = "Duration of HTTP server requests."
        self.duration = Histogram(DURATION, text, LABELS, buckets=self.buckets, registry=registry)
        self.exemplars = Exemplars()
        text = "Requests being served now."
        self.active = _sum_of_workers("http_server_active_requests", text, registry)
        text = "Requests that may be served at once; more are rejected with 503."
        limit = _sum_of_workers("http_server_active_requests_limit", text, registry)
        limit.set(settings.max_in_flight)
        self._make_stream_metrics(registry)
        text = "Exceptions that nothing handled: bugs."
        self.unhandled = Counter("http_server_unhandled_exceptions", text, registry=registry)
        text = "Access lines dropped because stdout did not accept them."
        self.dropped_lines = Counter("access_log_dropped_lines", text, registry=registry)
        self.dropped_log_lines = dropped_log_lines(registry)
        self.in_flight = in_flight
        self.stream_counts = stream_counts
        #: By method, route and status: the requests in each bucket, then their seconds in total.
        self.counts: dict[tuple[str, str, int], list[float]] = {}
        self.admit_route = RouteCap(settings.metrics_max_label_sets)
        self.is_flush_scheduled = False

    def _make_stream_metrics(self, registry: CollectorRegistry) -> None:
        text = "Streams and WebSockets that are open now."
        self.active_streams = _sum_of_workers("http_server_active_streams", text, registry, "kind")
        name = "http_server_stream_duration_seconds"
        text = "Duration of streams and WebSockets."
        self.stream_duration = Histogram(
            name, text, STREAM_LABELS, buckets=STREAM_BUCKETS, registry=registry
        )
        #: By kind and route: the streams that have been counted.
        self.streams: set[tuple[str, str]] = set()

    def schedule_flush(self) -> None:
        """Flush within `FLUSH_SECONDS`."""
        if not self.is_flush_scheduled:
            self.is_flush_scheduled = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def record(self, labels: tuple[str, str, int], seconds: float) -> None:
        """Count a request by method, route and status."""
        counts = self.counts.get(labels) or self._new_counts(labels)
        counts[bisect_left(self.buckets, seconds)] += 1
        counts[-1] += seconds
        if not self.is_flush_scheduled:
            self.schedule_flush()

    def record_trace(
        self, labels: tuple[str, str, int], seconds: float, ids: Mapping[str, str]
    ) -> None:
        """Keep a request that is traced as the exemplar of its bucket, until the next one."""
        if labels not in self.counts:
            labels = (labels[0], OTHER_ROUTE, labels[2])
        self.exemplars.note(labels, self.bounds[bisect_left(self.buckets, seconds)], seconds, ids)

    def record_stream(self, kind: str, route: str, seconds: float) -> None:
        """Count a stream that has ended."""
        if (kind, route) not in self.streams:
            route = self.admit_route(route)
            self.streams.add((kind, route))
        self.stream_duration.labels(kind, route).observe(seconds)
        if not self.is_flush_scheduled:
            self.schedule_flush()

    def flush(self) -> None:
        """Add the counts since the last flush to the files of this worker."""
        self.is_flush_scheduled = False
        self.active.set(len(self.in_flight))
        for kind, count in self.stream_counts.items():
            self.active_streams.labels(kind).set(count)
        self.dropped_log_lines.inc(LOG_LINES.take_dropped())
        for labels, counts in self.counts.items():
            if counts[-1]:
                self._add(labels, counts)
                counts[:] = [0] * len(counts)
        if self.exemplars.is_changed:
            self.exemplars.write()

    def _new_counts(self, labels: tuple[str, str, int]) -> list[float]:
        """Return the counts of labels that are not counted by name yet."""
        method, route, status = labels
        admitted = (method, self.admit_route(route), status)
        return self.counts.setdefault(admitted, [0] * (len(self.buckets) + 2))

    def _add(self, labels: tuple[str, str, int], counts: list[float]) -> None:
        """Add counts to the histogram: it has no public method to observe many at once."""
        child = self.duration.labels(*map(str, labels))
        child._sum.inc(counts[-1])
        for bucket, count in zip(child._buckets, counts, strict=False):
            if count:
                bucket.inc(count)


def _sum_of_workers(name: str, text: str, registry: CollectorRegistry, *labels: str) -> Gauge:
    """Return a new gauge, whose value is the sum over the workers that run."""
    return Gauge(name, text, labels, registry=registry, multiprocess_mode="livesum")
