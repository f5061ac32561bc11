"""Metrics of the control group, from its files.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html; the kubelet's
working set leaves out inactive file caches.
"""

from pathlib import Path

from app.telemetry.control_group import ControlGroupCollector

GROUPS = "sys/fs/cgroup"
MB = 1 << 20


def collect(root: Path, files: dict[str, str]) -> dict[str, float]:
    """Return the metrics of a control group with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    metrics = ControlGroupCollector(root).collect()
    return {sample.name: sample.value for metric in metrics for sample in metric.samples}


def test_control_group_v2(tmp_path: Path) -> None:
    group = f"{GROUPS}/pod"
    files = {
        "proc/self/cgroup": "0::/pod\n",
        f"{group}/cpu.max": "50000 100000",
        f"{group}/cpu.stat": "usage_usec 12500000\nuser_usec 1\nthrottled_usec 1500000\n",
        f"{group}/memory.max": str(256 * MB),
        f"{group}/memory.current": str(100 * MB),
        f"{group}/memory.stat": f"anon 1\ninactive_file {30 * MB}\nactive_file 1\n",
        f"{group}/memory.events": "low 0\noom 3\noom_kill 2\n",
    }
    assert collect(tmp_path, files) == {
        "cgroup_cpu_limit": 0.5,
        "cgroup_cpu_usage_seconds_total": 12.5,
        "cgroup_cpu_throttled_seconds_total": 1.5,
        "cgroup_memory_limit_bytes": 256 * MB,
        "cgroup_memory_usage_bytes": 70 * MB,
        "cgroup_oom_kills_total": 2,
    }


def test_control_group_v1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/pod\n3:cpu,cpuacct:/pod\n",
        f"{GROUPS}/cpu,cpuacct/pod/cpu.cfs_quota_us": "50000",
        f"{GROUPS}/cpu,cpuacct/pod/cpu.cfs_period_us": "100000",
        f"{GROUPS}/cpu,cpuacct/pod/cpu.stat": "nr_periods 5\nthrottled_time 1500000000\n",
        f"{GROUPS}/cpu,cpuacct/pod/cpuacct.usage": "12500000000",
        f"{GROUPS}/memory/pod/memory.limit_in_bytes": str(256 * MB),
        f"{GROUPS}/memory/pod/memory.usage_in_bytes": str(100 * MB),
        f"{GROUPS}/memory/pod/memory.stat": f"inactive_file 1\ntotal_inactive_file {30 * MB}\n",
        f"{GROUPS}/memory/pod/memory.oom_control": "oom_kill_disable 0\noom_kill 2\n",
    }
    assert collect(tmp_path, files) == {
        "cgroup_cpu_limit": 0.5,
        "cgroup_cpu_usage_seconds_total": 12.5,
        "cgroup_cpu_throttled_seconds_total": 1.5,
        "cgroup_memory_limit_bytes": 256 * MB,
        "cgroup_memory_usage_bytes": 70 * MB,
        "cgroup_oom_kills_total": 2,
    }


def test_v2_next_to_v1_is_not_read_for_the_controllers_of_v1(tmp_path: Path) -> None:
    """v2 has a file `cpu.stat` without the controller of the CPU too, without throttling."""
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n3:cpuacct:/pod\n2:cpu:/pod\n0::/\n",
        f"{GROUPS}/cpu/pod/cpu.stat": "nr_periods 5\nthrottled_time 1500000000\n",
        f"{GROUPS}/cpuacct/pod/cpuacct.usage": "12500000000",
        f"{GROUPS}/unified/cpu.stat": "usage_usec 99000000\nuser_usec 1\n",
    }
    found = collect(tmp_path, files)
    assert found["cgroup_cpu_usage_seconds_total"] == 12.5
    assert found["cgroup_cpu_throttled_seconds_total"] == 1.5


def test_limits_are_those_of_the_host_without_a_control_group(tmp_path: Path) -> None:
    found = collect(tmp_path, {})
    assert found.keys() == {"cgroup_cpu_limit", "cgroup_memory_limit_bytes"}
    assert found["cgroup_cpu_limit"] >= 1
