"""Rules and dashboards: valid, tested, documented, and the same in Kubernetes.

Sources: https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/ and
https://sre.google/workbook/alerting-on-slos/ (a page needs an action).
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from app.sizing.checks import OBJECTIVE_SECONDS
from scripts import rules
from tests.documented_metrics import documented
from tests.service_process import PROJECT

RULES = sorted((PROJECT / "deploy/observe/prometheus/rules").glob("*.yaml"))
TESTS = sorted((PROJECT / "deploy/observe/prometheus/tests").glob("*.yaml"))
RUNBOOK = (PROJECT / "docs/alerts.md").read_text()
SECTION = re.compile(r"^## (\w+)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
#: A metric with its selector, not a recorded series.
METRIC = re.compile(r"(?<![\w:])([a-zA-Z_]\w*)\{")
#: Prometheus' own series
OWN = {"up", "ALERTS"}


DASHBOARDS = sorted((PROJECT / "deploy/observe/grafana/dashboards").glob("*.json"))
#: What Grafana puts in place of its variables
VARIABLES = {"$__rate_interval": "1m", "$namespace": ".*", "$instance": ".*", "$job": "service"}


def load(path: Path) -> list[dict[str, Any]]:
    """Return the rules of a file."""
    groups = yaml.safe_load(path.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for path in RULES for rule in load(path) if "alert" in rule]
NAMES = sorted({alert["alert"] for alert in ALERTS})


def prefix() -> str:
    """Return the prefix that `make rules METRICS_PREFIX=...` has put before the names."""
    text = (PROJECT / "deploy/observe/prometheus/rules/service.yaml").read_text()
    found = re.search(r"(\w*)worker_processes\{", text)
    assert found is not None
    return found[1]


def test_rules_read_buckets_that_exist() -> None:
    """A selector of a bound that no bucket has selects nothing, and its alert never fires."""
    texts = [path.read_text() for path in RULES]
    pattern = r'http_server_request_duration_seconds_bucket\{.*?le="([\d.]+)"'
    bounds = {float(bound) for text in texts for bound in re.findall(pattern, text)}
    assert bounds == {OBJECTIVE_SECONDS}
    assert bounds <= set(Settings.model_fields["metrics_buckets"].default)


def unknown_metrics(text: str) -> Iterator[str]:
    """Yield the metrics of an expression that README.md does not list."""
    table = documented()
    for name in METRIC.findall(text):
        base = re.sub(r"_(bucket|sum|count)$", "", name.removeprefix(prefix()))
        if not {base, name.removeprefix(prefix())} & table.keys() and name not in OWN:
            yield name


def test_rules_pass_their_tests() -> None:
    if not shutil.which("promtool"):
        if os.environ.get("CI") == "true":
            pytest.fail("promtool is missing, and CI=true makes that a failure")
        pytest.skip("promtool is missing; it is a part of Prometheus")
    assert rules.check() == 0


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_kubernetes_component_is_a_copy(path: Path) -> None:
    copy = rules.COMPONENT / path.name
    assert copy.read_text() == rules.manifest(path), "run `make rules`"
    listed = yaml.safe_load((rules.COMPONENT / "kustomization.yaml").read_text())["resources"]
    assert path.name in listed


def test_component_has_no_other_rules() -> None:
    listed = yaml.safe_load((rules.COMPONENT / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in RULES]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_metrics_of_rules_are_documented(path: Path) -> None:
    text = " ".join(rule["expr"] for rule in load(path))
    assert METRIC.search(text)
    assert list(unknown_metrics(text)) == []


def test_unknown_metric_is_found() -> None:
    """The control."""
    assert list(unknown_metrics("rate(orders_total{a='b'}[5m]) / up{}")) == ["orders_total"]


@pytest.mark.parametrize("name", NAMES)
def test_alert_has_a_section_with_three_commands(name: str) -> None:
    """Its meaning, the first three commands, the cure."""
    sections = dict(SECTION.findall(RUNBOOK))
    assert name in sections, "docs/alerts.md"
    text = re.sub(r"<!-- .* -->", "", sections[name])
    meaning, commands, cure = re.split(r"```(?:sh)?\n", text)
    assert len(meaning.split()) > 5
    assert len(commands.splitlines()) == 3
    assert len(cure.split()) >= 3


def test_sections_are_of_alerts() -> None:
    assert sorted(name for name, _ in SECTION.findall(RUNBOOK)) == NAMES


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_refers_to_its_section(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket", "info"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["runbook"] == f"docs/alerts.md#{alert['alert'].lower()}"


def test_each_alert_has_a_test() -> None:
    """One for each rule: the names of tests begin with that of the alert."""
    files = [yaml.safe_load(path.read_text()) for path in TESTS]
    groups = [group["name"] for file in files for group in file["tests"]]
    for name in NAMES:
        tests = [group for group in groups if group.startswith(f"{name}: ")]
        assert len(tests) == sum(alert["alert"] == name for alert in ALERTS), name


def expressions(path: Path) -> dict[str, str]:
    """Return the queries of a dashboard, with values for its variables."""
    found = {}
    for panel in json.loads(path.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            found[f"{panel['title']}, {target['refId']}"] = query
    return found


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_queries_of_dashboards_are_valid(path: Path, tmp_path: Path) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is missing; it is a part of Prometheus")
    queries = enumerate(expressions(path).values())
    found = [{"record": f"job:query{number}", "expr": query} for number, query in queries]
    assert len(found) > 5
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": found}]}))
    command = ["promtool", "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_metrics_of_dashboards_are_documented(path: Path) -> None:
    text = " ".join(expressions(path).values())
    assert METRIC.search(text)
    assert list(unknown_metrics(text)) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_fill_their_rows(path: Path) -> None:
    cells: set[tuple[int, int]] = set()
    for panel in json.loads(path.read_text())["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        own = {(x, y) for x in columns for y in rows}
        assert not own & cells, panel["title"]
        cells |= own
    height = max(y for _, y in cells) + 1
    assert len(cells) == 24 * height


def test_every_dashboard_is_in_the_component() -> None:
    file = PROJECT / "deploy/observe/grafana/dashboards/kustomization.yaml"
    (generator,) = yaml.safe_load(file.read_text())["configMapGenerator"]
    assert sorted(generator["files"]) == [path.name for path in DASHBOARDS]
