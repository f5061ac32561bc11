"""docs/first-feature.md of the service: each of its steps is applied, and the result is green."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, SOURCE, bake_to, tree
from tests.projects import environment
from tests.test_feature import check, link_environment, run

GUIDE = (ROOT / SOURCE / "docs/first-feature.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`((?:app|tests|migrations)/[\w/.]+|README\.md|\.env\.example)`")


class Step(NamedTuple):
    """A block of the guide, with the file that the text above it names last."""

    language: str
    code: str
    file: str
    is_appended: bool


def steps() -> list[Step]:
    """Return the blocks of the guide in their order."""
    found = []
    file = ""
    end = 0
    for block in BLOCK.finditer(GUIDE):
        text = GUIDE[end : block.start()]
        end = block.end()
        names = FILE.findall(text)
        file = names[-1] if names else file
        found.append(Step(block[1], block[2], file, "Append" in text))
    return found


def newest(directory: Path) -> Path:
    """Return the newest migration."""
    return max(directory.glob("*.py"), key=lambda path: path.stat().st_mtime_ns)


def edit(path: Path, diff: str) -> None:
    """Apply a block of changes, whose unchanged lines find the place."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


def apply(project: Path, step: Step) -> None:
    """Do what the guide says. The checks of the service run at the end."""
    path = project / step.file
    if step.language == "sh":
        commands = step.code.replace("make format lint types test\n", "true\n")
        commands = commands.replace("make test T=tests/orders\n", "true\n")
        done = subprocess.run(
            ["bash", "-ec", commands],
            cwd=project,
            env=environment(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
    elif step.language == "diff":
        edit(newest(path) if path.is_dir() else path, step.code)
    elif step.is_appended:
        path.write_text(f"{path.read_text()}\n\n{step.code}")
    else:
        assert not path.exists()
        path.write_text(step.code)


def test_every_block_has_a_file_or_is_a_command() -> None:
    assert {step.language for step in steps()} == {"sh", "diff", "python"}
    assert all(step.file for step in steps() if step.language != "sh")


@pytest.mark.slow
@pytest.mark.parametrize("include_example", [True, False])
def test_guide_leads_to_a_green_service(
    template: Path, tmp_path: Path, include_example: bool
) -> None:
    project = bake_to(template, tmp_path, include_example=include_example)
    link_environment(project)
    for step in steps():
        apply(project, step)
    check(project)
    if include_example:
        mypy_cache = str(project / ".venv/cache/mypy")
        run(project, "mypy", "--cache-dir", mypy_cache, "app/main.py", "tests/orders")
    tests = ["tests/orders", "tests/test_settings.py", "-k", "orders or readme or env_example"]
    output = run(project, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert " passed" in output
    assert "supplier.py" in " ".join(tree(project))
