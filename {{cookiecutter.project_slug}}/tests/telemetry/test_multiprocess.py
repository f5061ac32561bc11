"""Metrics of several processes: dead ones stay counted, instances stay separate.

The modes of gauges: https://prometheus.github.io/client_python/multiprocess/
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.telemetry import metric_files, metrics_directory, multiprocess
from app.telemetry.http_metrics import LABELS
from app.telemetry.multiprocess import WorkersCollector
from tests.service_process import PROJECT

#: Runs code in a process with metrics, and waits until its standard input is closed.
PROCESS = """
import sys
from prometheus_client import Counter, Gauge, Histogram, Summary
import app
exec(sys.argv[1])
print("done", flush=True)
sys.stdin.read()
"""
COUNT_ONE_REQUEST = """
from app.settings import Settings
from app.telemetry.http_metrics import HttpMetrics
settings = Settings(max_in_flight=9)
metrics = HttpMetrics(settings, in_flight=["one request"], stream_counts={"stream": 1})
metrics.is_flush_scheduled = True  # there is no event loop
metrics.record(("GET", "/", 200), 1)
metrics.flush()
"""
SERVE = 'Gauge("worker_processes", "", multiprocess_mode="livesum").set(1)'
SET_GAUGE = 'Gauge("g", "", multiprocess_mode="{}").set({})'


@contextlib.contextmanager
def running(directory: Path, code: str) -> Iterator[int]:
    """Run a process during the block; yield its pid."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    command = [sys.executable, "-c", PROCESS, code]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdin=pipe, stdout=pipe
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"done\n"
        yield process.pid
        process.stdin.close()
        assert process.wait() == 0


def run(directory: Path, code: str) -> int:
    """Run a process to its end; return its pid."""
    with running(directory, code) as pid:
        return pid


def collect(collector: WorkersCollector) -> dict[str, float]:
    """Return the value of each sample but the buckets, with its labels."""
    values = {}
    for metric in collector.collect():
        for sample in metric.samples:
            labels = json.dumps(sample.labels) if sample.labels else ""
            values[sample.name + labels] = sample.value
    return {name: value for name, value in values.items() if "_bucket" not in name}


@pytest.fixture
def collector(tmp_path: Path) -> WorkersCollector:
    return WorkersCollector(tmp_path)


def test_dead_workers_are_archived_in_one_file_per_kind(
    collector: WorkersCollector, tmp_path: Path
) -> None:
    for _ in range(3):
        run(tmp_path, COUNT_ONE_REQUEST)
        collector.archive_dead()
    with running(tmp_path, COUNT_ONE_REQUEST) as pid:
        values = ("GET", "200", "/")
        labels = json.dumps(dict(zip(sorted(LABELS), values, strict=True)))
        expected = {
            f"http_server_request_duration_seconds_count{labels}": 4,
            f"http_server_request_duration_seconds_sum{labels}": 4,
            "http_server_active_requests": 1,
            "http_server_active_requests_limit": 9,
            "http_server_unhandled_exceptions_total": 0,
            'http_server_active_streams{"kind": "stream"}': 1,
            "access_log_dropped_lines_total": 0,
            "log_dropped_lines_total": 0,
        }
        assert collect(collector) == expected
        collector.archive_dead()
        assert collect(collector) == expected
        assert {path.name for path in tmp_path.glob("*")} == {
            "counter_archive.db",
            "histogram_archive.db",
            f"counter_{pid}.db",
            f"histogram_{pid}.db",
            f"gauge_livesum_{pid}.db",
        }


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("sum", 12), ("min", 3), ("max", 5), ("mostrecent", 4), ("livesum", None), ("livemin", None)],
)
def test_gauges_of_dead_processes_keep_their_value(
    collector: WorkersCollector, tmp_path: Path, mode: str, expected: float | None
) -> None:
    """Before they are archived and after, by the rule of their mode."""
    for value in (5, 3, 4):
        run(tmp_path, SET_GAUGE.format(mode, value))
    assert collect(collector).get("g") == expected
    collector.archive_dead()
    assert collect(collector).get("g") == expected
    with running(tmp_path, f'Gauge("g", "", multiprocess_mode="{mode}")'):
        # A process that has not set the gauge does not change it.
        assert collect(collector).get("g") == (0 if expected is None else expected)


def test_gauges_of_mode_all_are_bounded_in_number(
    collector: WorkersCollector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocess, "MAX_DEAD_PROCESSES", 2)
    pids = []
    for value in (1, 2, 3):
        pids.append(run(tmp_path, SET_GAUGE.format("all", value)))
        collector.archive_dead()
    with running(tmp_path, SET_GAUGE.format("all", 4)) as pid:
        expected = {pids[1]: 2, pids[2]: 3, pid: 4}
        assert collect(collector) == {
            'g{"pid": "' + str(pid) + '"}': value for pid, value in expected.items()
        }


def test_counters_and_summaries_of_dead_processes_are_added_up(
    collector: WorkersCollector, tmp_path: Path
) -> None:
    code = 'Counter("c", "", ["a"]).labels("é").inc(2); Summary("s", "").observe(3)'
    for _ in range(2):
        run(tmp_path, code)
    expected = {'c_total{"a": "\\u00e9"}': 4, "s_count": 2, "s_sum": 6}
    assert collect(collector) == expected
    collector.archive_dead()
    assert collect(collector) == expected


def test_live_gauges_count_only_workers_that_serve(
    collector: WorkersCollector, tmp_path: Path
) -> None:
    """Not a process that a worker has started; its counters do count."""
    gauge = SET_GAUGE.format("livemin", 0) + '; Counter("c", "").inc()'
    with running(tmp_path, gauge):
        # No process says that it is a worker: each may be one.
        assert collect(collector) == {"g": 0, "c_total": 1}
        with running(tmp_path, f"{SERVE}; {SET_GAUGE.format('livemin', 1)}"):
            assert collect(collector) == {"worker_processes": 1, "g": 1, "c_total": 1}


def test_gauge_that_no_process_has_set_is_zero(collector: WorkersCollector, tmp_path: Path) -> None:
    with running(tmp_path, 'Gauge("g", "", multiprocess_mode="min")'):
        assert collect(collector) == {"g": 0}


def test_forked_child_writes_only_what_it_changes(
    collector: WorkersCollector, tmp_path: Path
) -> None:
    code = (
        'import os; a = Counter("a", ""); b = Counter("b", ""); a.inc(); b.inc()\n'
        "if not (pid := os.fork()): a.inc(); os._exit(0)\n"
        "os.waitpid(pid, 0)"
    )
    with running(tmp_path, code) as pid:
        (child,) = set(tmp_path.glob("*.db")) - {tmp_path / f"counter_{pid}.db"}
        assert child.stat().st_size < 100
        assert collect(collector) == {"a_total": 2, "b_total": 1}
        collector.archive_dead()
        assert not child.exists()
        assert collect(collector) == {"a_total": 2, "b_total": 1}


def test_empty_file_of_a_starting_worker_is_ignored(
    collector: WorkersCollector, tmp_path: Path
) -> None:
    """A worker creates its file empty, and a scrape may come in between."""
    run(tmp_path, COUNT_ONE_REQUEST)
    before = collect(collector)
    (tmp_path / "histogram_1.db").touch()
    assert collect(collector) == before


def test_archive_that_cannot_be_written_keeps_every_count(
    collector: WorkersCollector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    run(tmp_path, 'Counter("c", "").inc()')
    collector.archive_dead()
    run(tmp_path, 'Counter("c", "").inc()')
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        patch.setattr(multiprocess, "_makes_room", lambda *_: False)
        collector.archive_dead()
        collector.archive_dead()
    assert collect(collector) == {"c_total": 2}
    collector.archive_dead()
    assert collect(collector) == {"c_total": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["counter_archive.db"]
    archive = tmp_path / "counter_archive.new"
    assert caplog.messages == [
        f"cannot archive metrics: {archive}: No space left on device",
        "metrics are archived again",
    ]


def test_values_are_kept_in_memory_while_they_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    directory = tmp_path / "absent"
    file = metric_files.MetricFile(str(directory / "counter_1.db"))
    try:
        assert file.read_value("key") == (0, 0)
        file.write_value("key", 1, 0)
        assert file.read_value("key") == (1, 0)
        metric_files.retry_writes()
        metric_files.retry_writes()
        directory.mkdir()
        metric_files.retry_writes()
        assert file.read_value("key") == (1, 0)
        assert metric_files.read_entries(Path(file.path)) == {"key": (1, 0)}
    finally:
        file.close()
    assert caplog.messages == [
        f"metrics are incomplete: cannot write {file.path}: No such file or directory",
        "metrics are complete again",
    ]


# The directory


def test_files_of_an_earlier_run_are_deleted(collector: WorkersCollector, tmp_path: Path) -> None:
    run(tmp_path, COUNT_ONE_REQUEST)
    metrics_directory.claim_directory(tmp_path).close()
    assert collect(collector) == {}


def test_second_instance_cannot_claim_the_directory(tmp_path: Path) -> None:
    owner = metrics_directory.claim_directory(tmp_path)
    with pytest.raises(BlockingIOError):
        metrics_directory.claim_directory(tmp_path)
    owner.close()
    metrics_directory.claim_directory(tmp_path).close()


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parent of private directories."""
    monkeypatch.setattr(metrics_directory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setenv(metrics_directory.VARIABLE, "")
    return tmp_path


def test_private_directory_is_deleted_once_its_owner_is_dead(parent: Path) -> None:
    unrelated = parent / "metrics-of-the-team"
    unrelated.mkdir()
    first = metrics_directory.claim(None)
    second = metrics_directory.claim(None)
    assert second.path.exists()
    assert first.path.exists()
    assert first.owner
    # As the kernel does when the processes of the first are killed
    first.owner.close()
    metrics_directory.remove_abandoned()
    second.release()
    assert list(parent.iterdir()) == [unrelated]


def test_start_without_any_directory_costs_the_metrics_only(
    parent: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_directory, "claim_directory", full)
    directory = metrics_directory.claim(None)
    assert directory.owner is None
    directory.release()
    configured = metrics_directory.claim(parent)
    assert configured.path == parent
    configured.release()
    assert len(caplog.messages) == 2
    assert all("No space left on device" in message for message in caplog.messages)
