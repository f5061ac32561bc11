"""The import contracts of the generated service: they hold, and each planted import breaks one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SERVICE_BIN, Bake, missing
from tests.parts import ALL_PARTS, COMBINATIONS, Parts, bake_parts, parts_id

ONE_WAY = "Imports go one way"
SERVING = "The application never imports the serving runtime"
GUNICORN = "Only the serving runtime imports gunicorn"
CIRCLES = "No circles"


def lint_imports(project: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of a project with the service's own tools."""
    program = SERVICE_BIN / "lint-imports"
    if not program.exists():
        missing(f"{program}, which `make setup` installs,")
    command = [str(program), "--no-cache", "--no-logo"]
    return subprocess.run(
        command,
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def plant(project: Path, module: str, statement: str) -> None:
    """Add an import to a module of the application."""
    path = project / "app" / module
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else '"""A feature."""\n'
    path.write_text(f"{text}\n\n{statement}\n")


def broken(output: str) -> list[str]:
    """Return the contracts that the output reports as broken."""
    return [line for line in output.splitlines() if " BROKEN" in line]


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_contracts_are_kept(bake: Bake, parts: Parts) -> None:
    done = lint_imports(bake_parts(bake, parts))
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("lifespan.py", "from app.serving import shared_flags", SERVING),
        ("web/health.py", "from app.serving.server import ServiceServer", SERVING),
        ("web/limits.py", "import gunicorn.arbiter", GUNICORN),
        ("process.py", "from uvicorn_worker import UvicornWorker", GUNICORN),
        ("storage/postgres.py", "from app.web import health", ONE_WAY),
        ("tasks.py", "from app.telemetry import logs", ONE_WAY),
        ("settings.py", "from app.sizing import plan", ONE_WAY),
        ("telemetry/logs.py", "from app.web import problems", CIRCLES),
    ],
)
@pytest.mark.parametrize("parts", [ALL_PARTS, ()], ids=parts_id)
def test_wrong_import_breaks_its_contract(
    bake: Bake, parts: Parts, module: str, statement: str, contract: str
) -> None:
    project = bake_parts(bake, parts)
    plant(project, module, statement)
    done = lint_imports(project)
    assert done.returncode != 0
    assert any(line.startswith(contract) for line in broken(done.stdout)), done.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("storage/redis.py", "from app.payments import repository"),
        ("patterns/outbox.py", "from app.payments.schemas import Payment"),
        ("web/problems.py", "from app.patterns import fail_open"),
        ("process.py", "from app.payments import consumer"),
        ("jobs/table.py", "from app.conversations import repository"),
        ("jobs/table.py", "from app.patterns import outbox"),
        ("jobs/table.py", "from app.payments import repository"),
        ("web/problems.py", "from app.jobs import table"),
    ],
)
def test_import_of_a_feature_from_below_breaks_the_layers(
    bake: Bake, module: str, statement: str
) -> None:
    project = bake_parts(bake, ALL_PARTS)
    plant(project, module, statement)
    done = lint_imports(project)
    assert any(line.startswith(ONE_WAY) for line in broken(done.stdout)), done.stdout


def test_type_checking_imports_count(bake: Bake) -> None:
    project = bake(include_example=False)
    guarded = (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from app.web import middleware"
    )
    plant(project, "telemetry/access_log.py", guarded)
    assert lint_imports(project).returncode != 0


def test_new_feature_without_a_place_is_named(bake: Bake) -> None:
    project = bake(include_example=False)
    plant(project, "orders/__init__.py", "")
    done = lint_imports(project)
    assert done.returncode != 0
    assert "app.orders" in done.stdout


@pytest.mark.parametrize("include_example", [True, False])
def test_new_feature_in_its_place_is_accepted(bake: Bake, include_example: bool) -> None:
    project = bake(include_example=include_example)
    plant(project, "orders/__init__.py", "from app.storage.postgres import Database")
    configuration = project / "pyproject.toml"
    text = configuration.read_text()
    line = '    "(payments)", # example\n' if include_example else '    "process",\n'
    assert text.count(line) == 1 or include_example
    place = (
        '    "(payments) | orders", # example\n' if include_example else '    "orders",\n' + line
    )
    configuration.write_text(text.replace(line, place))
    done = lint_imports(project)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("module", ["app.main", "app.payments.consumer"])
def test_application_loads_no_gunicorn(bake: Bake, module: str) -> None:
    script = f"import {module}, sys; print([name for name in sys.modules if 'gunicorn' in name])"
    python = SERVICE_BIN / "python"
    if not python.exists():
        missing(f"{python}, which `make setup` installs,")
    command = [str(python), "-c", script]
    project = bake()
    shutil.rmtree(project / "app/serving")  # not even needed
    output = subprocess.run(command, cwd=project, stdout=subprocess.PIPE, check=True, text=True)
    assert output.stdout.strip() == "[]"
