"""The metrics of one scrape, in the text format of Prometheus."""

import re

_VALUE = r"[+-]?(?:[\d.]+(?:e[+-]?\d+)?|Inf)|NaN"
_SERIES = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (" + _VALUE + ")$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
#: Every process of the service has this gauge. What is before its name is METRICS_PREFIX.
_PREFIX = re.compile(r"^# TYPE (\w*)dependency_up gauge$", re.MULTILINE)

Labels = dict[str, str]


class Metrics:
    """The series of one scrape, by name, without the prefix of the service."""

    def __init__(self, text: str = "") -> None:
        found = _PREFIX.search(text)
        prefix = found.group(1) if found else ""
        self.size = len(text)
        self.series: dict[str, list[tuple[Labels, float]]] = {}
        for name, labels, value in _SERIES.findall(text):
            entry = (dict(_LABEL.findall(labels)), float(value))
            self.series.setdefault(name.removeprefix(prefix), []).append(entry)

    def items(self, name: str) -> list[tuple[Labels, float]]:
        """Return the series of a name, each with its labels."""
        return self.series.get(name, [])

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of the series with these labels, or None without any."""
        values = [value for own, value in self.items(name) if labels.items() <= own.items()]
        return sum(values) if values else None
