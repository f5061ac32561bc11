"""The template's own make works in a path with spaces and quotes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SOURCE, missing
from tests.projects import environment, tools


@pytest.fixture
def copy(template: Path, tmp_path: Path) -> Path:
    """A copy of the template, whose uv is in a path with spaces as well."""
    copy = tmp_path / "it's a b" / "template"
    shutil.copytree(template, copy)
    if not shutil.which("uv"):
        if not (tools() / "bin/uv").exists():
            missing("uv, which `make setup` installs,")
        shutil.copytree(tools() / "bin", copy / ".tools/bin")
    return copy


def make(copy: Path, *arguments: str, **variables: str) -> str:
    """Run make in the copy and return its output."""
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=copy,
        env=environment(**variables) | {"TOOLS": ".tools"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode()
    assert done.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("venv", ["", "my env"])
def test_environments_are_made_once(copy: Path, tmp_path: Path, venv: str) -> None:
    """GNU make separates words by spaces: "Rule Syntax" and "File Name Functions" of its manual.

    `VENV` may also be an absolute path with a space.
    """
    directory = tmp_path / venv / ".venv" if venv else copy / ".venv"
    variables = {"VENV": str(directory)} if venv else {}
    in_service = ["--directory", SOURCE, f"VENV={directory}-service", "TOOLS=../.tools"]
    make(copy, "setup", **variables)
    make(copy, *in_service, "setup")
    assert (directory / "bin/pytest").exists()
    assert (directory.parent / ".venv-service/bin/gunicorn").exists()
    assert "Nothing to be done" in make(copy, "setup", **variables)
    assert "Nothing to be done" in make(copy, *in_service, "setup")
    make(copy, *in_service, "doctor", AUTH_DISABLED="true")
    directories = {path.name for path in copy.iterdir() if path.name not in (".venv", ".tools")}
    assert "a" not in directories
    assert not (copy / SOURCE / ".venv").exists()
