"""`cruft update` brings in the template's changes and keeps the team's edits."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import NAME, ROOT, SERVICE_BIN, SOURCE, missing, tree

IDENTITY = {
    "GIT_AUTHOR_NAME": "a team",
    "GIT_AUTHOR_EMAIL": "team@example.org",
    "GIT_COMMITTER_NAME": "a team",
    "GIT_COMMITTER_EMAIL": "team@example.org",
}
#: The last revision in which all modules of the application lay in one directory.
FLAT_LAYOUT = "10b8938"


class Edit(NamedTuple):
    """A team's change of one file of its project: `before` becomes `after`."""

    path: str
    before: str
    after: str


#: Edits of the flat layout that git merges with the layout of today. Git merges an edit if at least
#: one unchanged line separates it from the nearest change of the template. Other edits conflict,
#: such as an import next to that of a module that has moved; the update then shows both versions.
EDITS = [
    Edit(
        "app/main.py",
        "    return app\n\n\n",
        '    app.state.team = "refunds"\n    return app\n\n\n',
    ),
    Edit(
        "app/settings.py",
        "    postgres_max_connections: PositiveInt = 200\n",
        "    postgres_max_connections: PositiveInt = 300\n",
    ),
    Edit(
        "app/settings.py",
        "    request_timeout_seconds: Positive = 30\n",
        "    request_timeout_seconds: Positive = 20\n",
    ),
    Edit(
        "app/settings.py",
        "    max_requests_jitter: NonNegativeInt = 2_000\n",
        "    max_requests_jitter: NonNegativeInt = 2_000\n    refund_days: PositiveInt = 30\n",
    ),
]
#: Edits of a project that kept the example. The router is imported after that of the example.
EXAMPLE_EDITS = [
    Edit(
        "app/main.py",
        "from app.settings import Settings, load_settings\n",
        "from app.refunds.router import router as refunds_router\n"
        "from app.settings import Settings, load_settings\n",
    ),
    Edit(
        "app/main.py",
        "    app.include_router(payments_router)  # example\n",
        "    app.include_router(payments_router)  # example\n"
        "    app.include_router(refunds_router)\n",
    ),
    Edit(
        "app/payments/router.py",
        '"""The routes of payments."""',
        '"""The routes of payments and of their receipts."""',
    ),
    Edit(
        "app/payments/router.py",
        '    raise NotFoundError("There is no such payment.")\n',
        '    raise NotFoundError("There is no such payment.")\n\n\n'
        '@router.get("/{payment_id}/receipt")\n'
        "async def get_receipt(payment_id: UUID) -> Response:\n"
        '    """Return the receipt of a payment."""\n'
        '    raise NotFoundError("There is no such receipt.")\n',
    ),
]
#: A feature of the team, which the template does not have.
REFUNDS_ROUTER = '''"""The routes of refunds."""

from fastapi import APIRouter

router = APIRouter(prefix="/refunds")
'''


def run_git(directory: Path, *command: str) -> bytes:
    """Run git with an identity of its own and return its output."""
    return subprocess.run(
        ["git", "-c", "init.defaultBranch=main", *command],
        cwd=directory,
        check=True,
        env=os.environ | IDENTITY,
        stdout=subprocess.PIPE,
    ).stdout


def commit(directory: Path, message: str) -> None:
    """Commit every file of a directory."""
    run_git(directory, "add", "--all")
    run_git(directory, "commit", "--quiet", "--message", message)


def make_repository(directory: Path) -> None:
    """Make a git repository of a directory, with its files as the first commit."""
    run_git(directory, "init", "--quiet")
    commit(directory, "first")


def run_cruft(directory: Path, *command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run cruft. The caller checks its exit status."""
    return subprocess.run(
        [sys.executable, "-m", "cruft", *command],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | IDENTITY | {"HOME": str(home)},
    )


def create_project(repository: Path, output: Path, **answers: object) -> Path:
    """Create a project with cruft, commit it, and return its directory."""
    context = json.dumps(NAME | answers)
    options = ["--no-input", "--output-dir", str(output), "--extra-context", context]
    created = run_cruft(output, "create", str(repository), *options, home=output)
    assert created.returncode == 0, created.stderr
    project = output / "my-service"
    make_repository(project)
    return project


def update(project: Path) -> None:
    """Update a project to the newest commit of its template."""
    updated = run_cruft(project, "update", "--skip-apply-ask", home=project.parent)
    assert updated.returncode == 0, updated.stdout + updated.stderr


def is_up_to_date(project: Path) -> bool:
    """Return whether cruft knows no newer commit of the template."""
    return run_cruft(project, "check", home=project.parent).returncode == 0


def assert_no_difference(project: Path) -> None:
    """Fail if the project differs from the commit of the template that it follows."""
    difference = run_cruft(project, "diff", "--exit-code", home=project.parent)
    assert difference.returncode == 0, difference.stdout


def replace(path: Path, before: str, after: str) -> None:
    """Replace a text that occurs exactly once in a file."""
    text = path.read_text()
    assert text.count(before) == 1, f"{path}: expected once, found {text.count(before)}: {before!r}"
    path.write_text(text.replace(before, after))


def remove_part(project: Path, name: str) -> None:
    """Remove a part and commit the result."""
    command = ["make", "--silent", f"remove-{name}"]
    subprocess.run(command, cwd=project, check=True, stdout=subprocess.DEVNULL)
    commit(project, f"without {name}")


def remove_example(project: Path) -> None:
    """Remove the example and commit the result."""
    remove_part(project, "example")


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    """A git repository of the template that tests may change."""
    copy = tmp_path / "template"
    shutil.copytree(template, copy)
    make_repository(copy)
    return copy


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Path:
    """A team's project, created with cruft and committed."""
    return create_project(repository, tmp_path)


def past_revisions() -> list[str]:
    """Return the revisions from which services are updated: the flat layout, and each release."""
    tags = run_git(ROOT, "tag", "--list", "v*").decode().split()
    return [FLAT_LAYOUT, *tags]


@pytest.fixture(params=past_revisions())
def past_repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A git repository of the template as it was."""
    revision = request.param
    archive = subprocess.run(
        ["git", "archive", "--format=tar", revision], cwd=ROOT, check=False, capture_output=True
    )
    if archive.returncode:
        pytest.skip(f"revision {revision} is not in this clone: it lacks the history")
    directory = tmp_path / "template"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(directory, filter="data")
    make_repository(directory)
    return directory


def change_template(repository: Path) -> None:
    """Change files that every project has, and a file of the example."""
    source = repository / SOURCE
    replace(source / "app/web/health.py", "CACHE_SECONDS = 1.0", "CACHE_SECONDS = 1.5")
    replace(
        source / "app/payments/router.py", '"""The routes of payments."""', '"""Payment routes."""'
    )
    (source / "app/added.py").write_text('"""New."""\n')
    replace(source / ".gitignore", ".env\n", ".env\n*.log\n")
    commit(repository, "second")


def replace_template(repository: Path, template: Path) -> None:
    """Commit the present template over an older one."""
    for path in repository.iterdir():
        if path.name == ".git":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(template, repository, dirs_exist_ok=True)
    commit(repository, "second")


def edits_for(project: Path, edits: list[Edit]) -> list[Edit]:
    """Return the edits whose text the project has: a release may have changed a default."""
    found = [edit for edit in edits if (project / edit.path).read_text().count(edit.before) == 1]
    assert len(found) > len(edits) / 2, "too few edits apply to this revision; add others"
    return found


def apply_edits(project: Path, edits: list[Edit]) -> None:
    """Commit a team's edits, and the feature that they import."""
    feature = project / "app/refunds"
    feature.mkdir()
    (feature / "__init__.py").touch()
    (feature / "router.py").write_text(REFUNDS_ROUTER)
    for edit in edits:
        replace(project / edit.path, edit.before, edit.after)
    commit(project, "the team's work")


def assert_edits_are_kept(project: Path, edits: list[Edit]) -> None:
    """Fail if an edited file lost an edit, or needs a person to merge it."""
    for path in {edit.path for edit in edits}:
        text = (project / path).read_text()
        assert "<<<<<<<" not in text, text
        assert not (project / f"{path}.rej").exists()
    for edit in edits:
        assert edit.after in (project / edit.path).read_text(), edit


def assert_application_imports(project: Path) -> None:
    """Import the application with the interpreter of the service's environment."""
    python = SERVICE_BIN / "python"
    if not python.exists():
        missing(f"{python}, which `make test` makes,")
    imported = subprocess.run(
        [python, "-B", "-c", "import app.main"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert imported.returncode == 0, imported.stderr


def test_update_brings_in_changes_and_keeps_edits(repository: Path, project: Path) -> None:
    assert is_up_to_date(project)
    assert_no_difference(project)
    replace(project / "app/web/health.py", "WATCH_SECONDS = 5.0", "WATCH_SECONDS = 7.0")
    (project / "app/mine.py").write_text('"""Ours."""\n')
    commit(project, "the team's work")
    change_template(repository)
    assert not is_up_to_date(project)
    update(project)
    health = (project / "app/web/health.py").read_text()
    assert "CACHE_SECONDS = 1.5" in health
    assert "WATCH_SECONDS = 7.0" in health
    assert (project / "app/added.py").exists()
    assert (project / "app/mine.py").exists()
    assert '"""Payment routes."""' in (project / "app/payments/router.py").read_text()
    assert 'service_name: ServiceName = "my-service"' in (project / "app/settings.py").read_text()
    assert not list(project.rglob("*.rej"))
    assert is_up_to_date(project)


def test_update_does_not_bring_back_a_removed_example(repository: Path, project: Path) -> None:
    remove_example(project)
    answers = json.loads((project / ".cruft.json").read_text())
    assert answers["context"]["cookiecutter"]["include_example"] is False
    assert_no_difference(project)
    change_template(repository)
    update(project)
    assert "CACHE_SECONDS = 1.5" in (project / "app/web/health.py").read_text()
    assert not (project / "app/payments").exists()
    assert "payments" not in (project / "app/main.py").read_text()
    assert not list(project.rglob("*.rej"))
    assert is_up_to_date(project)


def add_migration(project: Path, revision: str, follows: str) -> None:
    """Write a migration of the team."""
    text = f'revision = "{revision}"\ndown_revision = "{follows}"\n'
    (project / f"migrations/versions/{revision}.py").write_text(text)


def heads(project: Path) -> list[str]:
    """Return the newest migrations."""
    alembic = SERVICE_BIN / "alembic"
    if not alembic.exists():
        missing(f"{alembic}, which `make test` makes,")
    done = subprocess.run([alembic, "heads"], cwd=project, check=True, stdout=subprocess.PIPE)
    return sorted(line.split()[0] for line in done.stdout.decode().splitlines())


def follow_guide(project: Path, newest: str) -> None:
    """Make the edit that docs/updating.md shows."""
    guide = (ROOT / "docs/updating.md").read_text()
    match = re.search(r"--- (\S+)\n *-(.*)\n *\+(.*)\n", guide)
    assert match
    replace(project / match[1], match[2], match[3].replace("YOUR_NEWEST_MIGRATION", newest))


def test_update_adds_jobs_to_a_project_with_migrations(project: Path) -> None:
    """Two heads, until 0003_jobs follows the team's migration as docs/updating.md says."""
    (newest,) = heads(project)
    add_migration(project, "0003_ours", newest)
    commit(project, "the team's table")
    before = (project / "migrations/versions/0003_ours.py").read_text()
    options = ["--skip-apply-ask", "--variables-to-update", '{"include_jobs": true}']
    updated = run_cruft(project, "update", *options, home=project.parent)
    assert updated.returncode == 0, updated.stdout + updated.stderr
    assert not list(project.rglob("*.rej"))
    assert heads(project) == ["0003_ours", "0004_conversations"]
    follow_guide(project, "0003_ours")
    assert heads(project) == ["0004_conversations"]
    assert (project / "migrations/versions/0003_ours.py").read_text() == before
    assert_application_imports(project)
    assert is_up_to_date(project)
    add_migration(project, "0005_ours", "0004_conversations")
    commit(project, "with jobs")
    remove_part(project, "jobs")
    assert heads(project) == ["0005_ours"]
    follower = (project / "migrations/versions/0005_ours.py").read_text()
    assert follower.endswith('down_revision = "0003_ours"\n')
    assert_no_difference(project)


@pytest.mark.parametrize("part", ["jobs", "conversations"])
def test_update_does_not_bring_back_removed_jobs(
    repository: Path, tmp_path: Path, part: str
) -> None:
    project = create_project(repository, tmp_path, include_jobs=True)
    assert_no_difference(project)
    remove_part(project, part)
    before = set(tree(project))
    change_template(repository)
    module = repository / SOURCE / "app/conversations/__init__.py"
    module.write_text('"""Changed."""\n')
    commit(repository, "third")
    update(project)
    added = {name for name in set(tree(project)) - before if not name.startswith(".git/")}
    assert added == {"app/added.py"}
    assert not (project / "app/conversations").exists()
    assert (project / "app/jobs").exists() == (part == "conversations")
    assert not list(project.rglob("*.rej"))
    assert is_up_to_date(project)


def test_update_keeps_renewed_lock_files(repository: Path, project: Path) -> None:
    (project / "requirements.txt").write_text("theirs\n")
    commit(project, "locks of the team's own")
    (repository / SOURCE / "requirements.txt").write_text("ours\n")
    change_template(repository)
    update(project)
    assert (project / "requirements.txt").read_text() == "theirs\n"


def test_update_from_each_release_keeps_edits(
    past_repository: Path, template: Path, tmp_path: Path
) -> None:
    project = create_project(past_repository, tmp_path)
    edits = edits_for(project, EDITS + EXAMPLE_EDITS)
    apply_edits(project, edits)
    replace_template(past_repository, template)
    update(project)
    assert_edits_are_kept(project, edits)
    assert not list(project.rglob("*.rej"))
    assert_application_imports(project)
    assert is_up_to_date(project)


def test_update_from_each_release_keeps_edits_without_the_example(
    past_repository: Path, template: Path, tmp_path: Path
) -> None:
    project = create_project(past_repository, tmp_path)
    remove_example(project)
    edits = edits_for(project, EDITS)
    apply_edits(project, edits)
    replace_template(past_repository, template)
    update(project)
    assert_edits_are_kept(project, edits)
    assert not list(project.rglob("*.rej"))
    assert not (project / "app/payments").exists()
    assert_application_imports(project)
    assert is_up_to_date(project)
