"""Ask the probes and the metrics, at a rate that the service does not feel.

A probe costs a worker 0.3 ms of CPU. A scrape costs the metrics process 6 ms with two workers, and
more with each: 0.25 ms for a worker and a kilobyte are assumed, as measured with two. So a service
with many workers is scraped less often, and the view costs less than 1 % of its CPUs.
"""

import contextlib
import http.client
import json
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from scripts.watch.changes import Changes
from scripts.watch.exposition import Metrics
from scripts.watch.sample import sample
from scripts.watch.view import View

PROBE_SECONDS = 0.6
SCRAPE_SECONDS = 0.9
#: For scrapes that cost more than `CPU_SHARE` at that rate.
MAX_SCRAPE_SECONDS = 10.0
CPU_SHARE = 0.007
SCRAPE_CPU_SECONDS = 0.00025
#: A probe without a response for this time is shown as waiting.
WAITING_SECONDS = 0.3
TIMEOUT_SECONDS = 5.0
#: Rates and quantiles are those of this time.
WINDOW_SECONDS = 2.0


class Polling:
    """Feeds a view with the state of one service."""

    def __init__(self, view: View, service: str, metrics: list[str]) -> None:
        """`metrics`: the URLs of the service's metrics, and of processes that belong to it."""
        self.view = view
        self.service = service.rstrip("/")
        self.metrics = metrics
        self.changes = Changes()
        self.scrapes: deque[tuple[float, Metrics]] = deque()
        view.add("setup", [{"service": self.service, "metrics": metrics}])

    def start(self) -> None:
        """Poll in threads, until the process ends."""
        for action in (self.probe, self.scrape):
            threading.Thread(target=_repeat, args=(action,), daemon=True).start()

    def probe(self) -> float:
        """Send a readiness probe; return the time until the next."""
        start = time.monotonic()
        found: dict[str, Any] = {"state": "down", "failed": []}
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            found = _probe(f"{self.service}/health/ready", self._show_waiting)
        self._show_probe(found | {"ms": round((time.monotonic() - start) * 1000, 1)})
        return PROBE_SECONDS

    def _show_waiting(self) -> None:
        self._show_probe({"state": "waiting", "failed": [], "ms": WAITING_SECONDS * 1000})

    def _show_probe(self, probe: dict[str, Any]) -> None:
        self.view.add("probe", [probe])
        self.view.add("event", self.changes.of_probe(probe))

    def scrape(self) -> float:
        """Scrape the metrics; return the time until the next."""
        texts = [text for text in map(_fetch, self.metrics) if text]
        if not texts:
            self.scrapes.clear()
            self.view.add("sample", [{"is_reachable": False}])
            return SCRAPE_SECONDS
        now = Metrics(texts[0])
        for text in texts[1:]:
            _add_series(now, Metrics(text))
        self._show_sample(time.monotonic(), now)
        return pause_seconds(now)

    def _show_sample(self, time: float, now: Metrics) -> None:
        while len(self.scrapes) > 1 and self.scrapes[1][0] <= time - WINDOW_SECONDS:
            self.scrapes.popleft()
        # The first sample has no rates.
        then, before = self.scrapes[0] if self.scrapes else (time - 1, now)
        self.scrapes.append((time, now))
        found = sample(now, before, time - then)
        self.view.add("sample", [{"is_reachable": True, **found}])
        self.view.add("event", self.changes.of_sample(found))


def pause_seconds(metrics: Metrics) -> float:
    """Return the time between scrapes that cost at most `CPU_SHARE` of the service's CPUs."""
    workers = metrics.total("worker_processes") or 1
    cpus = metrics.total("cgroup_cpu_limit") or 1
    cost = SCRAPE_CPU_SECONDS * workers * metrics.size / 1_000
    return min(max(cost / (CPU_SHARE * cpus), SCRAPE_SECONDS), MAX_SCRAPE_SECONDS)


def _add_series(metrics: Metrics, others: Metrics) -> None:
    """Add the metrics that only another process of the service has."""
    metrics.size += others.size
    for name, series in others.series.items():
        metrics.series.setdefault(name, series)


def _repeat(action: Callable[[], float]) -> None:
    """Run an action forever, from start to start at the interval that it returns."""
    while True:
        start = time.monotonic()
        interval = action()
        time.sleep(max(interval - (time.monotonic() - start), 0.05))


def _connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    """Send a GET request on a new connection, as kubelets and scrapers do."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=TIMEOUT_SECONDS)
    connection.request("GET", parts.path, headers={"Connection": "close"})
    return connection, parts.path


def _probe(url: str, on_waiting: Callable[[], None]) -> dict[str, Any]:
    connection, _ = _connect(url)
    with contextlib.closing(connection):
        is_readable, _, _ = select.select([connection.sock], [], [], WAITING_SECONDS)
        if not is_readable:
            on_waiting()
        response = connection.getresponse()
        body = json.loads(response.read())
    state = body["status"] if body["status"] in {"ready", "draining"} else "not_ready"
    checks = body.get("checks", {})
    failed = [name for name, check in checks.items() if check["status"] != "healthy"]
    return {"state": state, "failed": failed}


def _fetch(url: str) -> str:
    """Return the text of metrics, or an empty one."""
    try:
        connection, _ = _connect(url)
        with contextlib.closing(connection):
            response = connection.getresponse()
            return response.read().decode() if response.status == http.client.OK else ""
    except (OSError, http.client.HTTPException, ValueError):
        return ""
