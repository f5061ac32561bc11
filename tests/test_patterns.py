"""Each pattern can be copied alone, with the files that docs/patterns.md lists for it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, Bake

PROJECT = ROOT / SOURCE
PYTHON = str(SERVICE_BIN / "python")
DOCUMENT = (ROOT / "docs/patterns.md").read_text()
SQL = (PROJECT / "migrations/versions/0002_patterns.py").read_text()
#: Modules of `app` that importing the stream consumer may load, `app` itself included.
MAX_CONSUMER_MODULES = 8


class Row(NamedTuple):
    """A row of the table: a module of app/patterns, and the cells behind it."""

    name: str
    along: str
    test: str
    needs: str


ROW = re.compile(r"^\| [^|]+ \| `(\w+)\.py` \|([^|]*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
ROWS = [Row(*cells) for cells in ROW.findall(DOCUMENT)]
NAMES = [row.name for row in ROWS]


def files(cell: str) -> list[str]:
    """Return the files that a cell of the table names."""
    return re.findall(r"`(\w+\.py)`", cell)


def core_modules() -> list[str]:
    """Return the modules and packages that every pattern may import."""
    sentence = DOCUMENT.partition("Every pattern may also import")[2].partition("\n\n")[0]
    paths = re.findall(r"`(app/[\w/.]+)`", sentence)
    return [path.removesuffix(".py").strip("/").replace("/", ".") for path in paths]


def is_core(module: str, core: list[str]) -> bool:
    """Return whether a module is part of the core, or a package around it."""
    return any(
        module == each or module.startswith(f"{each}.") or each.startswith(f"{module}.")
        for each in core
    )


def imported_modules(name: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after importing a pattern."""
    code = f"import json, sys, app.patterns.{name}; print(json.dumps(list(sys.modules)))"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    output = subprocess.check_output([PYTHON, "-c", code], cwd=PROJECT, env=environment)
    return set(json.loads(output))


def statements(tables: list[str]) -> list[str]:
    """Return the SQL of the example's migration that makes these tables."""
    upgrade = SQL.split("def downgrade")[0]
    found = re.findall(r'op\.execute\((?:"""|")(.*?)(?:"""|")\)', upgrade, re.DOTALL)
    return [
        statement
        for statement in found
        if any(re.search(rf"(table|on) {table}\b", statement) for table in tables)
    ]


def add_tables(project: Path, needs: str) -> None:
    """Write a migration with the tables that a pattern needs."""
    tables = re.findall(r"table `(\w+)`", needs)
    lines = [f"    op.execute({statement!r})" for statement in statements(tables)]
    upgrade = "\n".join(lines or ["    pass"])
    text = (
        'from alembic import op\n\nrevision = "0001_ours"\ndown_revision = None\n\n\n'
        f"def upgrade():\n{upgrade}\n\n\ndef downgrade():\n    pass\n"
    )
    (project / "migrations/versions/0001_ours.py").write_text(text)


def copy(project: Path, directory: str, names: list[str]) -> None:
    """Copy files of the template to the same directory of a project."""
    (project / directory).mkdir(exist_ok=True)
    for name in names:
        shutil.copy2(PROJECT / directory / name, project / directory / name)


def test_table_lists_every_pattern_and_test() -> None:
    patterns = {path.name for path in (PROJECT / "app/patterns").glob("*.py")} - {"__init__.py"}
    listed = {f"{row.name}.py" for row in ROWS}
    for row in ROWS:
        listed.update(files(row.along))
    assert listed == patterns
    tests = {path.name for path in (PROJECT / "tests/patterns").glob("test_*.py")}
    assert {file for row in ROWS for file in files(row.test)} == tests


def test_every_listed_table_has_its_sql() -> None:
    for row in ROWS:
        for table in re.findall(r"table `(\w+)`", row.needs):
            assert any(f"create table {table}" in each for each in statements([table])), table


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_pattern_imports_only_its_listed_files_and_the_core(row: Row) -> None:
    modules = imported_modules(row.name)
    of_app = {module for module in modules if module.partition(".")[0] == "app"}
    patterns = {module for module in of_app if module.startswith("app.patterns.")}
    expected = {f"{row.name}.py", *files(row.along)}
    assert patterns == {f"app.patterns.{file.removesuffix('.py')}" for file in expected}
    core = core_modules()
    assert core
    others = of_app - patterns - {"app", "app.patterns"}
    assert {module for module in others if not is_core(module, core)} == set()
    assert "gunicorn" not in modules


def test_stream_consumer_loads_few_modules() -> None:
    modules = imported_modules("stream_consumer")
    of_app = sorted(module for module in modules if module.partition(".")[0] == "app")
    assert len(of_app) <= MAX_CONSUMER_MODULES, of_app


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_copied_pattern_passes_its_test(bake: Bake, row: Row) -> None:
    project = bake(include_example=False)
    copy(project, "app/patterns", ["__init__.py", f"{row.name}.py", *files(row.along)])
    copy(project, "tests/patterns", ["__init__.py", "conftest.py", *files(row.test)])
    copy(project, "scripts", re.findall(r"`scripts/(\w+\.py)`", row.needs))
    add_tables(project, row.needs)
    command = [PYTHON, "-c", f"import app.patterns.{row.name}"]
    if files(row.test):
        command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/patterns"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
