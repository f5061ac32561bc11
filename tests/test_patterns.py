"""Each pattern can be taken alone, with what docs/patterns.md says that it takes along, and passes its test."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, Bake

ROW = re.compile(r"^\| [^|]+ \| `(\w+)\.py` \|([^|]*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs/patterns.md").read_text())
SQL = (ROOT / SOURCE / "migrations/versions/0002_patterns.py").read_text()
PYTHON = str(SERVICE_BIN / "python")


def files(cell: str) -> list[str]:
    """Return the files that a cell of the table names."""
    return re.findall(r"`(\w+\.py)`", cell)


def add_tables(project: Path, needs: str) -> None:
    """Write a migration with the SQL of the tables that a pattern needs."""
    tables = re.findall(r"table `(\w+)`", needs)
    statements = [
        statement
        for statement in re.findall(
            r'op\.execute\((?:"""|")(.*?)(?:"""|")\)', SQL.split("def downgrade")[0], re.DOTALL
        )
        if any(re.search(rf"(table|on) {table}\b", statement) for table in tables)
    ]
    upgrade = (
        "".join(f"    op.execute({statement!r})\n" for statement in statements) or "    pass\n"
    )
    (project / "migrations/versions/0001_ours.py").write_text(
        f'from alembic import op\n\nrevision = "0001_ours"\ndown_revision = None\n\n\ndef upgrade():\n{upgrade}\n\n'
        "def downgrade():\n    pass\n"
    )


def test_the_table_names_every_pattern() -> None:
    patterns = {path.name for path in (ROOT / SOURCE / "app/patterns").glob("*.py")} - {
        "__init__.py"
    }
    assert {f"{name}.py" for name, *_ in ROWS} | {
        file for row in ROWS for file in files(row[1])
    } == patterns
    tests = {path.name for path in (ROOT / SOURCE / "tests/patterns").glob("test_*.py")}
    assert {file for row in ROWS for file in files(row[2])} == tests


@pytest.mark.slow
@pytest.mark.parametrize(("name", "along", "test", "needs"), ROWS, ids=[row[0] for row in ROWS])
def test_a_pattern_is_taken_alone(bake: Bake, name: str, along: str, test: str, needs: str) -> None:
    project = bake(include_example=False)
    for folder, names in (
        ("app/patterns", ["__init__.py", f"{name}.py", *files(along)]),
        ("tests/patterns", ["__init__.py", "conftest.py", *files(test)]),
    ):
        (project / folder).mkdir()
        for file in names:
            shutil.copy2(ROOT / SOURCE / folder / file, project / folder / file)
    add_tables(project, needs)
    command = [PYTHON, "-c", f"import app.patterns.{name}"]
    if files(test):
        command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/patterns"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
