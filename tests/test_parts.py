"""The parts of the service: their tables are complete, and they can be removed in any order."""

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVICE_BIN, bake_to, tree
from tests.parts import (
    ALL_PARTS,
    COMBINATIONS,
    NAMES,
    SCRIPT,
    SERVICE,
    Parts,
    bake_parts,
    parts_id,
    remove,
    service_files,
    table,
)

TABLES = {name: table(name) for name in NAMES}
#: Words that only a part has.
WORDS = {
    "example": re.compile(r"payment", re.IGNORECASE),
    "jobs": re.compile(r"app[./]jobs|jobs_main|AMQP_URL|(?i:rabbitmq)|\bJOB_"),
    "conversations": re.compile(r"app[./]conversations|/conversations\b"),
}
#: One lock serves every answer. The table of jobs names the part along with it. The recipe of
#: `make tune` is a team's to edit. The guide to jobs shows code of their example.
HAS_WORDS = re.compile(
    r"requirements.*\.txt|scripts/parts/jobs\.py|scripts/tune/recipe\.py|docs/jobs\.md"
)


@pytest.fixture(scope="module")
def generated(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Parts], Path]:
    """Return a function that generates a project with these parts once. Tests copy it."""

    @functools.cache
    def generate(parts: Parts) -> Path:
        output = tmp_path_factory.mktemp("generated")
        return bake_parts(functools.partial(bake_to, template), parts, output)

    return generate


@pytest.fixture
def project(generated: Callable[[Parts], Path], tmp_path: Path) -> Path:
    """A project with all parts."""
    return shutil.copytree(generated(ALL_PARTS), tmp_path / "project")


def belongs(name: str) -> str | None:
    """Return the part whose name a file or a directory of it has: 0003_jobs.py, test_jobs.py."""
    for part in NAMES:
        if re.search(rf"(^|/)(\d+_|test_|run_)?{part}([-_.][^/]*)?(/|$)", name):
            return part
    return None


def listed_paths(name: str) -> set[str]:
    return set(TABLES[name]["PATHS"])


def marks(part: str) -> str:
    """Return the expression of a part's mark, which other parts may share."""
    return rf"(?:\w+ or )*{part}(?: or \w+)*"


def staying_files(part: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each file that does not go with a part."""
    own = {path for each in (part, *TABLES[part]["ALONG"]) for path in TABLES[each]["PATHS"]}
    for name in service_files():
        is_mechanism = name.startswith(("scripts/parts/", "scripts/remove_part.py"))
        if name not in own and not is_mechanism:
            yield name, (SERVICE / name).read_text()


def test_every_file_of_a_part_is_in_its_table() -> None:
    """A file that is missing there would stay in projects without the part."""
    missing = []
    for name in service_files():
        if name.startswith("scripts/parts/"):
            continue
        homes = [part for part in NAMES if name.startswith(directories(part))]
        owner = belongs(name) or (homes[0] if homes else None)
        if owner and not any(name in listed_paths(part) for part in NAMES):
            missing.append(f"add {name!r} to PATHS of scripts/parts/{owner}.py")
    assert missing == []


def directories(part: str) -> tuple[str, ...]:
    return tuple(f"{name}/" for name in TABLES[part]["DIRECTORIES"])


@pytest.mark.parametrize("part", NAMES)
def test_table_has_only_files_that_exist(part: str) -> None:
    paths = TABLES[part]["PATHS"]
    assert set(paths) - set(service_files()) == set()
    assert list(paths) == sorted(set(paths))
    for directory in directories(part):
        assert any(path.startswith(directory) for path in paths), directory
    assert set(TABLES[part]["ALONG"]) <= set(NAMES)


@pytest.mark.parametrize("part", NAMES)
def test_every_marked_line_of_a_part_is_in_its_table(part: str) -> None:
    """And no other line. The error shows the entries to write into LINES."""
    mark = re.compile(rf"# {marks(part)}$")
    marked: dict[str, list[str]] = {}
    for name, text in staying_files(part):
        if lines := [line for line in text.split("\n") if mark.search(line)]:
            marked[name] = lines
    listed = {name: list(lines) for name, lines in TABLES[part]["LINES"].items()}
    others = {name for name in marked.keys() | listed if marked.get(name) != listed.get(name)}
    entries = json.dumps({name: marked.get(name, []) for name in sorted(others)}, indent=4)
    assert not others, f"LINES of scripts/parts/{part}.py should have:\n{entries}"


@pytest.mark.parametrize("part", NAMES)
def test_every_file_with_blocks_of_a_part_is_in_its_table(part: str) -> None:
    owners = marks(part)
    block = re.compile(rf"^ *(?:#|<!--) {owners}: begin|<!-- {owners} --> \|$", re.MULTILINE)
    found = sorted(name for name, text in staying_files(part) if block.search(text))
    message = f"FILES_WITH_BLOCKS of scripts/parts/{part}.py should be {found}"
    assert list(TABLES[part]["FILES_WITH_BLOCKS"]) == found, message


@pytest.mark.parametrize("part", NAMES)
def test_table_has_every_table_of_its_migrations(part: str) -> None:
    """In the order of their creation."""
    migrations = [path for path in TABLES[part]["PATHS"] if path.startswith("migrations/")]
    texts = "".join((SERVICE / path).read_text() for path in sorted(migrations))
    assert list(TABLES[part]["TABLES"]) == re.findall(r"create table (\w+)", texts)


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_project_has_nothing_of_the_parts_that_it_lacks(
    generated: Callable[[Parts], Path], parts: Parts
) -> None:
    """No mark, no word, no file, and no setting or package; the lock stays."""
    project = generated(parts)
    gone = [name for name in NAMES if name not in parts]
    assert sorted(path.stem for path in project.glob("scripts/parts/*.py")) == sorted(parts)
    assert (project / "scripts/remove_part.py").exists() == bool(parts)
    assert (project / "scripts/parts").exists() == bool(parts)
    for name, content in tree(project).items():
        text = content.decode()
        for part in gone:
            mark = rf"# {part}$|<!-- {part} -->|\b{part}: (begin|end)"
            assert not re.search(mark, text, re.MULTILINE), (name, part)
            assert belongs(name) != part, name
            if not HAS_WORDS.match(name):
                found = WORDS[part].search(text)
                remedy = f"add it to PATHS of scripts/parts/{part}.py, or mark the lines"
                assert not found, f"{name} contains {found[0]!r}: {remedy}"


@pytest.mark.parametrize(
    "order",
    [
        ["example", "jobs"],
        ["jobs", "example"],
        ["conversations", "jobs", "example"],
        ["conversations", "example", "jobs"],
        ["example", "conversations", "jobs"],
        ["example", "example", "jobs", "jobs", "conversations"],
    ],
    ids=" ".join,
)
def test_parts_can_be_removed_in_any_order(
    generated: Callable[[Parts], Path], project: Path, order: list[str]
) -> None:
    """Each tree equals the one that is generated without these parts, byte by byte."""
    left = set(NAMES)
    for name in order:
        assert remove(project, name) == []
        left -= {name, *TABLES[name]["ALONG"]}
        (parts,) = [each for each in COMBINATIONS if set(each) == left]
        assert tree(project) == tree(generated(parts)), name
    assert left == set()


@pytest.mark.parametrize("name", ["example", "jobs", "conversations"])
def test_unchanged_project_can_lose_each_part(project: Path, name: str) -> None:
    """No import of the template's own stops it, in a list of several lines either."""
    done = run(project, name, FORCE="")
    assert done.returncode == 0, done.stderr
    assert "kept" not in done.stdout


#: A small project with two parts, a part along with one of them, and things that two share.
PLANTED = {
    "scripts/parts/north.py": """\
TITLE = "the north"
ALONG = ()
DIRECTORIES = ["north"]
PATHS = ["both.py", "migrations/versions/0001_north.py", "north/a.py", "north/b.py", "north/c.py"]
DEPENDENTS = ()
MOVED = ("north/b",)
TABLES = ["north"]
FILES_WITH_BLOCKS = ["README.md", "settings.py"]
LINES = {"main.py": ["import north  # north", "import both  # north or south"]}
""",
    "scripts/parts/south.py": """\
TITLE = "the south"
ALONG = ["pole"]
DIRECTORIES = ["south"]
PATHS = ["both.py", "migrations/versions/0002_south.py", "south/a.py"]
DEPENDENTS = ["north/c.py"]
MOVED = ()
TABLES = ["south", "penguins"]
FILES_WITH_BLOCKS = ["README.md", "settings.py"]
LINES = {"main.py": ["import south  # south", "import both  # north or south"]}
""",
    "scripts/parts/pole.py": """\
TITLE = "the pole"
ALONG = ()
DIRECTORIES = ["pole"]
PATHS = ["migrations/versions/0003_pole.py", "pole/a.py"]
DEPENDENTS = ()
MOVED = ()
TABLES = ["pole"]
FILES_WITH_BLOCKS = ["settings.py"]
LINES = {}
""",
    "both.py": "x = 1\n",
    "north/a.py": "x = 1\n",
    "north/b.py": "x = 1\n",
    "north/c.py": "import south.a\n",
    "south/a.py": "x = 1\n",
    "pole/a.py": "x = 1\n",
    "main.py": (
        "import both  # north or south\nimport main\nimport north  # north\nimport south  # south\n"
    ),
    "README.md": (
        "One.\n\n<!-- north: begin -->\nNorth.\n\n<!-- north: end -->\n\n"
        "<!-- north or south: begin -->\nBoth.\n<!-- north or south: end -->\n\n"
        "| a <!-- north or south --> |\n| b <!-- north --> |\n| c <!-- south --> |\n| d |\n"
    ),
    "settings.py": (
        "a = 1\n\n# south: begin\nb = 1\n\n# pole: begin\nc = 1\n# pole: end\n\nd = 1\n"
        "# south: end\n# north: begin\ne = 1\n\n# north: end\nf = 1\n"
    ),
    "migrations/versions/0001_north.py": 'revision = "0001_north"\ndown_revision = None\n',
    "migrations/versions/0002_south.py": 'revision = "0002_south"\ndown_revision = "0001_north"\n',
    "migrations/versions/0003_pole.py": 'revision = "0003_pole"\ndown_revision = "0002_south"\n',
    "migrations/versions/0004_ours.py": 'revision = "0004_ours"\ndown_revision = "0003_pole"\n',
    ".cruft.json": '{"include_north": true, "include_south": true}\n',
}
PLANTED_ORDERS = [("north", "south"), ("south", "north"), ("pole", "north", "south")]
#: It after the removal of its parts, without what does not change.
WITHOUT_BOTH = {
    "docs/patterns/north/b.py": "x = 1\n",
    "main.py": "import main\n",
    "README.md": "One.\n\n| d |\n",
    "settings.py": "a = 1\n\nf = 1\n",
    "migrations/versions/0004_ours.py": 'revision = "0004_ours"\ndown_revision = None\n',
    ".cruft.json": '{"include_north": false, "include_south": false}\n',
}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A small project with parts."""
    project = tmp_path / "planted"
    for name, text in PLANTED.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    shutil.copy(SCRIPT, project / "scripts/remove_part.py")
    return project


def texts(project: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in tree(project).items()}


def test_shared_things_go_with_the_last_of_their_parts(planted: Path) -> None:
    """A path, line, block or row of two parts."""
    assert remove(planted, "north") == []
    found = texts(planted)
    assert found["main.py"] == "import both  # north or south\nimport main\nimport south  # south\n"
    assert found["README.md"] == (
        "One.\n\n<!-- north or south: begin -->\nBoth.\n<!-- north or south: end -->\n\n"
        "| a <!-- north or south --> |\n| c <!-- south --> |\n| d |\n"
    )
    assert "both.py" in found
    assert found["docs/patterns/north/b.py"] == "x = 1\n"
    assert "down_revision = None" in found["migrations/versions/0002_south.py"]
    assert remove(planted, "south") == []
    assert texts(planted) == WITHOUT_BOTH | {"scripts/": ""}


@pytest.mark.parametrize("first", ["north", "south"])
def test_file_that_needs_two_parts_goes_with_the_first(planted: Path, first: str) -> None:
    """The lab of prefetch needs the example, which has the labs, and jobs."""
    assert (planted / "north/c.py").exists()
    assert remove(planted, first) == []
    assert not (planted / "north/c.py").exists()


@pytest.mark.parametrize("part", NAMES)
def test_dependents_are_files_of_other_parts(part: str) -> None:
    others = {path for name in NAMES if name != part for path in TABLES[name]["PATHS"]}
    assert set(TABLES[part]["DEPENDENTS"]) <= others - listed_paths(part)


@pytest.mark.parametrize(
    "order", [("north", "south"), ("south", "north"), ("pole", "south", "north")]
)
def test_small_project_is_the_same_after_each_order(planted: Path, order: Parts) -> None:
    for name in order:
        assert remove(planted, name) == []
    assert texts(planted) == WITHOUT_BOTH | {"scripts/": ""}


class InterruptionError(Exception):
    """Stands for a full disk, a missing permission or a killed process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Let the change number `step` of a file fail. Returns the list of changes, which grows."""
    changes: list[str] = []
    for name in ("unlink", "write_bytes", "replace", "rmdir"):
        original = getattr(Path, name)

        def change(path: Path, *arguments: Any, call: Any = original, **options: Any) -> Any:
            changes.append(str(path))
            if len(changes) == step:
                raise InterruptionError
            return call(path, *arguments, **options)

        monkeypatch.setattr(Path, name, change)
    return changes


@pytest.mark.parametrize(
    "order", [("north", "south"), ("south", "north"), ("pole", "north", "south")]
)
def test_removal_that_is_interrupted_anywhere_can_be_repeated(
    planted: Path, tmp_path: Path, order: Parts
) -> None:
    """At each change of a file: the project's own script completes the removal."""
    step = 1
    while True:
        project = shutil.copytree(planted, tmp_path / f"{step}")
        script = project / "scripts/remove_part.py"
        with pytest.MonkeyPatch.context() as monkeypatch:
            changes = interrupt(monkeypatch, step)
            for name in order:
                try:
                    remove(project, name, script)
                except InterruptionError:
                    assert script.exists()
                    remove(project, name, script)
        assert texts(project) == WITHOUT_BOTH | {"scripts/": ""}, changes[step - 1]
        if len(changes) < step:
            break
        step += 1
    assert step > 25


def history(project: Path) -> list[str]:
    """Return the migrations as alembic sees them, newest first."""
    command = [str(SERVICE_BIN / "alembic"), "history"]
    done = subprocess.run(command, cwd=project, check=True, stdout=subprocess.PIPE)
    return [line.split(",")[0] for line in done.stdout.decode().splitlines()]


@pytest.mark.parametrize("parts", COMBINATIONS, ids=parts_id)
def test_migrations_are_one_chain(project: Path, parts: Parts) -> None:
    """Without those of the parts that are gone; the team's own one follows the last that stays."""
    write_migration(project, "0009_ours", f'"{newest(project)}"')
    for name in NAMES:
        if name not in parts:
            remove(project, name)
    lines = history(project)
    revisions = [line.split(" -> ")[-1].removesuffix(" (head)") for line in lines]
    expected = [Path(path).stem for part in parts for path in TABLES[part]["PATHS"]]
    expected = [revision for revision in sorted(expected) if re.match(r"\d{4}", revision)]
    assert revisions == ["0009_ours", *reversed(expected)]
    assert lines[-1].startswith("<base> -> ")
    assert sum(line.endswith("(head)") for line in lines) == 1


def newest(project: Path) -> str:
    return max(path.stem for path in (project / "migrations/versions").glob("0*.py"))


def write_migration(project: Path, revision: str, follows: str) -> None:
    text = f'revision = "{revision}"\ndown_revision = {follows}\n'
    (project / f"migrations/versions/{revision}.py").write_text(text)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("south", '"0003_pole"', '"0001_north"'),
        ("south", "'0002_south'", "'0001_north'"),
        ("south", '("0003_pole", "0004_ours")', '("0001_north", "0004_ours")'),
        ("south", '(\n    "0003_pole",\n    "0001_north",\n)', '"0001_north"'),
        ("south", '["0004_ours", "0001_north"]', '["0004_ours", "0001_north"]'),
        ("south", '"0003_pole"  # the newest', '"0001_north"  # the newest'),
        ("pole", '"0003_pole"', '"0002_south"'),
        ("north", '"0001_north"', "None"),
        ("north", '("0001_north", "0004_ours")', '"0004_ours"'),
        ("north", "None", "None"),
        ("north", 'fetch("0001_north")', 'fetch("0001_north")'),
    ],
)
def test_own_migration_follows_the_nearest_that_stays(
    planted: Path, name: str, before: str, after: str
) -> None:
    """Also one that merges two heads, as `alembic merge` writes it."""
    write_migration(planted, "0005_ours", before)
    remove(planted, name)
    text = (planted / "migrations/versions/0005_ours.py").read_text()
    assert text == f'revision = "0005_ours"\ndown_revision = {after}\n'


def run(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script of a project with the system's Python, as make does."""
    command = ["python3", "-B", "scripts/remove_part.py", *arguments]
    environment = {"PATH": "/usr/bin:/bin:/usr/local/bin", "FORCE": "1"} | variables
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [(), ("east",), ("north", "south"), ("../north",)])
def test_unknown_part_is_one_line_and_changes_nothing(planted: Path, arguments: Parts) -> None:
    before = tree(planted)
    done = run(planted, *arguments)
    assert done.returncode == 2
    expected = f"part={' '.join(arguments)}: must be one of north, pole, south\n"
    assert done.stderr == f"scripts/remove_part.py: {expected}"
    assert tree(planted) == before


def test_import_of_a_part_along_with_another_stops_the_removal(planted: Path) -> None:
    (planted / "ours.py").write_text("from pole import a\n")
    done = run(planted, "south", FORCE="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "ours.py:1 imports pole.a; remove the import"
    assert (planted / "pole/a.py").exists()
    (planted / "ours.py").write_text("from both import x\nfrom north import a\n")
    assert run(planted, "south", FORCE="").returncode == 0


def statements(output: str) -> str:
    return output.partition("<<'SQL'\n")[2].partition("SQL\n")[0]


def test_statements_go_back_to_the_migration_that_stays(planted: Path) -> None:
    assert statements(run(planted, "south").stdout) == (
        "drop table if exists pole, south, penguins;\n"
        "update alembic_version set version_num = '0001_north'\n"
        "where version_num in ('0003_pole', '0002_south')"
        " and (select count(*) from alembic_version) = 1;\n"
        "delete from alembic_version\nwhere version_num in ('0003_pole', '0002_south');\n"
    )
    assert statements(run(planted, "north").stdout) == (
        "drop table if exists north;\n"
        "delete from alembic_version\nwhere version_num in ('0001_north');\n"
    )
