"""Metrics of several workers: dead ones stay counted, instances stay separate."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.telemetry import multiprocess
from tests.service_process import PROJECT

COUNT_ONE_REQUEST = """
from app.telemetry.http_metrics import HttpMetrics
metrics = HttpMetrics(in_flight=["one request"])
metrics.is_flush_scheduled = True  # there is no event loop
metrics.record(("GET", "/", 200), 1)
metrics.flush()
"""


def run_worker(directory: Path) -> int:
    """Run a process that counts one request; return its pid."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", COUNT_ONE_REQUEST]
    process = subprocess.Popen(command, cwd=PROJECT, env=environment)
    assert process.wait() == 0
    return process.pid


def collect(directory: Path) -> dict[str, float]:
    """Return the value of each sample but the buckets."""
    metrics = multiprocess.WorkersCollector(directory).collect()
    samples = [sample for metric in metrics for sample in metric.samples]
    return {sample.name: sample.value for sample in samples if not sample.name.endswith("_bucket")}


def test_dead_workers_are_archived_in_one_file_per_kind(tmp_path: Path) -> None:
    multiprocess.claim_directory(tmp_path).close()
    for _ in range(3):
        multiprocess.archive_worker(tmp_path, run_worker(tmp_path))
    running = run_worker(tmp_path)
    assert collect(tmp_path) == {
        "http_server_request_duration_seconds_count": 4,
        "http_server_request_duration_seconds_sum": 4,
        "http_server_active_requests": 1,
        "access_log_dropped_lines_total": 0,
        "log_dropped_lines_total": 0,
    }
    assert {path.name for path in tmp_path.glob("*.db")} == {
        "counter_archive.db",
        "histogram_archive.db",
        f"counter_{running}.db",
        f"histogram_{running}.db",
        f"gauge_livesum_{running}.db",
    }


def test_empty_file_of_a_starting_worker_is_ignored(tmp_path: Path) -> None:
    """A worker creates its file empty, and a scrape may come in between."""
    run_worker(tmp_path)
    before = collect(tmp_path)
    (tmp_path / "histogram_1.db").touch()
    assert collect(tmp_path) == before


def test_files_of_an_earlier_run_are_deleted(tmp_path: Path) -> None:
    run_worker(tmp_path)
    multiprocess.claim_directory(tmp_path).close()
    assert collect(tmp_path) == {}


def test_second_instance_cannot_claim_the_directory(tmp_path: Path) -> None:
    owner = multiprocess.claim_directory(tmp_path)
    with pytest.raises(BlockingIOError):
        multiprocess.claim_directory(tmp_path)
    owner.close()
    multiprocess.claim_directory(tmp_path).close()
