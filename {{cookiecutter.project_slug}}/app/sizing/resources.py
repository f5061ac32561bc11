"""The CPUs and the memory that this process may use.

Those of the host, or less in a control group.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEGABYTE = 1 << 20


class Resources(NamedTuple):
    """CPUs, fractions included, and memory in bytes; with the source of each.

    `shared_memory_bytes` is the size of /dev/shm, which holds the metrics; None without one.
    """

    cpus: float
    memory_bytes: int
    cpu_source: str = "given"
    memory_source: str = "given"
    shared_memory_bytes: int | None = None

    @property
    def megabytes(self) -> int:
        """The memory in whole megabytes."""
        return self.memory_bytes // MEGABYTE


def detect_resources(root: Path = Path("/")) -> Resources:
    """Return the lowest limits: of the host, and of the control groups below `root`.

    Reads cgroup v1 and v2, and every ancestor, since any of them may have the limit.
    `os.cpu_count()` and psutil ignore quotas: both report 2 CPUs in a container with 0.5 CPU.
    """
    cpu_limits = [(float(_host_cpus()), "the host's CPUs")]
    memory_limits = [(_host_memory_bytes(), "the host's memory")]
    for group in control_groups(root):
        cpu_limit = _cpu_limit(group)
        if cpu_limit is not None:
            cpu_limits.append(cpu_limit)
        memory_limit = _memory_limit(group)
        if memory_limit is not None:
            memory_limits.append(memory_limit)
    cpus, cpu_source = min(cpu_limits)
    memory_bytes, memory_source = min(memory_limits)
    shared_memory_bytes = _file_system_bytes(root / "dev/shm")
    return Resources(cpus, memory_bytes, cpu_source, memory_source, shared_memory_bytes)


def _file_system_bytes(directory: Path) -> int | None:
    """Return the size of the file system of a directory, None if there is no directory."""
    try:
        system = os.statvfs(directory)
    except OSError:
        return None
    return system.f_blocks * system.f_frsize


def _host_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def control_groups(root: Path) -> Iterator[Path]:
    """Yield the directories of this process's control groups and their ancestors.

    For v2, and for each v1 controller. In a cgroup namespace, /proc shows the path on the host and
    the mount does not have it; the mount itself, its last ancestor, has the limit then.
    """
    mounts = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # v2 has no controllers here, and is the last line. "unified" is its mount next to v1.
        names = (controllers, *controllers.split(",")) if controllers else ("", "unified")
        for name in dict.fromkeys(names):
            mount = mounts / name
            group = mount / path.lstrip("/")
            for directory in (group, *group.parents):
                if directory.is_relative_to(mount) and directory.is_dir():
                    yield directory


def _cpu_limit(group: Path) -> tuple[float, str] | None:
    """Return the CPU limit of a control group and its source, or None."""
    quota, _, period = read_text(group / "cpu.max").partition(" ")
    source = "cgroup v2 cpu.max"
    if not quota:
        quota = read_text(group / "cpu.cfs_quota_us")
        period = read_text(group / "cpu.cfs_period_us")
        source = "cgroup v1 cpu.cfs_quota_us"
    # No limit is "max" in v2, -1 in v1.
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period), source
    return None


def _memory_limit(group: Path) -> tuple[int, str] | None:
    """Return the memory limit of a control group in bytes and its source, or None."""
    limit = read_text(group / "memory.max")
    source = "cgroup v2 memory.max"
    if not limit:
        limit = read_text(group / "memory.limit_in_bytes")
        source = "cgroup v1 memory.limit_in_bytes"
    # No limit is "max" in v2, and a number larger than any memory in v1.
    if limit.isdigit():
        return int(limit), source
    return None


def read_text(path: Path) -> str:
    """Return the text of a file, empty if there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
