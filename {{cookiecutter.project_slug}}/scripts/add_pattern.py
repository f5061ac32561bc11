"""Copy a pattern into `app/patterns`: its modules, tests, table, packages and import contract.

`make pattern` lists the patterns, `make pattern P=outbox` copies one. The sources are in this
project, so a copy needs no network unless a package has left the requirements.
"""

import ast
import contextlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from scripts.add_package import insert, normalize
from scripts.project_files import (
    MAKE,
    PROJECT,
    ProjectError,
    new_migration,
    read,
    restored,
    written,
)

#: The sources, each in the directory that it is copied to.
SOURCE = "docs/patterns"
TABLES = ("migrations/versions/0002_patterns.py", "migrations/versions/0002b_outbox_traceparent.py")
#: The requirements that lock a group of dependencies.
LOCKS = {"project": "requirements.txt", "dev": "requirements-dev.txt"}
MIGRATION = '''"""Create the table {table}."""

from alembic import op

revision = "{revision}"
down_revision = {follows}


def upgrade() -> None:
    """Create the table."""
    {statements}


def downgrade() -> None:
    """Drop the table."""
    op.execute("drop table {table}")
'''
SHARED = ("app/patterns/__init__.py", "tests/patterns/__init__.py", "tests/patterns/conftest.py")


class Pattern(NamedTuple):
    """A pattern: the module of its name, and all that belongs to it."""

    summary: str
    #: The patterns that it is copied with.
    along: tuple[str, ...] = ()
    #: The modules of app/patterns that no other pattern has.
    parts: tuple[str, ...] = ()
    #: The name of its test, if it is not that of the pattern.
    test: str = ""
    table: str = ""
    #: The requirements, each with its group of dependencies.
    packages: Mapping[str, str] = {}
    #: What the developer does next.
    todo: str = ""


PATTERNS = {
    "cache_aside": Pattern(
        "cache values that are never stale",
        along=("fail_open",),
        todo="call `delete` after each commit that changes the row",
    ),
    "fail_open": Pattern("call Redis only while it responds"),
    "idempotency": Pattern(
        "replay the stored response to a repeated request",
        along=("periodic",),
        table="idempotency_keys",
        packages={"hypothesis>=6,<7": "dev"},
        todo="start `run_periodically(database, 60, idempotency.delete_expired)` in the lifespan",
    ),
    "inbox": Pattern(
        "deduplicate redelivered messages",
        along=("periodic",),
        table="inbox",
        todo="start `run_periodically(database, 60, inbox.delete_expired)` in the lifespan",
    ),
    "outbox": Pattern(
        "publish an event with each change",
        along=("periodic",),
        table="outbox",
        todo="start `outbox.relay` and the job `outbox.update_metrics` in the lifespan",
    ),
    "pagination": Pattern(
        "list rows in pages, by keyset", todo="create an index on the time and the ID"
    ),
    "periodic": Pattern(
        "run jobs in small batches, such as the deletion of old rows",
        todo="start `run_periodically` in the lifespan",
    ),
    "rate_limit": Pattern("limit the requests of each caller", along=("fail_open",)),
    "schedule": Pattern(
        "run a job every n seconds in one process of the fleet",
        table="schedule",
        todo="start `schedule.every(database, seconds, job)` in the lifespan",
    ),
    "stream_consumer": Pattern(
        "consume a Redis stream in a group",
        parts=("stream_group", "stream_handler"),
        test="stream",
        todo="run it in a process of its own with `app.process`",
    ),
}


def own_files(name: str) -> list[str]:
    """Return the files of one pattern, without those of the patterns along with it."""
    pattern = PATTERNS[name]
    files = [f"app/patterns/{module}.py" for module in (name, *pattern.parts)]
    files.append(f"tests/patterns/test_{pattern.test or name}.py")
    return files


def is_present(project: Path, name: str) -> bool:
    """Return whether the project has the module of a pattern."""
    return (project / f"app/patterns/{name}.py").exists()


def copied_together(project: Path, name: str) -> list[str]:
    """Return a pattern, and those along with it that are not present."""
    return [name, *(each for each in PATTERNS[name].along if not is_present(project, each))]


def changes(project: Path, name: str) -> dict[str, str | bytes]:
    """Return the content of every file that copying a pattern writes.

    Raises `ProjectError` if it is unknown or present, or if an edit is not possible.
    """
    if name not in PATTERNS:
        raise ProjectError(f"P={name}: must be one of {', '.join(PATTERNS)}")
    if is_present(project, name):
        raise ProjectError(f"P={name}: already present, in app/patterns/{name}.py")
    added = copied_together(project, name)
    names = [file for each in added for file in own_files(each)]
    existing = [file for file in names if (project / file).exists()]
    if existing:
        raise ProjectError(f"P={name}: {existing[0]} exists; rename or delete it first")
    names += [file for file in SHARED if not (project / file).exists()]
    files: dict[str, str | bytes] = {file: _source(project, file) for file in names}
    for each in added:
        if PATTERNS[each].table:
            file, text = _migration(project, PATTERNS[each].table)
            files[file] = text
    for edited, edit in EDITS.items():
        before = read(project, edited)
        after = edit(before, added)
        if after != before:
            files[edited] = after
    return files


def _source(project: Path, file: str) -> bytes:
    try:
        return (project / SOURCE / file).read_bytes()
    except FileNotFoundError as error:
        msg = f"{SOURCE}/{file} is missing: restore {SOURCE} with git, or with `cruft update`"
        raise ProjectError(msg) from error


def _migration(project: Path, table: str) -> tuple[str, str]:
    """Return a migration with the statements that the template's have for this table."""
    statements = [statement for file in TABLES for statement in _statements(project, file)]
    concerns_table = re.compile(rf"\b(table|on) {table}\b")
    path, revision, predecessor = new_migration(project, table)
    text = MIGRATION.format(
        table=table,
        revision=revision,
        follows=f'"{predecessor}"' if predecessor else None,
        statements="\n    ".join(filter(concerns_table.search, statements)),
    )
    return path, text


def _statements(project: Path, file: str) -> Iterator[str]:
    """Yield the statements of `upgrade` in a migration."""
    source = _source(project, file).decode().replace("\r\n", "\n")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    (upgrade,) = [function for function in functions if function.name == "upgrade"]
    for node in upgrade.body:
        yield ast.get_source_segment(source, node) or ""


def _edit_pyproject(text: str, added: list[str]) -> str:
    """Add the requirements and the layer of the import contract, if they are missing."""
    metadata = tomllib.loads(text)
    groups = metadata["dependency-groups"] | {"project": metadata["project"]["dependencies"]}
    for name in added:
        for requirement, group in PATTERNS[name].packages.items():
            if package(requirement) not in map(package, groups[group]):
                text = insert(text, group, requirement)
    layers = re.search(r"^layers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if layers is None or re.search(r"\bpatterns\b", layers[1]):
        return text
    # In a line of its own above that of the core, `auth`.
    place = re.search(r'^ *"[^"\n]*\bauth\b', layers[1], re.MULTILINE)
    if place is None:
        msg = 'pyproject.toml has no layer with "auth" to put "(patterns)" above; add it by hand'
        raise ProjectError(msg)
    start = layers.start(1) + place.start()
    return f'{text[:start]}    "(patterns)",\n{text[start:]}'


def _edit_docstring(text: str, _: list[str]) -> str:
    """Add the directory to the tree of modules, if there is a tree."""
    if re.search("^patterns/", text, re.MULTILINE):
        return text
    line = "patterns/            building blocks: docs/patterns.md\n"
    return re.sub("^(?=web/)", line, text, count=1, flags=re.MULTILINE)


EDITS = {"pyproject.toml": _edit_pyproject, "app/__init__.py": _edit_docstring}


def package(requirement: str) -> str:
    """Return the normalized name of the package that a line begins with."""
    return normalize(re.split(r"[^\w.-]", requirement)[0])


def unlocked(project: Path, names: list[str]) -> list[str]:
    """Return the packages of patterns that the requirements files do not have."""
    missing = []
    for name in names:
        for requirement, group in PATTERNS[name].packages.items():
            lines = (project / LOCKS[group]).read_text().splitlines()
            if package(requirement) not in map(package, lines):
                missing.append(package(requirement))
    return missing


@contextlib.contextmanager
def locked(project: Path, names: list[str]) -> Iterator[None]:
    """Lock the packages of patterns that are not locked; restore the requirements after an error.

    Raises `ProjectError` if that is not possible, for example without a package index.
    """
    packages = unlocked(project, names)
    if not packages:
        yield
        return
    with restored(project, [file.name for file in project.glob("requirements*.txt")]):
        done = subprocess.run([MAKE, "--silent", "lock"], cwd=project, check=False)
        if done.returncode:
            missing = ", ".join(packages)
            raise ProjectError(f"cannot lock {missing}: `make lock` failed; nothing was changed")
        yield


def copy(project: Path, name: str) -> list[str]:
    """Copy a pattern into the project; return the names of the written files.

    Raises `ProjectError`, and writes nothing, if that is not possible.
    """
    files = changes(project, name)
    added = copied_together(project, name)
    with written(project, files), locked(project, added):
        pass
    return list(files)


def listing(project: Path) -> str:
    """Return a line for each pattern."""
    lines = ""
    for name, pattern in PATTERNS.items():
        note = " (present)" if is_present(project, name) else ""
        lines += f"{name:<17}{pattern.summary}{note}\n"
    return lines


def main(arguments: list[str]) -> None:
    """List the patterns, or copy one. Exits with one line if that is not possible."""
    name = "".join(arguments).strip().removesuffix(".py").replace("-", "_")
    if not name:
        sys.stdout.write(listing(PROJECT))
        return
    try:
        files = copy(PROJECT, name)
    except ProjectError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"nothing was written: {error}")
    sys.stdout.write("".join(f"wrote {file}\n" for file in files))
    if PATTERNS[name].table:
        sys.stdout.write("next: `make migrate`\n")
    if PATTERNS[name].todo:
        sys.stdout.write(f"next: {PATTERNS[name].todo}\n")
    sys.stdout.write("docs/patterns.md has the rules for its use\n")


if __name__ == "__main__":
    main(sys.argv[1:])
