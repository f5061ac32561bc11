"""The prefix of the metrics' names, which a scrape adds.

Within the process, and in its files, names have none: metrics are also created at module level,
before the settings are read.
"""

import copy
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.registry import Collector


class PrefixedMetrics(Collector):
    """Collects the metrics of another collector, with `METRICS_PREFIX` before each name."""

    def __init__(self, collector: Collector, prefix: str) -> None:
        self.collector = collector
        self.prefix = prefix

    def collect(self) -> Iterable[Metric]:  # noqa: D102
        metrics = self.collector.collect()
        return map(self._add_prefix, metrics) if self.prefix else metrics

    def _add_prefix(self, metric: Metric) -> Metric:
        """Return a copy: prometheus_client's own collectors return the same object each time."""
        prefixed = copy.copy(metric)
        prefixed.name = self.prefix + metric.name
        prefixed.samples = [
            sample._replace(name=self.prefix + sample.name) for sample in metric.samples
        ]
        return prefixed
