"""The lines of a feature in files that the team edits: `app/main.py` and `pyproject.toml`."""

import ast
import re
import tomllib
from collections.abc import Iterator

#: A layer in `[tool.importlinter]`, on a line of its own.
_LAYER = re.compile(r'^(\s*)"([^"]+)"(.*)$')


class NoPlaceError(ValueError):
    """The place of a line cannot be found. The message has the line, to add it by hand."""


def add_router(text: str, name: str) -> str:
    """Return `app/main.py` with the router imported and included.

    The import follows the last one of `app`; the caller sorts. The router is included after the
    last one in `create_app`, or before its return. Raises `NoPlaceError`.
    """
    imported = f"from app.{name}.router import router as {name}_router"
    problem = f"app/main.py has no place for the router of {name}; add these lines by hand: "
    by_hand = f"`{imported}`, and `app.include_router({name}_router)` in create_app"
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise NoPlaceError(f"app/main.py: line {error.lineno}: {error.msg}") from None
    imports = [each for each in tree.body if isinstance(each, ast.ImportFrom)]
    of_app = [each for each in imports if (each.module or "").startswith("app")]
    place = _place_of_router(tree)
    if not of_app or place is None:
        raise NoPlaceError(problem + by_hand)
    line, indentation, application = place
    lines = text.split("\n")
    lines.insert(line, f"{' ' * indentation}{application}.include_router({name}_router)")
    lines.insert(of_app[-1].end_lineno or 0, imported)
    return "\n".join(lines)


def _place_of_router(tree: ast.Module) -> tuple[int, int, str] | None:
    """Return the line to insert at, its indentation and the name of the application."""
    functions = [each for each in tree.body if isinstance(each, ast.FunctionDef)]
    creating = [each for each in functions if each.name == "create_app"]
    if not creating:
        return None
    place = None
    application = None
    for statement in _statements(creating[0].body):
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Name):
            application = application or statement.value.id
            place = place or (statement.lineno - 1, statement.col_offset)
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and node.attr == "include_router":
                place = (statement.end_lineno or 0, statement.col_offset)
                application = ast.unparse(node.value)
    return (*place, application) if place and application else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that are always executed, those of `with` blocks included."""
    for statement in body:
        if isinstance(statement, ast.With):
            yield from _statements(statement.body)
        else:
            yield statement


def add_layer(text: str, name: str) -> str:
    """Return `pyproject.toml` with the feature in the layers of the import contract.

    Features of the team share a line, so that they do not import each other; each example has its
    own, which its removal deletes. A project without import-linter stays as it is. Raises
    `NoPlaceError`.
    """
    if "[[tool.importlinter.contracts]]" not in text:
        return text
    lines = text.split("\n")
    between = _layers_of_features(lines)
    if not between:
        raise NoPlaceError(_no_layer(name))
    own = [number for number in between[:-1] if not _is_of_an_example(lines[number])]
    found = _LAYER.match(lines[own[0] if own else between[0]])
    assert found  # noqa: S101 - for mypy
    indentation, layer, rest = found.groups()
    if own:
        lines[own[0]] = f'{indentation}"{layer} | {name}"{rest}'
    else:
        lines.insert(between[0], f'{indentation}"{name}",')
    edited = "\n".join(lines)
    if not _has_layer(edited, name):
        raise NoPlaceError(_no_layer(name))
    return edited


def _is_of_an_example(line: str) -> bool:
    """Return whether the removal of a part deletes the line; not if a team has added to it."""
    return line.endswith(("# example", "# conversations")) and "|" not in line


def _no_layer(name: str) -> str:
    by_hand = f'add a line "{name}", between "lifespan | serving" and "process" by hand'
    return f"pyproject.toml has no place for {name} among the layers of imports; {by_hand}"


def _layers_of_features(lines: list[str]) -> list[int]:
    """Return the numbers of the layers below `lifespan`, down to `process`."""
    numbers: list[int] = []
    is_below = False
    for number, line in enumerate(lines):
        found = _LAYER.match(line)
        names = re.findall(r"\w+", found[2]) if found else []
        if is_below and found:
            numbers.append(number)
            if "process" in names:
                return numbers
        is_below = is_below or "lifespan" in names
    return []


def _has_layer(text: str, name: str) -> bool:
    try:
        contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    except (tomllib.TOMLDecodeError, KeyError):
        return False
    layers = [layer for contract in contracts for layer in contract.get("layers", [])]
    return any(name in re.findall(r"\w+", layer) for layer in layers)
