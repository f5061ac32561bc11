"""The hook and `make remove-example` remove the whole example."""

import json
import subprocess
from pathlib import Path

from tests.conftest import SERVICE_BIN, Bake, tree


def remove(project: Path) -> None:
    """Remove the example as a team does later."""
    command = ["make", "--silent", "remove-example"]
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)


def test_hook_and_make_target_give_identical_projects(bake: Bake) -> None:
    never = bake("never", include_example=False)
    later = bake("later")
    remove(later)
    assert tree(later) == tree(never)


def test_removal_changes_only_files_of_the_project(bake: Bake) -> None:
    """Environments and unknown files stay; marked blocks in documents go."""
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


def test_removal_makes_own_migrations_the_first_ones(bake: Bake) -> None:
    """Migrations of the team that followed the example's are re-parented."""
    project = bake()
    versions = project / "migrations/versions"
    for name, before in (("0003_ours", "0002_patterns"), ("0004_ours", "0003_ours")):
        text = f'from alembic import op\n\nrevision = "{name}"\ndown_revision = "{before}"\n'
        (versions / f"{name}.py").write_text(text)
    remove(project)
    command = [str(SERVICE_BIN / "alembic"), "history"]
    done = subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE)
    history = done.stdout.decode()
    assert [line.split(",")[0] for line in history.splitlines()] == [
        "0003_ours -> 0004_ours (head)",
        "<base> -> 0003_ours",
    ]


def test_template_updates_omit_the_removed_example(bake: Bake) -> None:
    """The stored answers change too: cruft generates later updates from them."""
    project = bake()
    answers = {"context": {"cookiecutter": {"include_example": True, "project_slug": "my-service"}}}
    (project / ".cruft.json").write_text(json.dumps(answers, indent=2))
    remove(project)
    stored = json.loads((project / ".cruft.json").read_text())
    assert stored["context"]["cookiecutter"] == {
        "include_example": False,
        "project_slug": "my-service",
    }
