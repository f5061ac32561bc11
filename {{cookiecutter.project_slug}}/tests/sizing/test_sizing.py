"""The size of a pod: detected resources, the plan, conflicting settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.sizing.checks import check_settings, default_replicas
from app.sizing.plan import plan_workers
from app.sizing.resources import Resources, detect_resources
from tests.service_process import PROJECT

MB = 1 << 20
CGROUPS = "sys/fs/cgroup"


def write_files(root: Path, files: dict[str, str]) -> None:
    """Write files below a root; their names are paths."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_cgroup_v2_limits_are_read(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod\n",
        f"{CGROUPS}/pod/cpu.max": "50000 100000",
        f"{CGROUPS}/pod/memory.max": str(256 * MB),
    }
    write_files(tmp_path, files)
    resources = detect_resources(tmp_path)
    assert resources.cpus == 0.5
    assert resources.memory_bytes == 256 * MB
    assert resources.cpu_source == "cgroup v2 cpu.max"
    assert resources.memory_source == "cgroup v2 memory.max"


def test_lowest_limit_of_the_ancestors_is_used(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/slice/pod\n",
        f"{CGROUPS}/slice/cpu.max": "25000 100000",
        f"{CGROUPS}/slice/pod/cpu.max": "max 100000",
    }
    write_files(tmp_path, files)
    assert detect_resources(tmp_path).cpus == 0.25


def test_cgroup_namespace_uses_the_limit_of_the_mount(tmp_path: Path) -> None:
    """/proc then shows the path on the host, which the mount does not have."""
    files = {"proc/self/cgroup": "0::/../../host/path\n", f"{CGROUPS}/cpu.max": "10000 100000"}
    write_files(tmp_path, files)
    assert detect_resources(tmp_path).cpus == 0.1


def test_cgroup_v1_limits_are_read(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/pod\n3:cpu,cpuacct:/pod\n",
        f"{CGROUPS}/cpu,cpuacct/pod/cpu.cfs_quota_us": "150000",
        f"{CGROUPS}/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
        f"{CGROUPS}/memory/pod/memory.limit_in_bytes": str(512 * MB),
    }
    write_files(tmp_path, files)
    resources = detect_resources(tmp_path)
    host = detect_resources(Path("/nowhere"))
    assert resources.cpus == min(1.5, host.cpus)
    assert resources.memory_bytes == 512 * MB
    assert resources.memory_source == "cgroup v1 memory.limit_in_bytes"


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            f"{CGROUPS}/cpu/cpu.cfs_quota_us": "-1",
            f"{CGROUPS}/cpu/cpu.cfs_period_us": "100000",
            f"{CGROUPS}/memory/memory.limit_in_bytes": str((1 << 63) - 4096),
        },
        {
            "proc/self/cgroup": "0::/pod\n",
            f"{CGROUPS}/pod/cpu.max": "max 100000",
            f"{CGROUPS}/pod/memory.max": "max",
        },
    ],
    ids=["v1", "v2"],
)
def test_resources_of_the_host_are_used_without_limits(
    tmp_path: Path, files: dict[str, str]
) -> None:
    write_files(tmp_path, files)
    resources = detect_resources(tmp_path)
    assert resources.cpu_source == "the host's CPUs"
    assert resources.memory_source == "the host's memory"


@pytest.mark.parametrize(
    ("cpus", "megabytes", "settings", "workers"),
    [
        (2, 8192, {}, 2),
        (0.5, 8192, {}, 1),
        (1.5, 8192, {}, 1),
        (1.75, 8192, {}, 2),
        (8, 512, {}, 2),
        (8, 64, {}, 1),
        (8, 8192, {}, 8),
        (8, 8192, {"max_workers": 3}, 3),
        (2, 8192, {"workers_per_core": 2.5}, 5),
        (2, 8192, {"web_concurrency": 7, "max_workers": 3}, 7),
        (8, 512, {"worker_memory_mb": 60}, 5),
    ],
)
def test_number_of_workers(
    cpus: float, megabytes: int, settings: dict[str, Any], workers: int
) -> None:
    resources = Resources(cpus, megabytes * MB)
    assert plan_workers(Settings(**settings), resources).workers == workers


@pytest.mark.parametrize(
    ("settings", "connections"),
    [
        ({}, 8),
        ({"postgres_max_connections": 50}, 3),
        ({"postgres_max_connections": 1}, 2),
        ({"database_max_connections": 20}, 5),
        ({"database_max_connections": 1}, 2),
    ],
)
def test_connections_are_divided_among_the_workers(
    settings: dict[str, Any], connections: int
) -> None:
    resources = Resources(4, 8192 * MB)
    assert plan_workers(Settings(**settings), resources).connections_per_worker == connections


REPLICA = {"database_replica_url": "postgresql://standby/app"}
COLLECTOR = {"otel_exporter_otlp_endpoint": "http://c:4318", "environment": "production"}
TENTH = {"otel_traces_sampler": "parentbased_traceidratio", "otel_traces_sampler_arg": 0.1}


@pytest.mark.parametrize("cpus", [0.5, 1, 2, 4, 8, 16])
def test_defaults_pass_every_check(cpus: float) -> None:
    settings = Settings()
    resources = Resources(cpus, 4096 * MB)
    workers = plan_workers(settings, resources).workers
    assert check_settings(settings, resources, workers, default_replicas(workers)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"web_concurrency": 3}, "3 workers on 2 CPUs"),
        ({"worker_memory_mb": 900}, "2 workers need 1880 MB"),
        ({"worker_memory_mb": 2000, "web_concurrency": 1}, "raise the memory limit"),
        (
            {"metrics_max_label_sets": 2_000},
            "METRICS_MAX_LABEL_SETS=2000 for 2 workers and 2 that have exited need 30 MB of "
            "/dev/shm, which has 20 MB",
        ),
        ({"metrics_max_label_sets": 2_000}, "or set METRICS_MAX_LABEL_SETS=1344"),
        ({"metrics_buckets": (0.1, 1)}, "METRICS_BUCKETS=0.1,1 has no 0.5"),
        ({"worker_timeout_seconds": 0}, "WORKER_TIMEOUT_SECONDS=0"),
        ({"worker_timeout_seconds": 29}, "WORKER_TIMEOUT_SECONDS=29"),
        (
            {"request_timeout_seconds": 34},
            "exceed GRACEFUL_TIMEOUT_SECONDS=50, so the last requests are cut off",
        ),
        (
            {"database_command_timeout_seconds": 29},
            "= 30 must be less than REQUEST_TIMEOUT_SECONDS=30",
        ),
        ({"termination_grace_seconds": 59}, "SIGKILL comes first"),
        ({"max_requests": 0}, "MAX_REQUESTS=0"),
        ({"max_requests_jitter": 0}, "MAX_REQUESTS_JITTER=0"),
        ({"database_max_connections": 3}, "less than two for each of 2 workers"),
        (
            REPLICA | {"database_replica_max_connections": 3},
            "DATABASE_REPLICA_MAX_CONNECTIONS=3 of DATABASE_MAX_CONNECTIONS=16 must leave two for "
            "each of 2 workers to the primary, and two to the replica: set it to 4 to 12",
        ),
        (REPLICA | {"database_replica_max_connections": 13}, "set it to 4 to 12"),
        (REPLICA | {"database_max_connections": 7}, "set that to 8, or more"),
        (
            REPLICA | {"database_command_timeout_seconds": 14},
            "2 x (DATABASE_ACQUIRE_TIMEOUT_SECONDS + DATABASE_COMMAND_TIMEOUT_SECONDS) = 30 must",
        ),
        (
            {"postgres_max_connections": 180},
            "= 181 connections exceed POSTGRES_MAX_CONNECTIONS=180",
        ),
        (
            {"otel_exporter_otlp_endpoint": "http://c:4317"} | TENTH,
            "OTEL_EXPORTER_OTLP_ENDPOINT=http://c:4317 has the port of OTLP over gRPC",
        ),
        (
            {"otel_exporter_otlp_traces_endpoint": "http://c:4317/v1/traces"} | TENTH,
            "set the port to 4318",
        ),
        (COLLECTOR, "OTEL_TRACES_SAMPLER=parentbased_always_on traces each request"),
        (
            COLLECTOR | {"otel_traces_sampler": "traceidratio"},
            "OTEL_TRACES_SAMPLER=traceidratio traces each request",
        ),
    ],
)
def test_each_conflict_is_reported(settings: dict[str, Any], words: str) -> None:
    conflicting = Settings(**settings)
    resources = Resources(2, 2048 * MB, shared_memory_bytes=20 * MB)
    workers = conflicting.web_concurrency or 2
    replicas = default_replicas(workers)
    (problem,) = check_settings(conflicting, resources, workers, replicas)
    assert words in problem


@pytest.mark.parametrize(
    ("workers", "shared_memory_mb", "settings"),
    [
        (2, 16, {}),
        (15, 64, {}),
        (4, None, {"metrics_max_label_sets": 100_000}),
        (4, 16, {"prometheus_multiproc_dir": Path("/data/metrics")}),
        (4, 16, {"metrics_max_label_sets": 500}),
    ],
)
def test_metrics_that_fit_into_the_shared_memory_pass_every_check(
    workers: int, shared_memory_mb: int | None, settings: dict[str, Any]
) -> None:
    """16 MB: deploy/k8s. 64 MB: the default of a container without Kubernetes."""
    shared = shared_memory_mb * MB if shared_memory_mb else None
    resources = Resources(workers, 8192 * MB, shared_memory_bytes=shared)
    assert check_settings(Settings(**settings), resources, workers, replicas=1) == []


def test_size_of_the_shared_memory_is_read(tmp_path: Path) -> None:
    assert detect_resources(tmp_path).shared_memory_bytes is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    size = shutil.disk_usage(tmp_path).total
    assert detect_resources(tmp_path).shared_memory_bytes == size


@pytest.mark.parametrize(
    "settings",
    [
        COLLECTOR | TENTH,
        COLLECTOR | {"environment": "staging"},
        COLLECTOR | {"otel_traces_sampler": "parentbased_always_off"},
        {"otel_exporter_otlp_endpoint": "http://c:4317", "otel_sdk_disabled": True},
    ],
)
def test_traces_that_cost_little_or_are_off_pass_every_check(settings: dict[str, Any]) -> None:
    assert check_settings(Settings(**settings), Resources(2, 2048 * MB), 2, 5) == []


def doctor(*options: str, **settings: str) -> tuple[int, str]:
    """Run `python -m app.sizing`; return its exit code and its output."""
    command = [sys.executable, "-m", "app.sizing", *options]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=os.environ | {"AUTH_DISABLED": "true"} | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize(
    ("settings", "is_found"),
    [
        ({"AUTH_DISABLED": "false"}, True),
        ({"AUTH_DISABLED": "false", "ENVIRONMENT": "development"}, False),
        ({}, False),
    ],
)
def test_doctor_finds_that_nobody_is_authenticated(
    settings: dict[str, str], is_found: bool
) -> None:
    code, text = doctor("--cpus", "2", "--memory-mb", "2048", **settings)
    assert code == is_found
    assert ("AUTH_ISSUER is not set, so no caller is authenticated" in text) == is_found


def test_doctor_explains_the_plan() -> None:
    code, text = doctor("--cpus", "2", "--memory-mb", "2048")
    assert code == 0
    assert "2 CPUs, 2048 MB, up to 5 pods" in text
    assert "workers      2: 2 CPUs (given) x WORKERS_PER_CORE=1" in text
    connections = "16 per pod, 8 per worker: 7 for requests, 1 for the readiness probe"
    assert f"connections  {connections}" in text
    if Path("/dev/shm").exists():
        assert "metrics      up to 15 MB of /dev/shm" in text
    assert "no warnings" in text


@pytest.mark.parametrize(
    ("settings", "primary", "replica"),
    [
        ({}, 8, 0),
        (REPLICA, 4, 4),
        (REPLICA | {"database_max_connections": 40}, 10, 10),
        (REPLICA | {"database_replica_max_connections": 6}, 5, 3),
        (REPLICA | {"database_max_connections": 2}, 2, 2),
    ],
)
def test_replica_has_a_share_of_the_connections(
    settings: dict[str, Any], primary: int, replica: int
) -> None:
    """Not connections of its own: after a promotion both URLs lead to one server."""
    plan = plan_workers(Settings(**settings), Resources(2, 4096 * MB))
    assert (plan.primary_connections, plan.replica_connections) == (primary, replica)
    assert plan.connections_per_worker == primary + replica


def test_doctor_explains_the_share_of_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_REPLICA_URL", "postgresql://standby/app")
    code, text = doctor("--cpus", "1", "--memory-mb", "2048")
    assert code == 0, text
    shares = "3 for requests, 1 for the readiness probe, 3 to the read replica, 1 for its check"
    assert f"connections  8 per pod, 8 per worker: {shares}" in text


def test_doctor_reports_all_conflicts() -> None:
    options = (
        "--workers 17 --timeout 10 --max-requests 0 --graceful-timeout 60 --grace 30 "
        "--cpus 2 --memory-mb 2048"
    )
    code, text = doctor(*options.split())
    assert code == 1
    for words in (
        "17 workers on 2 CPUs",
        "WORKER_TIMEOUT_SECONDS=10",
        "MAX_REQUESTS=0",
        "SIGKILL comes first",
    ):
        assert words in text


@pytest.mark.parametrize(
    "options",
    [
        ("--cpus", "nan"),
        ("--cpus", "many"),
        ("--workers", "0"),
        ("--timeout", "soon"),
        ("--memory-mb", "0"),
        ("--replicas", "1.5"),
    ],
)
def test_doctor_rejects_invalid_options_in_one_line(options: tuple[str, str]) -> None:
    code, text = doctor(*options)
    assert code in {1, 2}
    assert "Traceback" not in text
    assert f"{options[1]}: " in text
