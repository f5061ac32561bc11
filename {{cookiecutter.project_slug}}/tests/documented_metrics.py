"""The table of metrics in README.md, to compare a scrape with."""

import re
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from app.settings import Settings
from tests.service_process import PROJECT

ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\|"
    r" (?P<unit>[^|]+) \| (?P<value>.*) \|\n",
    re.MULTILINE,
)
#: Added by the type: a bucket of a histogram.
OF_TYPE = {"le"}
#: prometheus_client's own, of a process that serves its metrics itself.
PYTHON = re.compile(
    r"python_\w+|process_(virtual_memory|resident_memory|start_time|open_fds|max_fds|cpu_seconds)\w*"
)


class Documented(NamedTuple):
    """A row of the table."""

    type: str
    labels: frozenset[str]
    unit: str
    #: Whether the row belongs to a part that can be removed, such as `example`.
    is_of_part: bool


def documented() -> dict[str, Documented]:
    """Return the rows by the name of the metric."""
    text = (PROJECT / "README.md").read_text()
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    return {
        row["name"]: Documented(
            row["type"],
            frozenset(re.findall(r"\w+", row["labels"])),
            row["unit"],
            "<!--" in row["value"],
        )
        for row in ROW.finditer(section)
    }


def exposed(scrape: str) -> dict[str, tuple[str, set[str]]]:
    """Return the type and the labels of each metric in a scrape that has a value."""
    prefix = Settings.model_fields["metrics_prefix"].default
    found = {}
    for family in text_string_to_metric_families(scrape):
        name = family.name.removeprefix(prefix) + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - OF_TYPE
        if family.samples and not PYTHON.fullmatch(name) and not name.endswith("_created"):
            found[name] = (family.type, labels)
    return found


def assert_documented(scrape: str) -> None:
    """Assert that each metric of a scrape is in the table, with its type and its labels."""
    table = documented()
    for name, (kind, labels) in exposed(scrape).items():
        assert name in table, f"{name} is not in README.md, Metrics"
        assert (kind, labels) == (table[name].type, set(table[name].labels)), name
