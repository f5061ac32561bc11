"""Changes of this project's files, all or none, for `make feature`, `make pattern`, `make add`."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
#: The make that runs a script passes its own name.
MAKE = os.environ.get("MAKE") or "make"
VERSIONS = "migrations/versions"


class ProjectError(Exception):
    """A change that cannot be made; its text is one line with the remedy."""


@contextlib.contextmanager
def written(project: Path, files: Mapping[str, str | bytes]) -> Iterator[None]:
    """Write files for the block, and for good if it succeeds; if not, restore what was there.

    A text gets the line ends that its file has.
    """
    with restored(project, files):
        for name, content in files.items():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            _replace(project / name, content)
        yield


@contextlib.contextmanager
def restored(project: Path, names: Iterable[str]) -> Iterator[None]:
    """Restore files if the block fails, and delete those that it has created."""
    before = {name: _read(project / name) for name in names}
    parents = {parent for name in before for parent in (project / name).parents}
    new_directories = [parent for parent in parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for name, previous in before.items():
            with contextlib.suppress(OSError):
                _restore(project / name, previous)
        for directory in sorted(new_directories, reverse=True):
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _replace(link: Path, content: str | bytes) -> None:
    """Write a file in one step, behind a link too."""
    path = link.resolve()
    if isinstance(content, str):
        has_crlf = path.exists() and b"\r\n" in path.read_bytes()
        content = (content.replace("\n", "\r\n") if has_crlf else content).encode()
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _restore(path: Path, previous: bytes | None) -> None:
    if previous is None:
        path.unlink()
    elif path.read_bytes() != previous:
        path.write_bytes(previous)


def read(project: Path, name: str) -> str:
    """Return a text of the project, with line feeds. Raises `ProjectError`."""
    try:
        text = (project / name).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ProjectError(f"{name} cannot be read: {error}") from None
    return text.replace("\r\n", "\n")


def new_migration(project: Path, table: str) -> tuple[str, str, str | None]:
    """Return the path and the revision of a migration for a new table, and its predecessor.

    The names are those of `make migration`. Raises `ProjectError` if several migrations are the
    newest, or if one has the table or cannot be read.
    """
    # Only here, since the import takes longer than all the rest.
    from alembic.util import rev_id

    predecessor = _newest_migration(project)
    _check_table(project, table)
    revision = rev_id()
    today = datetime.datetime.now(tz=datetime.UTC)
    return f"{VERSIONS}/{today:%Y%m%d}_{revision}_create_{table}.py", revision, predecessor


def _newest_migration(project: Path) -> str | None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    script = ScriptDirectory.from_config(Config(str(project / "alembic.ini")))
    try:
        newest = sorted(script.get_heads())
    except (CommandError, SyntaxError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ProjectError(f"{VERSIONS}: {reason}") from None
    if len(newest) > 1:
        remedy = "run `.venv/bin/alembic merge heads -m merge` first"
        raise ProjectError(f"several migrations are the newest, {' and '.join(newest)}: {remedy}")
    return newest[0] if newest else None


def _check_table(project: Path, table: str) -> None:
    created = re.compile(
        rf"create table (if not exists )?(\w+\.)?\"?{table}\b|create_table\(\s*[\"']{table}[\"']",
        re.IGNORECASE,
    )
    for path in sorted((project / VERSIONS).glob("*.py")):
        if created.search(path.read_text("utf-8")):
            raise ProjectError(f"{VERSIONS}/{path.name} creates the table {table} already")
