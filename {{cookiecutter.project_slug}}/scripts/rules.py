"""Copy the rules of Prometheus for Kubernetes, then check and test them: `make rules`.

`make rules METRICS_PREFIX=acme_` first puts that prefix before the names of the service's metrics,
in the rules, their tests and the dashboards. It must be the service's setting of the same name.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
OBSERVE = PROJECT / "deploy/observe"
COMPONENT = PROJECT / "deploy/k8s/components/prometheusrule"
#: A row of the table of metrics in README.md
ROW = re.compile(r"^\| `(\w+)` \| (?:gauge|counter|histogram) \|", re.MULTILINE)
#: The beginning of a manifest, up to `spec:`
HEADER = """\
# Copied from deploy/observe/prometheus/rules by `make rules`.
# The operator's `ruleSelector` must match: for kube-prometheus-stack add its label `release`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: "NAME"
  labels:
    app.kubernetes.io/name: "SERVICE"
    app.kubernetes.io/component: api
spec:
"""


def add_prefix(prefix: str) -> None:
    """Put a prefix before the names of the service's metrics. A second run changes nothing."""
    names = ROW.findall((PROJECT / "README.md").read_text())
    # A selector follows each name, also where it selects everything.
    suffix_and_selector = r"(?:_bucket|_sum|_count)?\{"
    pattern = re.compile(rf"(?<![\w:])(?=(?:{'|'.join(names)}){suffix_and_selector})")
    for path in (*OBSERVE.glob("prometheus/*/*.yaml"), *OBSERVE.glob("grafana/dashboards/*.json")):
        path.write_text(pattern.sub(prefix, path.read_text()))


def manifest(rules: Path) -> str:
    """Return a file of rules as a manifest of the Prometheus operator."""
    text = rules.read_text()
    # The name of its first group is the service's, a dot, and that of the file.
    service = text.partition('- name: "')[2].partition(f".{rules.stem}")[0]
    header = HEADER.replace("NAME", f"{service}-{rules.stem}").replace("SERVICE", service)
    return header + re.sub(r"^(?=.)", "  ", text, flags=re.MULTILINE)


def copy() -> None:
    """Write a manifest for each file of rules."""
    for rules in sorted(OBSERVE.glob("prometheus/rules/*.yaml")):
        (COMPONENT / rules.name).write_text(manifest(rules))


def promtool(*arguments: str, files: Iterable[Path]) -> int:
    """Run promtool on files; return its exit code."""
    names = [str(file) for file in sorted(files)]
    command = ["promtool", *arguments, *names]
    return subprocess.run(command, check=False).returncode


def check() -> int:
    """Check and test the rules; return the exit code."""
    if not shutil.which("promtool"):
        sys.stderr.write("promtool is missing, so nothing is checked: install prometheus\n")
        return 1
    rules = OBSERVE.glob("prometheus/rules/*.yaml")
    tests = OBSERVE.glob("prometheus/tests/*.yaml")
    return promtool("check", "rules", "--lint=all", files=rules) or promtool(
        "test", "rules", files=tests
    )


def main() -> int:
    """Do all of it; return the exit code."""
    prefix = os.environ.get("METRICS_PREFIX", "")
    if not re.fullmatch(r"([a-zA-Z_]\w*)?", prefix):
        sys.stderr.write(f"METRICS_PREFIX={prefix!r}: must be a prefix of metric names\n")
        return 1
    if prefix:
        add_prefix(prefix)
    copy()
    return check()


if __name__ == "__main__":
    sys.exit(main())
