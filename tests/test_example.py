"""The example goes as one: by the hook, or later by the team, with the same result."""

import json
import subprocess
from pathlib import Path

from tests.conftest import SERVICE_BIN, Bake, tree


def remove(project: Path) -> None:
    subprocess.run(
        ["make", "--silent", "remove-example"], cwd=project, check=True, stdout=subprocess.DEVNULL
    )


def test_hook_and_make_target_give_identical_projects(bake: Bake) -> None:
    never, later = bake("never", include_example=False), bake("later")
    remove(later)
    assert tree(later) == tree(never)


def test_only_the_teams_own_project_is_touched(bake: Bake) -> None:
    project = bake()
    kept = {
        ".git/HEAD.txt": "x # example\n",
        ".venv/lib/a.py": "x = 1  # example\n",
        "notes.dat": "x # example\n",
        "docs/mine.md": "Mine.\n<!-- example: begin -->\nTheirs.\n<!-- example: end -->\nMine.\n",
    }
    for name, text in kept.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    remove(project)
    kept["docs/mine.md"] = "Mine.\nMine.\n"
    assert {name: (project / name).read_text() for name in kept} == kept


def test_migrations_of_the_team_that_followed_the_examples_come_first_from_then_on(
    bake: Bake,
) -> None:
    project = bake()
    versions = project / "migrations/versions"
    for name, before in (("0003_ours", "0002_patterns"), ("0004_ours", "0003_ours")):
        text = f'from alembic import op\n\nrevision = "{name}"\ndown_revision = "{before}"\n'
        (versions / f"{name}.py").write_text(text)
    remove(project)
    command = [str(SERVICE_BIN / "alembic"), "history"]
    history = subprocess.run(
        command, cwd=project, check=True, stdout=subprocess.PIPE
    ).stdout.decode()
    assert [line.split(",")[0] for line in history.splitlines()] == [
        "0003_ours -> 0004_ours (head)",
        "<base> -> 0003_ours",
    ]


def test_updates_of_the_template_leave_the_example_out_from_then_on(bake: Bake) -> None:
    project = bake()
    answers = {"context": {"cookiecutter": {"include_example": True, "project_slug": "my-service"}}}
    (project / ".cruft.json").write_text(json.dumps(answers, indent=2))
    remove(project)
    stored = json.loads((project / ".cruft.json").read_text())
    assert stored["context"]["cookiecutter"] == {
        "include_example": False,
        "project_slug": "my-service",
    }
