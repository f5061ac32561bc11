"""The counts of dead workers are kept, folded into one file; folders are not shared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.telemetry import multiprocess
from tests.service_process import PROJECT

COUNT = """
from app.telemetry.http_metrics import HttpMetrics
metrics = HttpMetrics(in_flight=["one request"])
metrics.is_scheduled = True
metrics.record(("GET", "/", 200), 1)
metrics.flush()
"""


def worker(folder: Path) -> int:
    """Run a process that counts one request; return its pid."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    process = subprocess.Popen([sys.executable, "-c", COUNT], cwd=PROJECT, env=environment)
    assert process.wait() == 0
    return process.pid


def counted(folder: Path) -> dict[str, float]:
    samples = [
        sample
        for metric in multiprocess.WorkersCollector(folder).collect()
        for sample in metric.samples
    ]
    return {sample.name: sample.value for sample in samples if not sample.name.endswith("_bucket")}


def test_the_dead_keep_their_counts_in_one_file(tmp_path: Path) -> None:
    multiprocess.claim_directory(tmp_path).close()
    for _ in range(3):
        multiprocess.archive_worker(tmp_path, worker(tmp_path))
    living = worker(tmp_path)
    assert counted(tmp_path) == {
        "http_server_request_duration_seconds_count": 4,
        "http_server_request_duration_seconds_sum": 4,
        "http_server_active_requests": 1,
        "access_log_dropped_lines_total": 0,
    }
    left = {path.name for path in tmp_path.glob("*.db")}
    archives, files = (
        {"counter_archive.db", "histogram_archive.db"},
        {"counter", "histogram", "gauge_livesum"},
    )
    assert left == archives | {f"{kind}_{living}.db" for kind in files}


def test_a_file_that_a_worker_has_just_made_is_passed_over(tmp_path: Path) -> None:
    worker(tmp_path)
    before = counted(tmp_path)
    (tmp_path / "histogram_1.db").touch()
    assert counted(tmp_path) == before


def test_an_earlier_run_is_forgotten(tmp_path: Path) -> None:
    worker(tmp_path)
    multiprocess.claim_directory(tmp_path).close()
    assert counted(tmp_path) == {}


def test_two_instances_cannot_share_a_folder(tmp_path: Path) -> None:
    owner = multiprocess.claim_directory(tmp_path)
    with pytest.raises(BlockingIOError):
        multiprocess.claim_directory(tmp_path)
    owner.close()
    multiprocess.claim_directory(tmp_path).close()
