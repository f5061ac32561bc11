"""The pod is sized from the environment and from the limits of its control groups."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.sizing.checks import check_settings
from app.sizing.plan import plan_workers
from app.sizing.resources import Resources, detect_resources
from tests.service_process import PROJECT

MB = 1 << 20


def tree(root: Path, **files: str) -> Path:
    """Write files below a root; `__` in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_v2_limits_are_read(tmp_path: Path) -> None:
    group = "sys__fs__cgroup__pod"
    tree(
        tmp_path,
        proc__self__cgroup="0::/pod\n",
        **{f"{group}__cpu_dot_max": "50000 100000", f"{group}__memory_dot_max": str(256 * MB)},
    )
    machine = detect_resources(tmp_path)
    assert (machine.cpus, machine.memory_bytes) == (0.5, 256 * MB)
    assert (machine.cpu_source, machine.memory_source) == (
        "cgroup v2 cpu.max",
        "cgroup v2 memory.max",
    )


def test_the_strictest_ancestor_counts(tmp_path: Path) -> None:
    top = "sys__fs__cgroup__slice"
    tree(
        tmp_path,
        proc__self__cgroup="0::/slice/pod\n",
        **{f"{top}__cpu_dot_max": "25000 100000", f"{top}__pod__cpu_dot_max": "max 100000"},
    )
    assert detect_resources(tmp_path).cpus == 0.25


def test_in_a_cgroup_namespace_the_mount_itself_is_read(tmp_path: Path) -> None:
    tree(
        tmp_path,
        proc__self__cgroup="0::/../../host/path\n",
        sys__fs__cgroup__cpu_dot_max="10000 100000",
    )
    assert detect_resources(tmp_path).cpus == 0.1


def test_cgroup_v1_limits_are_read(tmp_path: Path) -> None:
    cpu, memory = "sys__fs__cgroup__cpu,cpuacct__pod", "sys__fs__cgroup__memory__pod"
    tree(
        tmp_path,
        proc__self__cgroup="4:memory:/pod\n3:cpu,cpuacct:/pod\n",
        **{
            f"{cpu}__cpu_dot_cfs_quota_us": "150000",
            f"{cpu}__cpu_dot_cfs_period_us": "100000",
            f"{memory}__memory_dot_limit_in_bytes": str(512 * MB),
        },
    )
    machine = detect_resources(tmp_path)
    assert (machine.cpus, machine.memory_bytes) == (
        min(1.5, detect_resources(Path("/nowhere")).cpus),
        512 * MB,
    )


def test_no_limit_means_the_host(tmp_path: Path) -> None:
    cpu, memory = "sys__fs__cgroup__cpu", "sys__fs__cgroup__memory"
    tree(
        tmp_path,
        proc__self__cgroup="4:memory:/\n3:cpu:/\n",
        **{
            f"{cpu}__cpu_dot_cfs_quota_us": "-1",
            f"{cpu}__cpu_dot_cfs_period_us": "100000",
            f"{memory}__memory_dot_limit_in_bytes": str((1 << 63) - 4096),
        },
    )
    machine = detect_resources(tmp_path)
    assert (machine.cpu_source, machine.memory_source) == ("the host's CPUs", "the host's memory")


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
def test_workers(cpus: float, megabytes: int, settings: dict[str, Any], workers: int) -> None:
    assert plan_workers(Settings(**settings), Resources(cpus, megabytes * MB)).workers == workers


def test_the_budget_is_divided_by_the_workers() -> None:
    machine = Resources(4, 8192 * MB)
    assert plan_workers(Settings(), machine).connections_per_worker == 2
    assert plan_workers(Settings(database_max_connections=20), machine).connections_per_worker == 5
    assert plan_workers(Settings(database_max_connections=1), machine).connections_per_worker == 2


@pytest.mark.parametrize("cpus", [0.5, 1, 2, 4])
def test_the_defaults_are_coherent(cpus: float) -> None:
    machine = Resources(cpus, 2048 * MB)
    assert (
        check_settings(Settings(), machine, plan_workers(Settings(), machine).workers, replicas=10)
        == []
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"web_concurrency": 3}, "3 workers on 2 CPUs"),
        ({"worker_memory_mb": 900}, "2 workers need 1880 MB"),
        ({"worker_memory_mb": 2000, "web_concurrency": 1}, "raise the memory limit"),
        ({"worker_timeout_seconds": 0}, "WORKER_TIMEOUT_SECONDS=0"),
        (
            {"request_timeout_seconds": 34},
            "are over GRACEFUL_TIMEOUT_SECONDS=50, so the last requests are cut off",
        ),
        (
            {"database_command_timeout_seconds": 29},
            "= 30 do not fit into REQUEST_TIMEOUT_SECONDS=30",
        ),
        ({"termination_grace_seconds": 59}, "SIGKILL comes first"),
        ({"max_requests": 0}, "MAX_REQUESTS=0"),
        ({"max_requests_jitter": 0}, "MAX_REQUESTS_JITTER=0"),
        ({"database_max_connections": 3}, "under two for each of 2 workers"),
        (
            {"postgres_max_connections": 171},
            "= 172 connections exceed POSTGRES_MAX_CONNECTIONS=171",
        ),
    ],
)
def test_each_incoherence_is_named(settings: dict[str, Any], words: str) -> None:
    chosen, machine = Settings(**settings), Resources(2, 2048 * MB)
    found = check_settings(chosen, machine, chosen.web_concurrency or 2, replicas=10)
    assert [text for text in found if words in text] == found[:1]


def doctor(*options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "app.sizing", *options]
    done = subprocess.run(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout.decode()


def test_the_doctor_explains_its_plan() -> None:
    code, text = doctor("--cpus", "2", "--memory-mb", "2048")
    assert code == 0
    assert "workers      2: 2 CPUs (given) x WORKERS_PER_CORE=1" in text
    assert "no warnings" in text


def test_the_doctor_names_all_faults_of_a_plan() -> None:
    options = "--workers 17 --timeout 10 --max-requests 0 --graceful-timeout 60 --grace 30 --cpus 2 --memory-mb 2048"
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
    "options", [("--cpus", "nan"), ("--workers", "0"), ("--timeout", "soon"), ("--memory-mb", "0")]
)
def test_the_doctor_refuses_nonsense_in_one_line(options: tuple[str, str]) -> None:
    code, text = doctor(*options)
    assert code in {1, 2}
    assert "Traceback" not in text
    assert f"{options[1]}: " in text
