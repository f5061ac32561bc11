"""The files of a new feature: copied from `widgets`, renamed, and checked against the project."""

import io
import re
import tokenize
from pathlib import Path

from scripts.feature.edits import add_layer, add_router
from scripts.feature.names import Names
from scripts.project_files import PROJECT, ProjectError, new_migration, read

SOURCE = Path("scripts/feature/widgets")
TESTS = Path("tests/scripts/widgets")
MIGRATION = Path("scripts/feature/migration.py")
#: Only for the feature as it stands.
NOT_COPIED = {"conftest.py"}
#: In texts for people, the words of a name are separated by spaces.
_IN_PROSE = re.compile(r"\b(about|new|of|such|stored|the) (widgets?)\b")


def plan(names: Names) -> dict[str, str]:
    """Return the text of each file to write, new and edited ones.

    Raises `ProjectError` or `NoPlaceError` if that is not possible.
    """
    _check_free(names)
    _check_classes(names)
    files: dict[str, str] = {}
    for directory, target in ((SOURCE, "app"), (TESTS, "tests")):
        for path in sorted((PROJECT / directory).glob("*.py")):
            if path.name not in NOT_COPIED:
                name = path.name.replace("widgets", names.plural)
                files[f"{target}/{names.plural}/{name}"] = _rename(path.read_text("utf-8"), names)
    migration, text = _migration(names)
    files[migration] = text
    for name, edit in (("app/main.py", add_router), ("pyproject.toml", add_layer)):
        files[name] = edit(read(PROJECT, name), names.plural)
    return files


def _check_free(names: Names) -> None:
    """Raise `ProjectError` if the project has something of this name."""
    for name in (f"app/{names.plural}", f"tests/{names.plural}"):
        for path in (Path(name), Path(f"{name}.py")):
            if (PROJECT / path).exists():
                raise ProjectError(f"N={names.plural}: {path} exists; choose another name")
    main = read(PROJECT, "app/main.py")
    if re.search(rf"\bapp\.{names.plural}\b|\b{names.plural}_router\b", main):
        raise ProjectError(f"N={names.plural}: app/main.py has a router of this name already")


def _check_classes(names: Names) -> None:
    """Raise `ProjectError` if the code of the feature has another class of this name."""
    used: set[str] = set()
    for path in (PROJECT / SOURCE).glob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        used |= {token.string for token in tokens if token.type == tokenize.NAME}
    if names.class_name in used:
        problem = f"its class {names.class_name} would hide another one of the feature"
        raise ProjectError(f"S={names.singular}: {problem}; choose another name")


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


def _migration(names: Names) -> tuple[str, str]:
    """Return path and text of the migration, which follows the newest one."""
    path, revision, predecessor = new_migration(PROJECT, names.plural)
    follows = f'"{predecessor}"' if predecessor else "None"
    text = (PROJECT / MIGRATION).read_text("utf-8")
    text = text.replace('revision = "widgets"', f'revision = "{revision}"', 1)
    text = text.replace("down_revision = None", f"down_revision = {follows}", 1)
    return path, _rename(text, names)
