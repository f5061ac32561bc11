"""Metrics of the real gunicorn: on a full file system, and of every type in every life of a worker.

Sources: prometheus_client's documentation of its multi-process mode
(https://prometheus.github.io/client_python/multiprocess/) and of its types, which are made at
module level; mmap(2): a store to a page that cannot be provided raises SIGBUS.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from app.telemetry.metric_files import encode_entries, read_entries
from app.telemetry.multiprocess import WorkersCollector
from scripts.dev_services import Redis
from tests.metric_routes import LIVE_MODES, MODES
from tests.service_process import Service, eventually, serving

METRIC_ROUTES = "tests.metric_routes:app"
#: Gauges of each live mode that no running process has set
UNSET = [[0], [0], [0], [0], []]
SHARED_MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture
def tmpfs(directory: Path) -> Iterator[Path]:
    """A tmpfs of 16 MB, as large as /dev/shm in deploy/k8s."""
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=1777", "none", str(directory)]
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    mounted = False
    with contextlib.suppress(FileNotFoundError):
        mounted = subprocess.run([*sudo, *command], check=False).returncode == 0
    if not mounted:
        pytest.skip("only root can mount a tmpfs")
    yield directory
    subprocess.run([*sudo, "umount", "-l", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Use every byte of the file system; return the file to delete."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def scrape(service: Service) -> dict[str, list[float]]:
    """Return the values of each metric, one for each of its series."""
    found: dict[str, list[float]] = {}
    for name, value in re.findall(r"^(\w+)(?:{.*})? (.+)$", service.metrics(), re.MULTILINE):
        found.setdefault(name, []).append(float(value))
    return {name: sorted(each) for name, each in found.items()}


def values(service: Service, name: str) -> list[float]:
    return scrape(service).get(name, [])


def gauges(found: dict[str, list[float]], prefix: str, modes: Iterable[str]) -> list[list[float]]:
    """Return the values of the gauges of each mode."""
    return [found.get(f"{prefix}_{mode}", []) for mode in modes]


def request_both_workers(service: Service, path: str) -> tuple[list[int], int]:
    """Request a path until both workers have responded; return their pids and the requests."""
    pids: set[int] = set()
    requests = 0
    while len(pids) < 2:
        response = service.get(path)
        assert response.status_code == 200
        pids.add(response.json())
        requests += 1
    return sorted(pids), requests


def processes_with_files(directory: Path) -> set[int]:
    names = [path.stem.rpartition("_")[2] for path in directory.glob("*.db")]
    return {int(name) for name in names if name != "archive"}


# Metrics at module level


def test_metrics_at_module_level_survive_recycling_and_reload(
    urls: dict[str, str], directory: Path
) -> None:
    """Each type and mode, declared or set at import, with the value that its documentation gives.

    all: one series for each process, dead ones included. min, max, sum and mostrecent: of
    all processes, dead ones included. live: of those that run.
    """
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    with serving(METRIC_ROUTES, **variables, **urls) as service:
        service.wait()
        service.wait_for_workers()
        found = scrape(service)
        assert found["orders_total"] == [0]
        assert set(found["gauge_sum"] + found["gauge_liveall"]) == {0}

        pids, requests = request_both_workers(service, "/update?value=3")

        def check(live: int) -> None:
            """Check every metric while this many of the workers run that have set them."""
            found = scrape(service)
            assert found["orders_total"] == [requests]
            assert found["imports_total"] == [5]
            assert found["times_count"] == [requests]
            assert found["times_sum"] == [requests * 3]
            assert found["sizes_sum"] == [requests * 3]
            assert found["sizes_bucket"] == [0, requests, requests]
            # Of the master, which runs
            assert gauges(found, "imported", MODES + LIVE_MODES) == [[7]] * 10
            assert gauges(found, "gauge", MODES) == [[3, 3], [3], [3], [6], [3]]
            expected = [[3] * live, [3], [3], [3 * live], [3]]
            assert gauges(found, "gauge", LIVE_MODES) == (expected if live else UNSET)

        check(live=2)
        os.kill(pids[0], signal.SIGTERM)
        eventually(lambda: not psutil.pid_exists(pids[0]))
        check(live=1)
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: not psutil.pid_exists(pids[1]))
        check(live=0)
        eventually(lambda: not processes_with_files(directory) & set(pids))
        check(live=0)
        assert {line["level"] for line in service.lines} == {"info"}, service.text


# Processes that are not workers


@pytest.mark.parametrize("path", ["/fork", "/pool"])
def test_children_of_workers_count_but_have_no_live_gauges(
    urls: dict[str, str], directory: Path, path: str
) -> None:
    """A child inherits the gauges of its worker; `multiprocessing` and os.fork make such ones."""
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(directory), "WEB_CONCURRENCY": "1"}
    with serving(METRIC_ROUTES, **variables, **urls) as service:
        service.wait()
        service.get("/update?value=3")
        child = service.get(path).json()
        eventually(lambda: values(service, "orders_total") == [2])

        def check() -> None:
            found = scrape(service)
            assert found["worker_processes"] == [1]
            assert len(found["worker_resident_memory_bytes"]) == 1
            assert set(found["dependency_up"]) == {1}
            assert gauges(found, "gauge", LIVE_MODES) == [[3]] * 5
            assert found["gauge_min"] == [-1]

        eventually(lambda: set(values(service, "dependency_up")) == {1})
        check()
        assert child in processes_with_files(directory)
        os.kill(child, signal.SIGKILL)
        eventually(lambda: child not in processes_with_files(directory))
        check()
        assert values(service, "orders_total") == [2]


# A full file system


def test_full_file_system_costs_no_request_and_no_count(urls: dict[str, str], tmpfs: Path) -> None:
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmpfs)}
    with serving(METRIC_ROUTES, **variables, **urls) as service:
        service.wait()
        service.wait_for_workers()
        pids, before = request_both_workers(service, "/label?text=before")
        assert values(service, "labels_total") == [before]
        filler = fill(tmpfs)

        texts = [letter * 5000 for letter in "abc"]
        for text in texts:
            request_both_workers(service, f"/label?text={text}")
        eventually(lambda: len(warnings(service)) == 2)
        os.kill(pids[0], signal.SIGKILL)
        service.wait_for_workers(3)
        # The archive of the killed worker cannot be written; its files count.
        _, again = request_both_workers(service, "/label?text=before")
        eventually(lambda: values(service, "labels_total")[-1] >= before)
        assert service.metrics()
        assert "SIGBUS" not in service.text

        filler.unlink()
        eventually(lambda: "metrics are complete again" in service.messages)
        # Those of the worker that was not killed, and both of `before`
        eventually(lambda: len(values(service, "labels_total")) == 1 + len(texts))
        eventually(lambda: pids[0] not in processes_with_files(tmpfs))
        total = before + again
        assert 'labels_total{text="before"} ' + f"{total}.0" in service.metrics()
        messages = warnings(service)
        assert all("No space left on device" in message for message in messages)
        assert len(messages) == len(set(messages)) <= 4, messages


def test_dead_processes_that_fill_the_file_system_are_archived(tmpfs: Path) -> None:
    """A new archive needs the space of the files that it replaces."""
    entries = {json.dumps(["a", "a_total", {"b": str(n)}, ""]): (1.0, 0.0) for n in range(5000)}
    archive = tmpfs / "counter_archive.db"
    archive.write_bytes(encode_entries(entries))
    no_process = 2**22 + 1
    dead = tmpfs / f"counter_{no_process}.db"
    dead.write_bytes(encode_entries(entries))
    fill(tmpfs)
    WorkersCollector(tmpfs).archive_dead()
    assert not dead.exists()
    assert set(read_entries(archive).values()) == {(2.0, 0.0)}


def test_start_on_a_full_file_system_recovers_by_itself(urls: dict[str, str], tmpfs: Path) -> None:
    filler = fill(tmpfs)
    variables = {"PROMETHEUS_MULTIPROC_DIR": str(tmpfs)}
    with serving(METRIC_ROUTES, **variables, **urls) as service:
        service.wait()
        service.wait_for_workers()
        assert service.get("/health/live").status_code == 200
        _, requests = request_both_workers(service, "/update?value=3")
        lines = service.metrics().splitlines()
        # Only the metrics of the control group, which need no file.
        assert all(line.startswith("cgroup_") for line in lines if not line.startswith("#"))
        # The master's; the workers know it from the master.
        assert len(warnings(service)) == 1
        filler.unlink()
        eventually(lambda: values(service, "orders_total") == [requests])
        eventually(lambda: values(service, "imports_total") == [5])
        eventually(lambda: service.messages.count("metrics are complete again") == 3)
        assert len(warnings(service)) == 1


def warnings(service: Service) -> list[str]:
    """Return the lines about metrics that cannot be written or archived."""
    lines = [line for line in service.lines if line["logger"] == "app.metrics"]
    return [line["message"] for line in lines if line["level"] == "warning"]


# The private directory


def test_directory_of_a_killed_master_is_deleted_by_the_next_start(urls: dict[str, str]) -> None:
    def directories(service: Service) -> list[Path]:
        return list(SHARED_MEMORY.glob(f"metrics-{service.process.pid}-*"))

    with serving(**urls) as running, serving(**urls) as killed:
        running.wait()
        killed.wait()
        children = psutil.Process(killed.process.pid).children(recursive=True)
        killed.process.kill()
        killed.process.wait()
        assert len(directories(killed)) == 1
        # Until they notice it, they use the directory.
        psutil.wait_procs(children, 30)
        with serving(**urls) as following:
            following.wait()
            eventually(lambda: directories(killed) == [])
            assert len(directories(running)) == 1
            assert len(directories(following)) == 1


def test_failed_import_leaves_no_directory(urls: dict[str, str]) -> None:
    """The directory is made before the application is imported."""
    with serving("tests.absent:app", **urls) as service:
        assert service.process.wait(60) != 0
        assert list(SHARED_MEMORY.glob(f"metrics-{service.process.pid}-*")) == []


def test_metrics_directory_that_disappears_costs_no_request(
    urls: dict[str, str], directory: Path
) -> None:
    with serving(METRIC_ROUTES, PROMETHEUS_MULTIPROC_DIR=str(directory), **urls) as service:
        service.wait()
        service.wait_for_workers()
        shutil.rmtree(directory)
        request_both_workers(service, "/update?value=3")
        assert service.http.get(f"http://127.0.0.1:{service.metrics_port}/metrics").is_success
        eventually(lambda: any("No such file" in message for message in warnings(service)))
