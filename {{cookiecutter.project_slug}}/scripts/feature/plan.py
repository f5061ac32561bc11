"""The files of a new feature: copied from `widgets`, renamed, and checked against the project."""

import datetime
import io
import re
import tokenize
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError, rev_id

from scripts.feature.edits import add_layer, add_router
from scripts.feature.names import Names

PROJECT = Path(__file__).parent.parent.parent
SOURCE = Path("scripts/feature/widgets")
TESTS = Path("tests/scripts/widgets")
MIGRATION = Path("scripts/feature/migration.py")
#: Only for the feature as it stands.
NOT_COPIED = {"conftest.py"}
#: In texts for people, the words of a name are separated by spaces.
_IN_PROSE = re.compile(r"\b(about|new|of|such|stored|the) (widgets?)\b")


class FeatureError(Exception):
    """A reason not to write the feature, in one line."""


def plan(names: Names) -> dict[Path, str]:
    """Return the files to write, new and edited ones, with their text. Raises an error of ours."""
    _check_free(names)
    files: dict[Path, str] = {}
    for directory, target in ((SOURCE, Path("app")), (TESTS, Path("tests"))):
        for path in sorted((PROJECT / directory).glob("*.py")):
            if path.name not in NOT_COPIED:
                name = path.name.replace("widgets", names.plural)
                files[target / names.plural / name] = _rename(path.read_text("utf-8"), names)
    _check_classes(names)
    migration, text = _migration(names)
    files[migration] = text
    main = Path("app/main.py")
    files[main] = add_router(_read(main), names.plural)
    metadata = Path("pyproject.toml")
    files[metadata] = add_layer(_read(metadata), names.plural)
    return files


def _check_free(names: Names) -> None:
    """Raise `FeatureError` if the project has something of this name."""
    for name in (f"app/{names.plural}", f"tests/{names.plural}"):
        for path in (Path(name), Path(f"{name}.py")):
            if (PROJECT / path).exists():
                raise FeatureError(f"N={names.plural}: {path} exists; choose another name")
    if re.search(rf"\bapp\.{names.plural}\b|\b{names.plural}_router\b", _read(Path("app/main.py"))):
        raise FeatureError(f"N={names.plural}: app/main.py has a router of this name already")


def _check_classes(names: Names) -> None:
    """Raise `FeatureError` if the code of the feature has another class of this name."""
    used: set[str] = set()
    for path in (PROJECT / SOURCE).glob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        used |= {token.string for token in tokens if token.type == tokenize.NAME}
    if names.class_name in used:
        problem = f"its class {names.class_name} would hide another one of the feature"
        raise FeatureError(f"S={names.singular}: {problem}; choose another name")


def _rename(text: str, names: Names) -> str:
    """Return a text of the source with the names of the new feature."""

    def in_prose(found: re.Match[str]) -> str:
        words = names.plural if found[2] == "widgets" else names.singular
        return f"{found[1]} {words.replace('_', ' ')}"

    text = _IN_PROSE.sub(in_prose, text)
    replacements = {
        "scripts.feature.widgets": f"app.{names.plural}",
        "tests.scripts.widgets": f"tests.{names.plural}",
        "widgets": names.plural,
        "widget": names.singular,
        "Widget": names.class_name,
    }
    for before, after in replacements.items():
        text = text.replace(before, after)
    return text


def _migration(names: Names) -> tuple[Path, str]:
    """Return path and text of the migration, which follows the newest one."""
    script = ScriptDirectory.from_config(Config(str(PROJECT / "alembic.ini")))
    try:
        newest = sorted(script.get_heads())
    except (CommandError, SyntaxError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise FeatureError(f"the migrations cannot be read: {reason}") from None
    if len(newest) > 1:
        remedy = "run `.venv/bin/alembic merge heads -m merge` first"
        raise FeatureError(f"several migrations are the newest, {' and '.join(newest)}: {remedy}")
    directory = Path(script.versions)
    _check_table(directory, names.plural)
    revision = rev_id()
    follows = f'"{newest[0]}"' if newest else "None"
    text = (PROJECT / MIGRATION).read_text("utf-8")
    text = text.replace('revision = "widgets"', f'revision = "{revision}"', 1)
    text = text.replace("down_revision = None", f"down_revision = {follows}", 1)
    today = datetime.datetime.now(tz=datetime.UTC)
    path = directory / f"{today:%Y%m%d}_{revision}_create_{names.plural}.py"
    return path.resolve().relative_to(PROJECT.resolve()), _rename(text, names)


def _check_table(directory: Path, table: str) -> None:
    """Raise `FeatureError` if a migration creates this table already."""
    created = re.compile(
        rf"create table (if not exists )?(\w+\.)?\"?{table}\b|create_table\(\s*[\"']{table}[\"']",
        re.IGNORECASE,
    )
    for path in sorted(directory.glob("*.py")):
        if created.search(path.read_text("utf-8")):
            problem = f"migrations/versions/{path.name} creates a table of this name"
            raise FeatureError(f"N={table}: {problem}; choose another name")


def _read(path: Path) -> str:
    """Return a file of the project with its own line ends."""
    try:
        text = (PROJECT / path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FeatureError(f"{path} cannot be read: {error}") from None
    return text.replace("\r\n", "\n")
