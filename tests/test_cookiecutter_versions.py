"""Every cookiecutter from 1.7.0 on generates the same project.

Before 2.7 a boolean on the command line arrives as text: cookiecutter's documentation, "Boolean
Variables", which were added in 2.2. Before 1.7.1 there is no filter `slugify`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NAME, Bake, missing, tree
from tests.projects import environment, tools

#: The oldest; Debian 12's and Ubuntu 22.04's; the last without boolean variables; two newer ones.
VERSIONS = ("1.7.0", "1.7.3", "2.1.1", "2.2.3", "2.6.0")


def install(version: str, directory: Path) -> Path:
    """Install a version of cookiecutter; return its interpreter. Skip without a package index."""
    uv = shutil.which("uv") or str(tools() / "bin/uv")
    if not Path(uv).exists():
        missing("uv, which `make setup` installs,")
    python = directory / "bin/python"
    package = f"cookiecutter=={version}"
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(directory)],
        ["pip", "install", "--quiet", "--python", str(python), package],
    ):
        done = subprocess.run(
            [uv, *command], env=environment(), stderr=subprocess.PIPE, check=False
        )
        if done.returncode:
            missing(f"{package}: {done.stderr.decode()}")
    return python


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(request.param, tmp_path_factory.mktemp("cookiecutter") / "venv")


def generate(
    python: Path, template: Path, output: Path, *answers: str
) -> subprocess.CompletedProcess[str]:
    options = ["--no-input", "--default-config", "--output-dir", str(output)]
    named = [f"{name}={value}" for name, value in NAME.items()]
    command = [str(python), "-m", "cookiecutter", str(template), *options, *named, *answers]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["no", "False", "n", " NO "])
def test_example_is_left_out(
    python: Path, template: Path, bake: Bake, tmp_path: Path, answer: str
) -> None:
    done = generate(python, template, tmp_path, f"include_example={answer}")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "my-service") == tree(bake(include_example=False))


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["yes", "True"])
def test_jobs_are_included(
    python: Path, template: Path, bake: Bake, tmp_path: Path, answer: str
) -> None:
    answers = ["include_example=no", f"include_jobs={answer}"]
    done = generate(python, template, tmp_path, *answers)
    assert done.returncode == 0, done.stderr
    expected = bake(include_example=False, include_jobs=True)
    assert tree(tmp_path / "my-service") == tree(expected)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [[], ["include_example=yes", "include_jobs=no"]])
def test_example_is_included(
    python: Path, template: Path, bake: Bake, tmp_path: Path, answers: list[str]
) -> None:
    done = generate(python, template, tmp_path, *answers)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "my-service") == tree(bake())


@pytest.mark.slow
@pytest.mark.parametrize("question", ["include_example", "include_jobs"])
@pytest.mark.parametrize("answer", ["", "maybe"])
def test_an_answer_that_is_no_boolean_is_rejected_with_one_line(
    python: Path, template: Path, tmp_path: Path, question: str, answer: str
) -> None:
    done = generate(python, template, tmp_path, f"{question}={answer}")
    assert done.returncode != 0
    line = f"{question}={json.dumps(answer)}: must be yes or no"
    assert done.stderr.splitlines()[0] == line
    assert not list(tmp_path.iterdir())
