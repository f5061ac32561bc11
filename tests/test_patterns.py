"""`make pattern` copies each pattern of docs/patterns.md into a service without the example."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, Bake, bake_to, missing, tree
from tests.projects import copy_types

PROJECT = ROOT / SOURCE
DOCUMENT = (PROJECT / "docs/patterns.md").read_text()
#: Modules of `app` that importing the stream consumer may load, `app` itself included.
MAX_CONSUMER_MODULES = 9
ROW = re.compile(r"^\| ([^|]+) \| `(\w+)` \|([^|]*)\|([^|]*)\|$", re.MULTILINE)
ROWS = {name: (summary, along, needs) for summary, name, along, needs in ROW.findall(DOCUMENT)}
PRINT_PATTERNS = (
    "import json; from scripts.add_pattern import PATTERNS; "
    "print(json.dumps({name: each._asdict() for name, each in PATTERNS.items()}))"
)


def run(project: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the service's environment in a project."""
    program = SERVICE_BIN / command[0]
    if not program.exists():
        missing(f"{program}, which `make setup` installs,")
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        [str(program), *command[1:]],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def pattern(project: Path, *name: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run what `make pattern` runs, in the service's environment."""
    return run(project, "python", "-m", "scripts.add_pattern", *name, **variables)


def add(project: Path, name: str) -> None:
    """Copy a pattern."""
    done = pattern(project, name)
    assert done.returncode == 0, done.stderr


def add_all(project: Path) -> None:
    """Copy all patterns, one after another."""
    for name in ROWS:
        if not (project / f"app/patterns/{name}.py").exists():
            add(project, name)


def succeeds(project: Path, *command: str) -> str:
    """Run a program of the service's environment; fail with its output."""
    done = run(project, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def patterns() -> dict[str, dict[str, Any]]:
    """The patterns that `scripts/add_pattern.py` lists."""
    found: dict[str, dict[str, Any]] = json.loads(succeeds(PROJECT, "python", "-c", PRINT_PATTERNS))
    return found


@pytest.fixture(scope="module")
def bare(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without the example, to be copied."""
    return bake_to(template, tmp_path_factory.mktemp("bare"), include_example=False)


@pytest.fixture
def project(bare: Path, tmp_path: Path) -> Path:
    """A project without the example."""
    return shutil.copytree(bare, tmp_path / "project")


def names(cell: str) -> set[str]:
    """Return the names that a cell of the table has in backticks."""
    return set(re.findall(r"`(\w+)`", cell))


def core_modules() -> list[str]:
    """Return the modules and packages that every pattern may import."""
    sentence = DOCUMENT.partition("Every pattern may import")[2].partition("\n\n")[0]
    paths = re.findall(r"`(app/[\w/.]+)`", sentence)
    return [path.removesuffix(".py").strip("/").replace("/", ".") for path in paths]


def is_core(module: str, core: list[str]) -> bool:
    """Return whether a module is part of the core, or a package around it."""
    return any(
        module == each or module.startswith(f"{each}.") or each.startswith(f"{module}.")
        for each in core
    )


def imported_modules(project: Path, name: str, test: str = "") -> set[str]:
    """Return the modules that a fresh interpreter has loaded after importing a pattern.

    It imports the test of the pattern afterwards.
    """
    code = f"import json, sys, app.patterns.{name}; print(json.dumps(list(sys.modules)))"
    if test:
        code += f"; import tests.patterns.test_{test}"
    return set(json.loads(succeeds(project, "python", "-c", code)))


def test_document_and_script_list_the_same(patterns: dict[str, dict[str, Any]]) -> None:
    assert set(ROWS) == set(patterns)
    for name, (summary, along, needs) in ROWS.items():
        each = patterns[name]
        assert summary == each["summary"]
        assert names(along) == {*each["along"], *each["parts"]}
        packages = {re.split("[>=]", requirement)[0] for requirement in each["packages"]}
        tables = {each["table"]} - {""}
        assert names(needs) == packages | tables


def test_every_module_and_test_of_the_patterns_is_listed(
    patterns: dict[str, dict[str, Any]],
) -> None:
    modules = {name for each in patterns for name in (each, *patterns[each]["parts"])}
    files = {path.stem for path in (PROJECT / "app/patterns").glob("*.py")} - {"__init__"}
    assert modules == files
    tests = {f"test_{each['test'] or name}" for name, each in patterns.items()}
    assert tests == {path.stem for path in (PROJECT / "tests/patterns").glob("test_*.py")}


def test_requirements_are_those_of_the_template(patterns: dict[str, dict[str, Any]]) -> None:
    configuration = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    groups = configuration["dependency-groups"]
    groups["project"] = configuration["project"]["dependencies"]
    for each in patterns.values():
        for requirement, group in each["packages"].items():
            assert requirement in groups[group]


def test_stream_consumer_loads_few_modules() -> None:
    modules = imported_modules(PROJECT, "stream_consumer")
    of_app = sorted(module for module in modules if module.partition(".")[0] == "app")
    assert len(of_app) <= MAX_CONSUMER_MODULES, of_app


@pytest.mark.parametrize("name", ROWS)
def test_copied_pattern_imports_only_its_copies_and_the_core(
    project: Path, patterns: dict[str, dict[str, Any]], name: str
) -> None:
    """Its test is imported too."""
    add(project, name)
    modules = imported_modules(project, name, patterns[name]["test"] or name)
    of_app = {module for module in modules if module.partition(".")[0] == "app"}
    loaded = {module for module in of_app if module.startswith("app.patterns.")}
    copied = {path.stem for path in (project / "app/patterns").glob("*.py")} - {"__init__"}
    assert loaded <= {f"app.patterns.{module}" for module in copied}
    core = core_modules()
    assert core
    others = of_app - loaded - {"app", "app.patterns"}
    assert {module for module in others if not is_core(module, core)} == set()
    assert "gunicorn" not in modules


def passes_lint(project: Path) -> None:
    """Fail with the output of the first command of `make lint` that fails."""
    succeeds(project, "ruff", "check", "--no-cache", ".")
    succeeds(project, "ruff", "format", "--no-cache", "--check", ".")
    succeeds(project, "lint-imports", "--no-cache")


def test_copied_patterns_pass_lint(project: Path) -> None:
    """One of them, then all of them: the same files and requirements as in the template."""
    add(project, "outbox")
    passes_lint(project)
    add_all(project)
    passes_lint(project)
    for directory in ("app/patterns", "tests/patterns"):
        assert tree(project / directory) == tree(PROJECT / directory)
    copy, original = (
        tomllib.loads((path / "pyproject.toml").read_text()) for path in (project, PROJECT)
    )
    # The packages of jobs, which this project does not have.
    of_jobs = {"aio-pika>=10.2,<11", "cronsim>=2.8,<3"}
    assert set(copy["project"]["dependencies"]) == (
        set(original["project"]["dependencies"]) - of_jobs
    )
    # The package of labs, which come with the example.
    of_labs = {"pillow>=13,<14"}
    assert set(copy["dependency-groups"]["dev"]) == (
        set(original["dependency-groups"]["dev"]) - of_labs
    )


@pytest.mark.slow
def test_all_patterns_one_after_another_pass_types_and_tests(project: Path) -> None:
    add_all(project)
    copy_types(project.parent / "mypy")
    succeeds(project, "mypy", "--cache-dir", "../mypy")
    tests = ["tests/patterns", "tests/test_migrations.py"]
    succeeds(project, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_without_a_name_each_pattern_has_a_line(project: Path) -> None:
    add(project, "rate_limit")
    lines = pattern(project).stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(ROWS)
    present = [line.split()[0] for line in lines if line.endswith(" (present)")]
    assert present == ["fail_open", "rate_limit"]


def test_make_target_copies_a_pattern(project: Path) -> None:
    command = ["make", "--silent", f"VENV={SERVICE_BIN.parent}", "pattern", "P=fail-open"]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "wrote app/patterns/fail_open.py\n" in done.stdout
    assert (project / "tests/patterns/test_fail_open.py").exists()


def write_migration(project: Path, revision: str) -> None:
    """Add a migration of the team's without a predecessor."""
    text = f'revision = "{revision}"\ndown_revision = None\n'
    (project / f"migrations/versions/{revision}.py").write_text(text)


def test_table_follows_the_newest_migration_of_the_team(project: Path) -> None:
    write_migration(project, "0001_ours")
    add(project, "inbox")
    history = succeeds(project, "alembic", "history").splitlines()
    assert re.fullmatch(r"0001_ours -> \w{12} \(head\), Create the table inbox\.?", history[0]), (
        history
    )
    assert history[1].startswith("<base> -> 0001_ours")


def make_two_heads(project: Path) -> None:
    write_migration(project, "0001_ours")
    write_migration(project, "0001_theirs")


def break_a_migration(project: Path) -> None:
    (project / "migrations/versions/0001_ours.py").write_text("revision = \n")


def create_the_table(project: Path) -> None:
    write_migration(project, "0001_ours")
    with (project / "migrations/versions/0001_ours.py").open("a") as file:
        file.write('SQL = "create table inbox (id int)"\n')


def remove_the_source(project: Path) -> None:
    (project / "docs/patterns/app/patterns/inbox.py").unlink()


def rename_the_layer(project: Path) -> None:
    path = project / "pyproject.toml"
    text, count = re.subn(r'"auth",', '"login",', path.read_text())
    assert count == 1
    path.write_text(text)


def write_an_own_test(project: Path) -> None:
    (project / "tests/patterns").mkdir()
    (project / "tests/patterns/test_inbox.py").write_text("")


@pytest.mark.parametrize(
    ("prepare", "name", "error"),
    [
        (None, "outbix", "P=outbix: must be one of cache_aside, "),
        (None, "../outbox", "P=../outbox: must be one of cache_aside, "),
        (make_two_heads, "inbox", "several migrations are the newest, 0001_ours and 0001_theirs: "),
        (break_a_migration, "inbox", "migrations/versions: invalid syntax"),
        (create_the_table, "inbox", "migrations/versions/0001_ours.py creates the table inbox "),
        (remove_the_source, "inbox", "docs/patterns/app/patterns/inbox.py is missing: restore "),
        (rename_the_layer, "inbox", "pyproject.toml has no layer with "),
        (write_an_own_test, "inbox", "P=inbox: tests/patterns/test_inbox.py exists; "),
    ],
)
def test_impossible_copy_is_one_line_and_changes_nothing(
    project: Path, prepare: Any, name: str, error: str
) -> None:
    if prepare:
        prepare(project)
    before = tree(project)
    done = pattern(project, name)
    assert done.returncode == 1
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert tree(project) == before


def test_second_copy_is_one_line_and_changes_nothing(project: Path) -> None:
    add(project, "outbox")
    before = tree(project)
    for name in ("outbox", "periodic"):
        done = pattern(project, name)
        assert done.returncode == 1
        expected = f"P={name}: already present, in app/patterns/{name}.py\n"
        assert done.stderr == expected
    assert tree(project) == before


def test_example_has_every_pattern(bake: Bake) -> None:
    project = bake()
    before = tree(project)
    assert pattern(project).stdout.count(" (present)\n") == len(ROWS)
    assert "already present" in pattern(project, "outbox").stderr
    assert tree(project) == before


def forget_packages(project: Path) -> None:
    """Lock again without the example's packages, as `make lock` does."""
    path = project / "requirements-dev.txt"
    entry = re.compile(r"^hypothesis==.*\n(    --hash.*\n)+", re.MULTILINE)
    text, count = entry.subn("", path.read_text())
    assert count == 1
    path.write_text(text)


def fake_uv(directory: Path, script: str) -> str:
    """Make a uv that runs a script; return the PATH on which it comes first."""
    directory.mkdir()
    (directory / "uv").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "uv").chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_packages_that_are_not_locked_are_locked(project: Path, tmp_path: Path) -> None:
    """By `make lock`; the index is needed only here."""
    forget_packages(project)
    path = fake_uv(tmp_path / "bin", 'for file; do :; done; echo "locked==1" >> "$file"')
    done = pattern(project, "idempotency", PATH=path)
    assert done.returncode == 0, done.stderr
    assert (project / "requirements-dev.txt").read_text().endswith("locked==1\n")


def test_packages_of_patterns_copied_along_are_locked(project: Path, tmp_path: Path) -> None:
    """No pattern has such a one yet."""
    forget_packages(project)
    path = fake_uv(tmp_path / "bin", 'for file; do :; done; echo "locked==1" >> "$file"')
    code = (
        "from scripts import add_pattern as script; "
        "pattern = script.PATTERNS['pagination']._replace(along=('idempotency',)); "
        "script.PATTERNS['pagination'] = pattern; script.main(['pagination'])"
    )
    done = run(project, "python", "-c", code, PATH=path)
    assert done.returncode == 0, done.stderr
    assert (project / "app/patterns/idempotency.py").exists()
    assert (project / "requirements-dev.txt").read_text().endswith("locked==1\n")


def test_packages_that_cannot_be_locked_change_nothing(project: Path, tmp_path: Path) -> None:
    forget_packages(project)
    before = tree(project)
    script = 'for file; do :; done; echo "half" > "$file"; echo "no route to the index" >&2; exit 2'
    done = pattern(project, "idempotency", PATH=fake_uv(tmp_path / "bin", script))
    assert done.returncode == 1
    problem = "cannot lock hypothesis: `make lock` failed; nothing was changed"
    assert problem in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert tree(project) == before
