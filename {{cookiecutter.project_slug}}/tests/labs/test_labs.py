"""The command of the labs. The template's tests run each lab, which takes minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labs import __main__ as command
from labs.__main__ import Lab
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


class FakeLab(Lab):
    """A lab that starts nothing."""

    def run(self, stage: Stage) -> None:
        stage.say("measured")
        if self.name == "error":
            raise LabError("no luck")
        if self.name == "exit":
            sys.exit("no Postgres: install it")
        stage.claims.claim("a", self.name != "broken")
        stage.claims.control("b", True)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the results."""
    monkeypatch.setenv("LABS_DIRECTORY", str(tmp_path / "labs"))
    return tmp_path / "labs"


def test_results_are_written(results: Path) -> None:
    assert command.run_lab(FakeLab(1, "good", "title"))
    text = (results / "good.txt").read_text()
    assert text == "measured\n\nclaim held: a\ncontrol failed as it must: b\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "CLAIM BROKEN: a"),
        ("error", "error: no luck"),
        # scripts/dev_services.py exits without Postgres.
        ("exit", "exit: no Postgres: install it"),
    ],
)
def test_broken_lab_fails(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not command.run_lab(FakeLab(1, name, "title"))
    assert message in capsys.readouterr().out


def test_all_labs_run_and_a_summary_follows(capsys: pytest.CaptureFixture[str]) -> None:
    """One that fails does not keep the others from running."""
    known = [FakeLab(number, name, "") for number, name in enumerate(["good", "error", "last"], 1)]
    assert not command.run_all(known)
    printed = capsys.readouterr().out
    assert [line.split()[:3] for line in printed.splitlines()[-5:-2]] == [
        ["1", "good", "held"],
        ["2", "error", "FAILED"],
        ["3", "last", "held"],
    ]
    assert "[2 of 3]" in printed
    assert "2 of 3 labs hold their claims." in printed
    assert command.run_all(known[:1])
