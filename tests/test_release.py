"""`make release` checks, tags and lists the changes; the workflows publish them."""

import datetime
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts import release
from tests.conftest import ROOT
from tests.test_cruft import commit, make_repository, run_git

WORKFLOWS = sorted((ROOT / ".github/workflows").iterdir())
CHANGELOG = """\
# Changelog

## Unreleased

- A setting.

## v1.0.0 (2026-01-01)

- The first.
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one release, and an unreleased change."""
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    make_repository(tmp_path)
    run_git(tmp_path, "config", "user.name", "maintainer")
    run_git(tmp_path, "config", "user.email", "maintainer@example.org")
    run_git(tmp_path, "tag", "v1.0.0")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    commit(tmp_path, "a setting")
    return tmp_path


def test_release_has_the_unreleased_lines(root: Path) -> None:
    release.check(root, "1.10.0")
    release.release(root, "1.10.0", datetime.date(2026, 2, 1))
    text = (root / "CHANGELOG.md").read_text()
    assert "## Unreleased\n\n## v1.10.0 (2026-02-01)\n\n- A setting.\n\n## v1.0.0" in text
    body = run_git(root, "tag", "--list", "v1.10.0", "--format=%(contents:body)")
    assert body.decode().strip() == "- A setting."
    assert run_git(root, "describe").decode().strip() == "v1.10.0"
    assert release.released_versions(root) == ["1.0.0", "1.10.0"]
    with pytest.raises(ValueError, match="no unreleased lines"):
        release.check(root, "1.11.0")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("", "V=: must be three numbers, for example V=1.2.0"),
        ("v1.2.0", "V=v1.2.0: must be three numbers"),
        ("1.2", "V=1.2: must be three numbers"),
        ("01.2.0", "V=01.2.0: must be three numbers"),
        ("1.0.0", "must be greater than 1.0.0, the newest release"),
        ("0.9.9", "must be greater than 1.0.0"),
    ],
)
def test_invalid_version_is_rejected(root: Path, version: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        release.check(root, version)


def test_release_requires_a_clean_main(root: Path) -> None:
    (root / "new").touch()
    with pytest.raises(ValueError, match="commit them first"):
        release.check(root, "2.0.0")
    (root / "new").unlink()
    run_git(root, "switch", "--quiet", "--create", "feature")
    with pytest.raises(ValueError, match="git switch main"):
        release.check(root, "2.0.0")


def test_make_release_reports_one_line() -> None:
    command = ["make", "--silent", "release", "V=1", f"VENV={sys.prefix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    line = done.stderr.splitlines()[0]
    assert line == "not released: V=1: must be three numbers, for example V=1.2.0"
    assert "Traceback" not in done.stderr


def test_changelog_lists_every_release_newest_first() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    listed = [heading.split()[0][1:] for heading in headings[1:] if heading.startswith("v")]
    assert listed == sorted(listed, key=release.parse, reverse=True)
    assert set(release.released_versions(ROOT)) <= set(listed)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_of_the_template_are_those_of_its_projects(workflow: Path) -> None:
    """Pinned to the same commits, with least permissions, and no expression in a script."""
    source = (ROOT / "{{cookiecutter.project_slug}}/.github/workflows").glob("*.yml")
    pinned = {line for path in source for line in re.findall("uses: (.*)", path.read_text())}
    assert set(re.findall("uses: (.*)", workflow.read_text())) <= pinned
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {}
    for name, job in content["jobs"].items():
        writes = name == "release"
        assert job["permissions"] == {"contents": "write" if writes else "read"}
        assert not [step for step in job.get("steps", []) if "${{" in step.get("run", "")]


def test_ci_runs_every_python_with_every_answer() -> None:
    """All pairs of the options, in half as many runs as there are combinations."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = jobs["service"]["strategy"]["matrix"]["include"]
    options = {
        "python": ["3.11", "3.12", "3.13", "3.14"],
        "example": ["yes", "no"],
        "jobs": ["yes", "no"],
    }
    for one, other in itertools.combinations(options, 2):
        pairs = {(run[one], run[other]) for run in runs}
        assert pairs == set(itertools.product(options[one], options[other]))
    assert len(runs) == 8
