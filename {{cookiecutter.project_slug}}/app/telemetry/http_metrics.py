"""What a worker counts, in the Prometheus metrics that metrics_server.py serves."""

import asyncio
from bisect import bisect_left
from collections.abc import Sized

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Seconds, as OpenTelemetry's conventions advise for `http.server.request.duration`.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
#: After which a worker hands over what it has counted; the metrics process waits for that.
FLUSH_SECONDS = 0.1


class HttpMetrics:
    """The metrics of the HTTP server, named as OpenTelemetry's semantic conventions name them.

    A request adds to plain lists; a timer folds these into prometheus_client's files, which costs more than counting.
    """

    def __init__(self, in_flight: Sized) -> None:
        """Take what knows how many requests are being served."""
        registry = CollectorRegistry()
        labels = ["http_request_method", "http_route", "http_response_status_code"]
        name, text = "http_server_request_duration_seconds", "Duration of HTTP server requests."
        self.duration = Histogram(name, text, labels, buckets=BUCKETS, registry=registry)
        name, text = "http_server_active_requests", "Requests being served now."
        self.active = Gauge(name, text, registry=registry, multiprocess_mode="livesum")
        name, text = (
            "access_log_dropped_lines",
            "Access lines that were dropped since nobody read stdout.",
        )
        self.dropped_lines = Counter(name, text, registry=registry)
        self.in_flight = in_flight
        self.counts: dict[
            tuple[str, str, int], list[float]
        ] = {}  # for each bucket, then the seconds in all
        self.is_flush_scheduled = False

    def schedule_flush(self) -> None:
        """Fold soon."""
        if not self.is_flush_scheduled:
            self.is_flush_scheduled = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def record(self, labels: tuple[str, str, int], seconds: float) -> None:
        """Count a request by method, route and status."""
        counts = self.counts.get(labels)
        if counts is None:
            counts = self.counts[labels] = [0] * (len(BUCKETS) + 2)
        counts[bisect_left(BUCKETS, seconds)] += 1
        counts[-1] += seconds
        if not self.is_flush_scheduled:
            self.schedule_flush()

    def flush(self) -> None:
        """Hand over what was counted since the last time."""
        self.is_flush_scheduled = False
        self.active.set(len(self.in_flight))
        for labels, counts in self.counts.items():
            if counts[-1]:
                child = self.duration.labels(*map(str, labels))
                child._sum.inc(counts[-1])  # it has no public way to observe many at once
                for bucket, number in zip(child._buckets, counts, strict=False):
                    if number:
                        bucket.inc(number)
                counts[:] = [0] * len(counts)
