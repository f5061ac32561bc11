"""Rules that keep the service readable, beside those of ruff: short functions, one idea a line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, SOURCE

MAX_FUNCTION_LINES = 30
APP = ROOT / SOURCE / "app"
FILES = [*sorted(APP.rglob("*.py")), ROOT / SOURCE / "gunicorn.conf.py"]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Yield each function that does not fit a screen; its docstring does not count."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            header = node.body[0].lineno - node.lineno
            lines = header + (node.end_lineno or 0) - first.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name}: {lines} lines"


def packed_assignments(tree: ast.Module) -> Iterator[str]:
    """Yield each assignment of several values in one line, chains included.

    Unpacking what a call returns is no such assignment, nor is a swap of two names.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            is_tuple = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
            if is_tuple or len(node.targets) > 1:
                yield ast.unparse(node)


def names(path: Path) -> str:
    """Return the name of a test's file, relative to the service."""
    return path.relative_to(ROOT / SOURCE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=names)
def test_functions_fit_a_screen(path: Path) -> None:
    assert list(long_functions(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", FILES, ids=names)
def test_one_assignment_a_line(path: Path) -> None:
    assert list(packed_assignments(ast.parse(path.read_text()))) == []


def test_rules_find_what_they_are_for() -> None:
    body = "\n".join(f"    x{number} = {number}" for number in range(MAX_FUNCTION_LINES + 1))
    assert list(long_functions(ast.parse(f"def f():\n{body}"))) == ["f: 32 lines"]
    packed = ast.parse("a, b = 1, 2\nc = d = 3\nself.e, self.f = x, y\nhost, port = split(address)")
    assert len(list(packed_assignments(packed))) == 3
