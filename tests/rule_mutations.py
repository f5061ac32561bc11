"""Deliberate changes of alerts, each of which a test of the alert has to notice.

An alert is taken out, each of its thresholds is moved in both directions, and so is its duration.
A change runs with the tests of its alert alone.
"""

import copy
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.conftest import ROOT, SOURCE

PROMETHEUS = ROOT / SOURCE / "deploy/observe/prometheus"
#: A number after a comparison.
THRESHOLD = re.compile(r"(?<=[<>=] )(\d+(?:\.\d+)?)(?![\w.])")
#: Whole numbers from 2 up to this one are counts, and move by one.
MAX_COUNT = 5
MINUTES = {"m": 1, "h": 60}
#: The labels by which alerts of one name differ.
DISTINCT = {"window", "reason"}

Rule = dict[str, Any]


class Mutation(NamedTuple):
    """A change of one alert: its description, the alert before, and after unless it is removed."""

    description: str
    alert: Rule
    changed: Rule | None


def load(path: Path) -> list[Rule]:
    """Return the rules of a file."""
    groups = yaml.safe_load(path.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def moved(number: str) -> tuple[str, str]:
    """Return a threshold that is moved up, and one that is moved down."""
    value = float(number)
    if value == 0:
        return "1.5", "-1"
    if value.is_integer() and 1 < value <= MAX_COUNT:
        return str(value + 1), str(value - 1)
    return str(round(value * 1.1, 4)), str(round(value * 0.9, 4))


def mutations(path: Path) -> Iterator[Mutation]:
    """Yield the changes of the alerts of a file of rules, one at a time."""
    for rule in load(path):
        if "alert" in rule:
            title = " ".join([rule["alert"], *rule["labels"].values()])
            yield Mutation(f"{title} is removed", rule, None)
            for changed, description in changes(rule):
                yield Mutation(f"{title}: {description}", rule, changed)


def changes(rule: Rule) -> Iterator[tuple[Rule, str]]:
    """Yield an alert with a threshold or its duration moved, and a description."""
    for match in THRESHOLD.finditer(rule["expr"]):
        for number in moved(match[1]):
            changed = copy.deepcopy(rule)
            changed["expr"] = rule["expr"][: match.start()] + number + rule["expr"][match.end() :]
            yield changed, f"threshold {match[1]} at {match.start()} becomes {number}"
    if "for" in rule:
        seconds = int(rule["for"][:-1]) * MINUTES[rule["for"][-1]] * 60
        for other in (seconds // 2, seconds * 3 // 2):
            yield rule | {"for": f"{other}s"}, f"for {rule['for']} becomes {other}s"


def tests_of(alert: Rule) -> Iterator[str]:
    """Yield the files of tests that have tests of an alert, without the other tests.

    Of several alerts with one name, each has a label that its test selects.
    """
    labels = {name: text for name, text in alert["labels"].items() if name in DISTINCT}
    selectors = [f'{name}="{text}"' for name, text in labels.items()]
    for path in sorted((PROMETHEUS / "tests").glob("*.yaml")):
        # As text: PyYAML would read the series `0x40` as a number.
        header, *groups = re.split(r"^(?=  - name: )", path.read_text(), flags=re.MULTILINE)
        named = [group for group in groups if group.startswith(f'  - name: "{alert["alert"]}: ')]
        chosen = [group for group in named if all(each in group for each in selectors)]
        if chosen:
            yield re.sub(r"rule_files: .*", "rule_files: [rules.yaml]", header) + "".join(chosen)


def is_noticed(mutation: Mutation) -> bool:
    """Return whether the tests of the alert fail after the change.

    They need no other rule: their input has the recorded series.
    """
    rules = [mutation.changed] if mutation.changed else []
    group = {"name": "mutated", "interval": "30s", "rules": rules}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
        names = []
        for number, text in enumerate(tests_of(mutation.alert)):
            names.append(f"{number}.yaml")
            (place / names[-1]).write_text(text)
        assert names, f"{mutation.alert['alert']} has no tests"
        command = ["promtool", "test", "rules", *names]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    # Other failures, such as an invalid file, would notice everything.
    assert (done.returncode == 0) == ("FAILED" not in output), output
    assert done.returncode == 0 or "exp:" in output, output
    return done.returncode != 0
