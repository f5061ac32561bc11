"""The hook and `make remove-example` remove the whole example."""

import json
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, Bake, tree

SCRIPT = ROOT / SOURCE / "scripts/remove_part.py"


def remove(project: Path) -> list[str]:
    """Remove the example as a team does later; return the names that are reported as kept."""
    command = ["make", "--silent", "remove-example"]
    done = subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE)
    kept = "kept, since the template did not write it: "
    lines = done.stdout.decode().splitlines()
    return [line.removeprefix(kept) for line in lines if line.startswith(kept)]


def test_hook_and_make_target_give_identical_projects(bake: Bake) -> None:
    never = bake("never", include_example=False)
    later = bake("later")
    assert remove(later) == []
    assert tree(later) == tree(never)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".git/HEAD.txt", "x # example\n"),
        (".venv/lib/a.py", "x = 1  # example\n"),
        ("notes.dat", "x # example\n"),
        ("app/orders/router.py", 'URL = "https://shop.example"  # example\n'),
        ("docs/mine.md", "Mine.\n<!-- example: begin -->\nMine.\n<!-- example: end -->\nMine.\n"),
        ("docs/table.md", "| mine <!-- example --> |\n"),
        ("data/import.yaml", "# example: begin\nmine: 1\n# example: end\n"),
        ("data/export", "a line without suffix # example\n"),
        ("web/main.ts", "// for example: begin\nmine();\n// example: end\n"),
        ("web/tool.rb", "puts 1 # example\n"),
        ("migrations/versions/0003_ours.py", "x = 1  # example\n"),
    ],
)
def test_removal_changes_no_file_of_the_team(bake: Bake, name: str, text: str) -> None:
    project = bake()
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text(text)
    remove(project)
    assert (project / name).read_text() == text


def test_removal_keeps_files_of_the_team_next_to_those_of_the_example(bake: Bake) -> None:
    project = bake()
    names = ["app/patterns/saga.py", "app/payments/refunds.py", "tests/payments/test_refunds.py"]
    for name in names:
        (project / name).write_text("x = 1\n")
    (project / "app/payments/__pycache__").mkdir()
    assert remove(project) == names
    assert [name for name in names if not (project / name).exists()] == []
    assert sorted(path.name for path in (project / "app/payments").iterdir()) == ["refunds.py"]


def test_removal_keeps_lines_of_the_team_that_look_like_marked_ones(bake: Bake) -> None:
    """In files of the template, an ordinary comment or an edited line is the team's."""
    project = bake()
    own = '    shop_url: HttpUrl = "https://shop.example"  # example\n'
    block = "    # for example: begin with the oldest\n    batch: int = 10\n    # example: end\n"
    settings = project / "app/settings.py"
    before = "    worker_memory_mb:"
    settings.write_text(settings.read_text().replace(before, own + block + before))
    metadata = project / "pyproject.toml"
    edited = '"(payments) | orders", # example'
    metadata.write_text(metadata.read_text().replace('"(payments)", # example', edited))
    kept = remove(project)
    assert own + block + before in settings.read_text()
    assert edited in metadata.read_text()
    assert [name.partition(":")[0] for name in kept] == ["app/settings.py", "pyproject.toml"]


def test_removal_changes_nothing_behind_a_link(bake: Bake, tmp_path: Path) -> None:
    project = bake()
    shared = tmp_path / "shared"
    (project / "app/patterns").rename(shared)
    (project / "app/patterns").symlink_to(shared)
    compose = tmp_path / "compose.yaml"
    (project / "compose.yaml").rename(compose)
    (project / "compose.yaml").symlink_to(compose)
    before = compose.read_text()
    remove(project)
    assert (shared / "outbox.py").exists()
    assert compose.read_text() == before


def test_interrupted_removal_can_be_repeated(bake: Bake) -> None:
    """A file that cannot be written stops the removal before a file is deleted."""
    never = bake("never", include_example=False)
    project = bake("later")
    script = project / "scripts/remove_part.py"
    broken = script.read_text().replace("path.write", "(path / 'x').write")
    for text in (broken, script.read_text()):
        script.write_text(text)
        command = ["make", "--silent", "remove-example"]
        done = subprocess.run(command, cwd=project, check=False, stderr=subprocess.DEVNULL)
    assert done.returncode == 0
    assert tree(project) == tree(never)


@pytest.mark.parametrize("include_example", [True, False])
def test_second_removal_changes_nothing(bake: Bake, include_example: bool) -> None:
    project = bake(include_example=include_example)
    if include_example:
        remove(project)
    before = tree(project)
    remove_again: Callable[[Path, str], list[str]] = runpy.run_path(str(SCRIPT))["remove"]
    assert remove_again(project, "example") == []
    assert tree(project) == before


@pytest.mark.parametrize(
    "assignment",
    [
        'down_revision = "0002b_outbox_traceparent"',
        "down_revision: Union[str, None] = '0002b_outbox_traceparent'",
    ],
)
def test_removal_makes_own_migrations_the_first_ones(bake: Bake, assignment: str) -> None:
    """Migrations of the team that followed the example's are re-parented.

    Alembic's own template writes the line in the second form.
    """
    project = bake()
    versions = project / "migrations/versions"
    for name, line in (("0003_ours", assignment), ("0004_ours", 'down_revision = "0003_ours"')):
        text = f'from typing import Union\n\nrevision = "{name}"\n{line}\n'
        (versions / f"{name}.py").write_text(text)
    remove(project)
    command = [str(SERVICE_BIN / "alembic"), "history"]
    done = subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE)
    history = done.stdout.decode()
    assert [line.split(",")[0] for line in history.splitlines()] == [
        "0003_ours -> 0004_ours (head)",
        "<base> -> 0003_ours",
    ]


@pytest.mark.parametrize("answer", [True, "True", "yes"])
def test_template_updates_omit_the_removed_example(bake: Bake, answer: object) -> None:
    """The stored answers change too: cruft generates later updates from them.

    An older cookiecutter stores a text.
    """
    project = bake()
    answers = {
        "context": {"cookiecutter": {"include_example": answer, "project_slug": "my-service"}}
    }
    (project / ".cruft.json").write_text(json.dumps(answers, indent=2))
    remove(project)
    stored = json.loads((project / ".cruft.json").read_text())
    assert stored["context"]["cookiecutter"] == {
        "include_example": False,
        "project_slug": "my-service",
    }
