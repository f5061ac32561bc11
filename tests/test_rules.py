"""Rules of Prometheus: a test notices each change of an alert, a threshold or a duration.

`make rules` in a project runs the tests of the rules. Here the tests themselves are tested.
"""

import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts import dashboards, objectives
from tests.conftest import ROOT, SOURCE, Bake, missing, tree
from tests.rule_mutations import PROMETHEUS, Mutation, is_noticed, load, mutations

RULES = sorted((PROMETHEUS / "rules").glob("*.yaml"))
ALERTS = (ROOT / SOURCE / "docs/alerts.md").read_text()
AMTOOL_FILE = ROOT / SOURCE / "deploy/observe/alertmanager/alertmanager.yaml"


@pytest.fixture
def promtool() -> None:
    if not shutil.which("promtool"):
        missing("promtool (a part of Prometheus)")


@pytest.mark.slow
@pytest.mark.usefixtures("promtool")
@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_every_change_of_an_alert_is_noticed(path: Path) -> None:
    found = list(mutations(path))
    assert len(found) > 3 * len([rule for rule in load(path) if "alert" in rule])
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        noticed = list(threads.map(is_noticed, found))
    pairs = zip(found, noticed, strict=True)
    assert [mutation.description for mutation, is_caught in pairs if not is_caught] == []


@pytest.mark.slow
@pytest.mark.usefixtures("promtool")
@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_unchanged_alerts_pass(path: Path) -> None:
    """The control, with the same reduced files."""
    alerts = [rule for rule in load(path) if "alert" in rule]
    unchanged = [Mutation("unchanged", alert, alert) for alert in alerts]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        noticed = list(threads.map(is_noticed, unchanged))
    pairs = zip(alerts, noticed, strict=True)
    assert [alert["alert"] for alert, is_caught in pairs if is_caught] == []


def test_rules_of_objectives_are_generated() -> None:
    assert (PROMETHEUS / "rules/objectives.yaml").read_text() == objectives.rules()
    assert (PROMETHEUS / "tests/objectives.yaml").read_text() == objectives.tests()


@pytest.mark.parametrize("name", dashboards.CONTENTS)
def test_dashboards_are_generated(name: str) -> None:
    assert (dashboards.DASHBOARDS / f"{name}.json").read_text() == dashboards.text(name)


@pytest.mark.slow
@pytest.mark.usefixtures("promtool")
def test_prefix_is_put_before_every_metric(bake: Bake) -> None:
    """`make rules METRICS_PREFIX=acme_`: rules and tests agree; a second run changes nothing."""
    project = bake()
    command = ["make", "--silent", "rules", "METRICS_PREFIX=acme_"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    once = tree(project / "deploy")
    script = runpy.run_path(str(project / "scripts/rules.py"))
    script["add_prefix"]("acme_")
    script["copy"]()
    assert tree(project / "deploy") == once
    text = (project / "deploy/k8s/components/prometheusrule/service.yaml").read_text()
    assert "acme_worker_processes{" in text
    assert "acme_acme_" not in text
    assert not re.search(r"(?<![\w:])(?!acme_|up\{)[a-z_]+\{", text)


def test_invalid_prefix_is_rejected_in_one_line(bake: Bake) -> None:
    project = bake()
    rules = project / "deploy/observe/prometheus/rules/service.yaml"
    before = rules.read_text()
    for prefix in ("1a", "a-b", "a b"):
        command = ["make", "--silent", "rules", f"METRICS_PREFIX={prefix}"]
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert done.stderr.startswith(f"METRICS_PREFIX='{prefix}': must be ")
        assert "Traceback" not in done.stderr
    assert rules.read_text() == before


@pytest.mark.usefixtures("promtool")
def test_queries_of_the_runbook_are_valid(tmp_path: Path) -> None:
    queries = re.findall(r"^promtool query .*\"\$PROMETHEUS\" '(.*)'$", ALERTS, re.MULTILINE)
    assert len(queries) > 30
    rules = [{"record": f"job:query{number}", "expr": each} for number, each in enumerate(queries)]
    path = tmp_path / "rules.json"  # which is YAML
    path.write_text(str({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_kubectl_commands_of_the_runbook_exist() -> None:
    """With their options; kubectl has 50 of them, each once."""
    if not shutil.which("kubectl"):
        missing("kubectl")
    lines = [line.split(" | ")[0] for line in ALERTS.splitlines() if line.startswith("kubectl ")]
    commands = sorted({re.sub(r"'[^']*'", "x", line) for line in lines})
    assert len(commands) > 20
    for command in commands:
        before, separator, after = command.partition(" -- ")
        script = f"NAME=name OVERLAY=prod PODS=a=b; {before} --help {separator}{after}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)


def test_alertmanager_example_is_valid_and_routes_by_severity() -> None:
    if not shutil.which("amtool"):
        missing("amtool (a part of Alertmanager)")
    command = ["amtool", "check-config", str(AMTOOL_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for severity, receiver in (("page", "pages"), ("ticket", "tickets"), ("info", "advice")):
        route = ["config", "routes", "test", f"--config.file={AMTOOL_FILE}"]
        done = subprocess.run(
            ["amtool", *route, f"severity={severity}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == receiver
