"""Dashboards: Grafana's own types accept them. Grafana itself is not needed."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.dashboards import CONTENTS, DASHBOARDS
from tests.conftest import missing

#: The types of the Grafana in compose.observe.yaml, and the compiler that checks them.
PACKAGES = ["@grafana/schema@13.2.3", "typescript@5.9.3"]
STRICT = "--noEmit --strict --skipLibCheck --module esnext --moduleResolution bundler"
#: `Plain` replaces enums by their values, which JSON has. Grafana's type of an annotation lacks the
#: fields of Prometheus.
TYPES = """\
import type { AnnotationQuery, Dashboard } from '@grafana/schema';
type Plain<T> = T extends string ? `${T}`
  : T extends number ? T | (`${T}` extends `${infer N extends number}` ? N : T)
  : T extends (infer U)[] ? Plain<U>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> }
  : T;
type Annotation = Plain<AnnotationQuery> & { expr: string, titleFormat: string };
type Whole = Plain<Omit<Dashboard, 'annotations'>> & { annotations: { list: Annotation[] } };
export const dashboard: Partial<Whole> = """


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the compiler and the types, from the registry that npm is configured for."""
    if not shutil.which("npm"):
        pytest.skip("npm is missing; nothing else here needs it, so CI does not install it")
    directory = tmp_path_factory.mktemp("types")
    install = ["npm", "install", "--prefix=.", "--no-save", "--ignore-scripts", *PACKAGES]
    done = subprocess.run(install, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        missing(f"a registry of npm with {PACKAGES} ({done.stderr})")
    return directory


def type_errors(compiler: Path, dashboards: dict[str, Any]) -> list[str]:
    """Return the errors of the compiler, each with the name of its dashboard."""
    for name, dashboard in dashboards.items():
        (compiler / f"{name}.ts").write_text(TYPES + json.dumps(dashboard))
    command = ["node_modules/.bin/tsc", *STRICT.split(), *(f"{name}.ts" for name in dashboards)]
    done = subprocess.run(command, cwd=compiler, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if not line.startswith(" ")]


@pytest.mark.slow
def test_grafana_types_accept_every_dashboard_and_reject_defects(compiler: Path) -> None:
    """A defect is in the dashboard itself, in a panel, in a variable or in an annotation."""
    good = {name: json.loads((DASHBOARDS / f"{name}.json").read_text()) for name in CONTENTS}
    service = good["service"]
    panel, *panels = service["panels"]
    variable, *variables = service["templating"]["list"]
    defects = {
        "unknown": service | {"pannels": []},
        "mistyped": service | {"panels": [panel | {"gridPos": {"x": "0"}}, *panels]},
        "unlisted": service
        | {"templating": {"list": [variable | {"refresh": "always"}, *variables]}},
        "incomplete": service | {"annotations": {"list": [{"name": "alerts"}]}},
    }
    errors = type_errors(compiler, good | defects)
    assert [error for error in errors if error.partition(".ts(")[0] in good] == []
    assert {error.partition(".ts(")[0] for error in errors} == set(defects)
