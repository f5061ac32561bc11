"""Fixtures: a clean copy of the template, and bakes of it."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from cookiecutter.main import cookiecutter

from scripts.interpreter import find

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "{{cookiecutter.project_slug}}"
#: The only files that may hold Jinja; hooks are rendered too, and have just the answers in them.
JINJA_ALLOWED = re.compile(
    rf"{re.escape(SOURCE)}/(README\.md|docs/runbook\.md|deploy/.*)|hooks/.*\.py|cookiecutter\.json"
)
#: The programs of the service's environment.
SERVICE_BIN = Path(os.environ.get("SERVICE_BIN", ROOT / ".venv-service/bin"))
PYTHONS = ("3.11", "3.12", "3.13")
CI = os.environ.get("CI") == "true"

Bake = Callable[..., Path]


def tracked() -> list[str]:
    """Return the files of the template as git would commit them now; caches and environments are not among them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = (
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        .stdout.decode()
        .split("\0")
    )
    return sorted(name for name in names if name and (ROOT / name).is_file())


def missing(what: str) -> NoReturn:
    """Skip a test for want of a tool; where everything is to run, fail."""
    if CI:
        pytest.fail(f"{what} is missing, and CI=true makes that a failure")
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would commit: nothing else may get into a bake."""
    copy = tmp_path_factory.mktemp("template")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def bake_to(template: Path, output: Path, accept_hooks: bool = True, **answers: object) -> Path:
    """Bake the template with answers into a folder of `output`; return it."""
    options = {"no_input": True, "default_config": True, "accept_hooks": accept_hooks}
    return Path(
        cookiecutter(str(template), output_dir=str(output), extra_context=answers, **options)
    )


@pytest.fixture
def bake(template: Path, tmp_path: Path) -> Bake:
    """Return a function that bakes the template with answers and returns the project's folder."""

    def bake(folder: str = "out", accept_hooks: bool = True, **answers: object) -> Path:
        return bake_to(template, tmp_path / folder, accept_hooks, **answers)

    return bake


def render(folder: Path) -> str:
    """Return the manifests that kustomize makes of a folder, or skip where there is no kustomize."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build", str(folder)]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
    else:
        missing("kustomize (or kubectl, which has one inside)")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tree(folder: Path) -> dict[str, bytes]:
    """Return each file below a folder with its content; empty folders appear with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def interpreter(version: str) -> str:
    """Return an interpreter of this minor version that runs, or skip."""
    if found := find(version):
        return found
    missing(f"Python {version}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let processes share the work, file by file: the longest come first, then what is quick."""
    longest = ["test_ordinary_user.py", "test_service.py", "test_generated.py"]
    order = {name: place for place, name in enumerate(longest)}
    items.sort(
        key=lambda item: (
            order.get(item.path.name, len(order)),
            bool(item.get_closest_marker("slow")),
        )
    )
