"""Metrics of this pod's control group: memory and CPU in use, their limits, throttling, OOM kills.

Read at each scrape, by the process that serves the metrics, so they cost the workers no time. The
names are not cAdvisor's (`container_*`): rules that others have written for those would find them.
"""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.sizing.resources import control_groups, detect_resources, read_text

MICROSECONDS = 1e6
NANOSECONDS = 1e9


class ControlGroupCollector(Collector):
    """Collects the metrics of the control group, v2 or v1; only the limits where there is none."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.groups = list(control_groups(root))
        #: The file of each name, None without one. To search at each scrape took 7 of its 9 ms.
        self.files: dict[str, Path | None] = {}

    def collect(self) -> Iterable[Metric]:  # noqa: D102
        resources = detect_resources(self.root)
        text = "CPUs that the pod may use."
        yield GaugeMetricFamily("cgroup_cpu_limit", text, resources.cpus)
        text = "Memory that the pod may use."
        yield GaugeMetricFamily("cgroup_memory_limit_bytes", text, resources.memory_bytes)
        yield from self._memory()
        yield from self._cpu()

    def _memory(self) -> Iterable[Metric]:
        used = self._first("memory.current") or self._first("memory.usage_in_bytes")
        if used.isdigit():
            text = "Memory in use, without file caches that can be reclaimed: the working set."
            value = max(0, int(used) - self._reclaimable_bytes())
            yield GaugeMetricFamily("cgroup_memory_usage_bytes", text, value)
        kills = self._field("memory.events", "oom_kill")
        if kills is None:
            kills = self._field("memory.oom_control", "oom_kill")
        if kills is not None:
            text = "Processes of the pod that the kernel killed for its memory limit."
            yield CounterMetricFamily("cgroup_oom_kills", text, kills)

    def _reclaimable_bytes(self) -> int:
        """Return the size of inactive file caches, which the kubelet too does not count as used."""
        # In v1, the plain name leaves out child groups.
        names = ("total_inactive_file", "inactive_file")
        sizes = [self._field("memory.stat", name) for name in names]
        return next((size for size in sizes if size is not None), 0)

    def _cpu(self) -> Iterable[Metric]:
        used = self._seconds("usage_usec", MICROSECONDS)
        if used is None:
            nanoseconds = self._first("cpuacct.usage")
            used = int(nanoseconds) / NANOSECONDS if nanoseconds.isdigit() else None
        if used is not None:
            text = "CPU time of all processes of the pod."
            yield CounterMetricFamily("cgroup_cpu_usage_seconds", text, used)
        throttled = self._seconds("throttled_usec", MICROSECONDS)
        if throttled is None:
            throttled = self._seconds("throttled_time", NANOSECONDS)
        if throttled is not None:
            text = "Time for which the pod was throttled at its CPU limit."
            yield CounterMetricFamily("cgroup_cpu_throttled_seconds", text, throttled)

    def _seconds(self, name: str, unit: float) -> float | None:
        value = self._field("cpu.stat", name)
        return None if value is None else value / unit

    def _field(self, file: str, name: str) -> int | None:
        """Return a field of a file, or None."""
        for line in self._first(file).splitlines():
            key, _, value = line.partition(" ")
            if key == name and value.isdigit():
                return int(value)
        return None

    def _first(self, file: str) -> str:
        """Return the text of a file of the innermost control group that has it."""
        if file not in self.files:
            candidates = (group / file for group in self.groups)
            self.files[file] = next(filter(read_text, candidates), None)
        found = self.files[file]
        return read_text(found) if found else ""
