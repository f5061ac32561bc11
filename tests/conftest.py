"""Fixtures: a clean copy of the template, and projects generated from it."""

import functools
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from cookiecutter.main import cookiecutter

from scripts.interpreter import find

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "{{cookiecutter.project_slug}}"
#: What a fork adds to the lists of these tests: docs/forking.md. The template never has this file.
FORK_LISTS = ROOT / "tests/house/lists.toml"
FORK: dict[str, list[str]] = tomllib.loads(FORK_LISTS.read_text()) if FORK_LISTS.exists() else {}
#: The only files that may contain Jinja. Cookiecutter renders hooks too; they contain only answers.
#: `house/` is the fork's.
_RENDERED = [
    r"README\.md",
    r"docs/(runbook|alerts)\.md",
    r"deploy/.*(?<!\.json)",
    "house/.*",
    *FORK.get("jinja", []),
]
JINJA_ALLOWED = re.compile(
    rf"{re.escape(SOURCE)}/({'|'.join(_RENDERED)})|hooks/.*\.py|cookiecutter\.json"
)
#: The questions, without cookiecutter's own variables.
QUESTIONS: list[str] = [
    name
    for name in json.loads((ROOT / "cookiecutter.json").read_text())
    if not name.startswith("_")
]
#: The name of generated projects in tests, whatever the default of a fork is.
NAME = {"project_name": "My Service"}
#: The programs of the service's environment.
SERVICE_BIN = Path(os.environ.get("SERVICE_BIN", ROOT / ".venv-service/bin"))
CI = os.environ.get("CI") == "true"

Bake = Callable[..., Path]


def tracked() -> list[str]:
    """Return the files that git would commit now, without caches and environments."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    names = done.stdout.decode().split("\0")
    return sorted(name for name in names if name and (ROOT / name).is_file())


def missing(requirement: str) -> NoReturn:
    """Skip the test because a requirement is missing; with CI=true, fail it."""
    if CI:
        pytest.fail(f"{requirement} is missing, and CI=true makes that a failure")
    pytest.skip(f"{requirement} is missing")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git would commit: nothing else may get into a project."""
    copy = tmp_path_factory.mktemp("template")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def bake_to(template: Path, output: Path, accept_hooks: bool = True, **answers: object) -> Path:
    """Generate a project in a subdirectory of `output`; return its directory."""
    project = cookiecutter(
        str(template),
        no_input=True,
        default_config=True,
        accept_hooks=accept_hooks,
        output_dir=str(output),
        extra_context=NAME | answers,
    )
    return Path(project)


@pytest.fixture(scope="session")
def generate_once(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """Return a function that generates a project once per set of answers. Tests copy it."""

    @functools.cache
    def generate(accept_hooks: bool, *answers: tuple[str, object]) -> Path:
        output = tmp_path_factory.mktemp("original")
        return bake_to(template, output, accept_hooks, **dict(answers))

    return generate


@pytest.fixture
def bake(generate_once: Bake, tmp_path: Path) -> Bake:
    """Return a function that gives a test a project of its own, and returns its directory.

    Generation needs 0.5 s of CPU, a copy 0.03 s. `bake_to` always generates.
    """

    def bake(output: str = "out", accept_hooks: bool = True, **answers: object) -> Path:
        project = generate_once(accept_hooks, *sorted(answers.items()))
        return Path(shutil.copytree(project, tmp_path / output / project.name, symlinks=True))

    return bake


def render(directory: Path) -> str:
    """Return the manifests that kustomize renders; skip without kustomize."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build", str(directory)]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(directory)]
    else:
        missing("kustomize (or kubectl, which includes it)")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tree(directory: Path) -> dict[str, bytes]:
    """Return the files below a directory with their content.

    Empty directories appear with a trailing slash.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def interpreter(version: str) -> str:
    """Return a working interpreter of this minor version, or skip the test."""
    found = find(version)
    if found:
        return found
    missing(f"Python {version}")


#: The slowest files, slowest first.
SLOWEST = [
    "test_ordinary_user.py",
    "test_service.py",
    "test_generated.py",
    "test_combinations.py",
    # xdist gives a process its next file when it starts the last two tests of its current one. So
    # these wait for the first three, and are quick.
    "test_dashboards.py",
    "test_imports.py",
    "test_private_index.py",
    "test_fork.py",
    "test_labs.py",
    "test_compose.py",
    "test_benchmarks.py",
    "test_readme.py",
    "test_patterns.py",
    "test_schema.py",
    "test_image.py",
    "test_first_week.py",
    "test_audit.py",
    "test_mutations.py",
]


def start_order(item: pytest.Item) -> tuple[int, bool]:
    """Sort key: the slowest files first, then quick tests before slow ones."""
    place = SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST)
    is_slow = item.get_closest_marker("slow") is not None
    return place, is_slow


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs less of the tests that generate projects."""
    parser.addoption(
        "--ends-of-lists",
        action="store_true",
        help="run tests that generate projects with the first and the last of their parameters",
    )


def inner_parameters(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests that generate a project, but for the first and last of each function."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "template" in getattr(item, "fixturenames", ()):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [item for function in functions.values() for item in function[1:-1]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the slowest files first: xdist distributes whole files in this order."""
    if config.getoption("ends_of_lists"):
        left_out = inner_parameters(items)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=start_order)
