"""Edits of this project's files, all or none, for `make pattern` and `make feature`."""

import contextlib
import datetime
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
MIGRATION = '''"""{title}."""

from alembic import op

revision = "{revision}"
down_revision = {down_revision}


def upgrade() -> None:
    """Create the table."""
{upgrade}


def downgrade() -> None:
    """Drop the table."""
{downgrade}
'''


class ProjectError(Exception):
    """An edit that cannot be made; its text is one line with the remedy."""


@contextlib.contextmanager
def written(project: Path, files: Mapping[str, str | bytes]) -> Iterator[None]:
    """Write files for the block, and for good if it succeeds; if not, restore what was there."""
    before = {name: _read(project / name) for name in files}
    parents = {parent for name in files for parent in (project / name).parents}
    new_directories = [parent for parent in parents if not parent.exists()]
    try:
        for name, content in files.items():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            _write(project / name, content)
        yield
    except BaseException:
        for name, previous in before.items():
            _restore(project / name, previous)
        for directory in sorted(new_directories, reverse=True):
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()
        raise


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _restore(path: Path, previous: bytes | None) -> None:
    if previous is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(previous)


def insert_line(text: str, line: str, before: str, file: str) -> str:
    """Insert a line before the first one that matches the pattern.

    Raises `ProjectError` if no line matches.
    """
    match = re.search(before, text, re.MULTILINE)
    if match is None:
        msg = f"{file} has no line {before!r}: add {line.strip()} by hand, then repeat the command"
        raise ProjectError(msg)
    return f"{text[: match.start()]}{line}\n{text[match.start() :]}"


def add_layer(pyproject: str, layer: str, before: str) -> str:
    """Add a layer to the import contract, above the layer that names the module `before`.

    An optional layer is in parentheses: `(patterns)`. Nothing changes if the module has a layer.
    Raises `ProjectError` if there is no such place.
    """

    def edit(layers: str) -> str:
        if re.search(rf"\b{re.escape(layer.strip('()'))}\b", layers):
            return layers
        place = rf'^ *"[^"\n]*\b{before}\b'
        return insert_line(layers, f'    "{layer}",', place, "pyproject.toml")

    return _edit_array(pyproject, "layers", edit)


def add_requirement(pyproject: str, array: str, requirement: str) -> str:
    """Add a requirement to an array of pyproject.toml in alphabetical order, if it is missing.

    `array` is `dependencies` or a dependency group. Raises `ProjectError` if there is none.
    """

    def edit(requirements: str) -> str:
        lines = requirements.splitlines(keepends=True)
        name = package_name(requirement)
        if name in map(package_name, lines):
            return requirements
        place = sum(package_name(line) < name for line in lines)
        lines.insert(place, f'    "{requirement}",\n')
        return "".join(lines)

    return _edit_array(pyproject, array, edit)


def _edit_array(pyproject: str, array: str, edit: Callable[[str], str]) -> str:
    """Replace the lines of an array by what `edit` returns for them."""
    match = re.search(rf"^{array} = \[\n((?:.*\n)*?)\]", pyproject, re.MULTILINE)
    if match is None:
        raise ProjectError(f"pyproject.toml has no array `{array} = [` with a line for each item")
    return f"{pyproject[: match.start(1)]}{edit(match[1])}{pyproject[match.end(1) :]}"


def package_name(requirement: str) -> str:
    """Return the normalized name of a package (PEP 503) from a line that begins with it."""
    name = re.match(r'[\s"]*([\w.-]*)', requirement)
    return re.sub(r"[-_.]+", "-", name[1] if name else "").lower()


def newest_migration(project: Path) -> str | None:
    """Return the newest revision. Raises `ProjectError` if there are several or one is broken."""
    # Only here, since the import takes longer than all the rest.
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    configuration = Config(str(project / "alembic.ini"))
    try:
        heads = ScriptDirectory.from_config(configuration).get_heads()
    except (CommandError, SyntaxError, ImportError) as error:
        raise ProjectError(f"migrations/versions: {error}") from error
    if len(heads) > 1:
        newest = " and ".join(heads)
        remedy = "run `.venv/bin/alembic merge heads -m merge` first"
        raise ProjectError(f"several migrations are the newest, {newest}: {remedy}")
    return heads[0] if heads else None


def new_migration(
    project: Path, title: str, upgrade: list[str], downgrade: list[str]
) -> tuple[str, str]:
    """Return the name and the text of a migration that follows the newest one.

    `upgrade` and `downgrade` are statements of Python, for example `op.execute("...")`. The name is
    that of `alembic revision`.
    """
    newest = newest_migration(project)
    revision = uuid.uuid4().hex[-12:]
    slug = re.sub(r"\W+", "_", title.lower())
    today = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    text = MIGRATION.format(
        title=title,
        revision=revision,
        down_revision=f'"{newest}"' if newest else None,
        upgrade="\n".join(f"    {statement}" for statement in upgrade),
        downgrade="\n".join(f"    {statement}" for statement in downgrade),
    )
    return f"migrations/versions/{today}_{revision}_{slug}.py", text
