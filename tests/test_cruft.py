"""A generated project follows the template: what changed comes in, what the team edited stays."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SOURCE

IDENTITY = {
    name: value
    for who in ("AUTHOR", "COMMITTER")
    for name, value in ((f"GIT_{who}_NAME", "a team"), (f"GIT_{who}_EMAIL", "team@example.org"))
}


def git(folder: Path, *command: str) -> str:
    environment = os.environ | IDENTITY
    run = ["git", "-c", "init.defaultBranch=main", *command]
    return subprocess.run(
        run, cwd=folder, check=True, env=environment, stdout=subprocess.PIPE
    ).stdout.decode()


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def cruft(folder: Path, *command: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | IDENTITY | {"HOME": str(home)}
    run = [sys.executable, "-m", "cruft", *command]
    return subprocess.run(
        run, cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    """The template as a git repository that may change."""
    copy = tmp_path / "template"
    shutil.copytree(template, copy)
    git(copy, "init", "--quiet")
    commit(copy, "first")
    return copy


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Path:
    """A team's project, made with cruft and committed."""
    made = cruft(
        tmp_path,
        "create",
        str(repository),
        "--no-input",
        "--output-dir",
        str(tmp_path),
        home=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "my-service"
    git(folder, "init", "--quiet")
    commit(folder, "made from the template")
    return folder


def change_template(repository: Path) -> None:
    """Change what every project has, and the example."""
    edit(repository / SOURCE / "app/health.py", "CACHE_SECONDS = 1.0", "CACHE_SECONDS = 1.5")
    edit(
        repository / SOURCE / "app/payments/router.py",
        '"""Look a payment up."""',
        '"""Find a payment."""',
    )
    (repository / SOURCE / "app/added.py").write_text('"""New."""\n')
    edit(repository / SOURCE / ".gitignore", ".env\n", ".env\n*.log\n")
    commit(repository, "second")


def check(project: Path, home: Path) -> bool:
    return cruft(project, "check", home=home).returncode == 0


def test_an_update_brings_changes_in_and_keeps_edits(
    repository: Path, project: Path, tmp_path: Path
) -> None:
    assert check(project, tmp_path)
    assert cruft(project, "diff", "--exit-code", home=tmp_path).returncode == 0
    edit(project / "app/health.py", "WATCH_SECONDS = 5.0", "WATCH_SECONDS = 7.0")
    (project / "app/mine.py").write_text('"""Ours."""\n')
    commit(project, "the team's work")
    change_template(repository)
    assert not check(project, tmp_path)
    updated = cruft(project, "update", "--skip-apply-ask", home=tmp_path)
    assert updated.returncode == 0, updated.stdout + updated.stderr
    health = (project / "app/health.py").read_text()
    assert "CACHE_SECONDS = 1.5" in health
    assert "WATCH_SECONDS = 7.0" in health
    assert (project / "app/added.py").exists()
    assert (project / "app/mine.py").exists()
    assert "Find a payment." in (project / "app/payments/router.py").read_text()
    assert 'service_name: ServiceName = "my-service"' in (project / "app/settings.py").read_text()
    assert not list(project.rglob("*.rej"))
    assert check(project, tmp_path)


def test_an_update_after_the_example_was_removed_leaves_it_out(
    repository: Path, project: Path, tmp_path: Path
) -> None:
    subprocess.run(
        ["make", "--silent", "remove-example"], cwd=project, check=True, stdout=subprocess.DEVNULL
    )
    assert (
        json.loads((project / ".cruft.json").read_text())["context"]["cookiecutter"][
            "include_example"
        ]
        is False
    )
    commit(project, "without the example")
    assert cruft(project, "diff", "--exit-code", home=tmp_path).returncode == 0
    change_template(repository)
    updated = cruft(project, "update", "--skip-apply-ask", home=tmp_path)
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert "CACHE_SECONDS = 1.5" in (project / "app/health.py").read_text()
    assert not (project / "app/payments").exists()
    assert "payments" not in (project / "app/main.py").read_text()
    assert not list(project.rglob("*.rej"))
    assert check(project, tmp_path)


def test_locks_that_a_team_renewed_are_left_alone(
    repository: Path, project: Path, tmp_path: Path
) -> None:
    (project / "requirements.txt").write_text("theirs\n")
    commit(project, "locks of the team's own")
    (repository / SOURCE / "requirements.txt").write_text("ours\n")
    change_template(repository)
    assert cruft(project, "update", "--skip-apply-ask", home=tmp_path).returncode == 0
    assert (project / "requirements.txt").read_text() == "theirs\n"
