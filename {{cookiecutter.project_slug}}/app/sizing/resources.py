"""The CPUs and the memory that this process may use: the host's, or less where a control group says so."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEGABYTE = 1 << 20


class Resources(NamedTuple):
    """CPUs, fractions included, and memory in bytes; with where each was read."""

    cpus: float
    memory_bytes: int
    cpu_source: str = "given"
    memory_source: str = "given"

    @property
    def megabytes(self) -> int:
        """The memory in whole megabytes."""
        return self.memory_bytes // MEGABYTE


def detect_resources(root: Path = Path("/")) -> Resources:
    """Read the limits below `root`: cgroup v1 and v2, every ancestor, since any of them may hold the limit.

    `os.cpu_count()` and psutil know nothing of quotas: both say 2 in a container with 0.5 CPU and 256 MB.
    """
    affinity = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    cpus = [(float(affinity), "the host's CPUs")]
    memory = [(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the host's memory")]
    for group in _groups(root):
        v1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        for text, source in (
            (_read(group / "cpu.max"), "cgroup v2 cpu.max"),
            (v1, "cgroup v1 cpu.cfs_quota_us"),
        ):
            quota, _, period = text.partition(" ")
            cpus += (
                [(int(quota) / int(period), source)] if quota.isdigit() and period.isdigit() else []
            )
        for text, source in (
            (_read(group / "memory.max"), "cgroup v2 memory.max"),
            (_read(group / "memory.limit_in_bytes"), "cgroup v1 memory.limit_in_bytes"),
        ):
            memory += [(int(text), source)] if text.isdigit() else []
    (count, cpu_source), (size, memory_source) = min(cpus), min(memory)
    return Resources(count, size, cpu_source, memory_source)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folder of each control group of this process and of its ancestors, for v2 and each v1 controller."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in (
            mounts / controllers,
            *(mounts / name for name in controllers.split(",")),
            mounts / "unified",
        ):
            folder = mount / path.lstrip(
                "/"
            )  # below a namespace /proc shows the host's path, but not the mount
            yield from (group for group in (folder, *folder.parents) if group.is_relative_to(mount))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
