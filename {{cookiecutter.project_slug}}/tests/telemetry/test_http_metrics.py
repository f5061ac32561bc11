"""The metrics of requests: their buckets, and their number of label sets.

Sources: https://prometheus.io/docs/practices/instrumentation/ (every label set has a cost), and
README.md, "Metrics".
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric

from app.settings import Settings
from app.sizing.plan import EXITED_WORKERS, metrics_bytes
from app.telemetry.http_metrics import HttpMetrics
from tests.service_process import PROJECT

#: Counts a request of each of the default number of label sets, in a process with files.
COUNT_ALL_LABEL_SETS = """
import app
from app.settings import Settings
from app.telemetry.http_metrics import HttpMetrics
settings = Settings()
metrics = HttpMetrics(settings, in_flight=[], stream_counts={})
metrics.is_flush_scheduled = True  # there is no event loop
for number in range(2 * settings.metrics_max_label_sets):
    route = f"/organizations/{number:04}/resources/{'x' * 12}"
    metrics.record(("DELETE", route, 200), 0.003)
metrics.flush()
"""


def metrics_of(**settings: Any) -> HttpMetrics:
    metrics = HttpMetrics(Settings(**settings), in_flight=[], stream_counts={})
    metrics.is_flush_scheduled = True  # there is no event loop
    return metrics


def count(metrics: HttpMetrics, *requests: tuple[str, str, int]) -> None:
    for labels in requests:
        metrics.record(labels, 0.2)


def samples(metric: Any, suffix: str) -> Iterator[tuple[dict[str, str], float]]:
    """Yield labels and value of each sample whose name has the suffix."""
    collected: list[Metric] = list(metric.collect())
    for sample in collected[0].samples:
        if sample.name.endswith(suffix):
            yield dict(sample.labels), sample.value


def counted(metrics: HttpMetrics) -> dict[tuple[str, str], float]:
    """Return the number of requests by route and status."""
    metrics.flush()
    names = ("http_route", "http_response_status_code")
    return {
        (labels[names[0]], labels[names[1]]): value
        for labels, value in samples(metrics.duration, "_count")
    }


def test_routes_beyond_the_cap_are_counted_together_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = metrics_of(metrics_max_label_sets=2)
    with caplog.at_level(logging.WARNING, "app.metrics"):
        count(metrics, ("GET", "/a", 200), ("GET", "/a", 404))
        assert caplog.messages == []
        count(metrics, ("GET", "/b", 200), ("GET", "/c", 200), ("GET", "/c", 404))
        count(metrics, ("GET", "/a", 200))
    assert counted(metrics) == {
        ("/a", "200"): 2,
        ("/a", "404"): 1,
        ("_OTHER", "200"): 2,
        ("_OTHER", "404"): 1,
    }
    assert caplog.messages == [
        "METRICS_MAX_LABEL_SETS=2 reached: further routes are counted as _OTHER, from /b on"
    ]


def test_probes_and_unmatched_paths_keep_their_names_beyond_the_cap() -> None:
    """The alerts select them by name."""
    metrics = metrics_of(metrics_max_label_sets=1)
    count(metrics, ("GET", "/a", 200), ("GET", "unmatched", 503), ("GET", "/health/ready", 503))
    assert set(counted(metrics)) == {("/a", "200"), ("unmatched", "503"), ("/health/ready", "503")}


def test_streams_count_towards_the_cap() -> None:
    metrics = metrics_of(metrics_max_label_sets=1)
    for route in ("/a", "/b", "/a", "/c"):
        metrics.record_stream("stream", route, 2)
    found = samples(metrics.stream_duration, "_count")
    seen = {labels["http_route"]: value for labels, value in found}
    assert seen == {"/a": 2, "_OTHER": 2}


def test_exemplar_beyond_the_cap_belongs_to_the_series_that_counts_it() -> None:
    metrics = metrics_of(metrics_max_label_sets=1)
    for route in ("/a", "/b"):
        count(metrics, ("GET", route, 200))
        ids = {"trace_id": route, "span_id": route}
        metrics.record_trace(("GET", route, 200), 0.2, ids)
    assert set(metrics.exemplars.newest) == {
        (("GET", "/a", 200), "0.25"),
        (("GET", "_OTHER", 200), "0.25"),
    }


def test_buckets_are_those_of_the_setting() -> None:
    metrics = metrics_of(metrics_buckets="0.1, 0.5")
    count(metrics, ("GET", "/a", 200))
    metrics.flush()
    buckets = {labels["le"]: value for labels, value in samples(metrics.duration, "_bucket")}
    assert buckets == {"0.1": 0, "0.5": 1, "+Inf": 1}


def test_label_sets_up_to_the_cap_use_less_than_4_mb_of_a_worker(tmp_path: Path) -> None:
    """With routes of 40 characters; and `make doctor` plans no less."""
    subprocess.run(
        [sys.executable, "-c", COUNT_ALL_LABEL_SETS],
        cwd=PROJECT,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        check=True,
    )
    used = sum(path.stat().st_size for path in tmp_path.glob("*.db"))
    planned = metrics_bytes(Settings(), workers=1) / (1 + EXITED_WORKERS)
    assert 0.8 * planned < used < planned < 4_000_000
