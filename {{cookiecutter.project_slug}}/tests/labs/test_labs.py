"""The command of the labs. The template's tests run each lab, which takes minutes."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from labs import __main__ as command
from labs.stage import LabError, Stage

PROJECT = Path(__file__).parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "labs", *arguments],
        cwd=PROJECT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_labs_are_listed_by_number() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    numbers = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert numbers == sorted(set(numbers))
    assert "sigterm" in done.stdout


def test_unknown_lab_is_an_error_with_the_names() -> None:
    done = run("sigtrem")
    assert done.returncode == 2
    assert "sigtrem: no such lab; choose one of" in done.stderr
    assert "sigterm" in done.stderr


def lab(is_held: bool, *, error: str = "") -> ModuleType:
    """Return a lab that starts nothing."""

    def run(stage: Stage) -> None:
        stage.say("measured")
        if error:
            raise LabError(error)
        stage.claims.claim("a", is_held)
        stage.claims.control("b", True)

    module = ModuleType("lab")
    module.__dict__.update(NUMBER=1, TITLE="title", run=run)
    return module


def test_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABS_DIRECTORY", str(tmp_path / "labs"))
    assert command.run_lab("good", lab(True))
    text = (tmp_path / "labs/good.txt").read_text()
    assert text == "measured\n\nclaim held: a\ncontrol failed as it must: b\n"


@pytest.mark.parametrize("module", [lab(False), lab(True, error="no Postgres")])
def test_broken_lab_fails(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABS_DIRECTORY", str(tmp_path))
    assert not command.run_lab("bad", module)


def test_all_labs_run_and_a_summary_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that fails does not keep the others from running."""
    monkeypatch.setenv("LABS_DIRECTORY", str(tmp_path))
    known = {"good": lab(True), "broken": lab(True, error="no Postgres"), "last": lab(True)}
    assert not command.run_all(known)
    printed = capsys.readouterr().out
    assert [line.split()[:3] for line in printed.splitlines()[-5:-2]] == [
        ["1", "good", "held"],
        ["1", "broken", "FAILED"],
        ["1", "last", "held"],
    ]
    assert "[2 of 3]" in printed
    assert "2 of 3 labs hold their claims." in printed
    assert command.run_all({"good": lab(True)})


def test_missing_server_is_the_failure_of_one_lab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """scripts/dev_services.py exits without Postgres."""
    monkeypatch.setenv("LABS_DIRECTORY", str(tmp_path))
    module = lab(True)
    module.__dict__["run"] = lambda _: sys.exit("no Postgres: install it")
    assert not command.run_lab("bad", module)
    assert "bad: no Postgres: install it" in capsys.readouterr().out
