"""The parts of the service that a project may lack, and their tables in `scripts/parts`."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, SOURCE, tracked

SERVICE = ROOT / SOURCE
SCRIPT = SERVICE / "scripts/remove_part.py"
TABLES = SERVICE / "scripts/parts"
NAMES = sorted(path.stem for path in TABLES.glob("*.py"))
#: The parts that a project may have: by its answers, and after `make remove-conversations`.
COMBINATIONS = (
    ("example", "jobs", "conversations"),
    ("example", "jobs"),
    ("example",),
    ("jobs", "conversations"),
    ("jobs",),
    (),
)
ALL_PARTS = COMBINATIONS[0]
#: Those of the answers alone.
ANSWERED = tuple(parts for parts in COMBINATIONS if "jobs" not in parts or "conversations" in parts)
Parts = tuple[str, ...]


def parts_id(parts: Parts) -> str:
    """Return the name of a combination in the output of pytest."""
    return " ".join(parts) or "none"


def table(name: str) -> dict[str, Any]:
    """Return the constants of a part's table."""
    return runpy.run_path(str(TABLES / f"{name}.py"))


def remove(project: Path, name: str, script: Path = SCRIPT) -> list[str]:
    """Remove a part as the hook does; return the names that are reported as kept."""
    function: Callable[[Path, str], list[str]] = runpy.run_path(str(script))["remove"]
    return function(project, name)


def bake_parts(
    bake: Callable[..., Path], parts: Parts, output: object = "out", **answers: object
) -> Path:
    """Generate a project with these parts. `bake` is the fixture, or a function like it."""
    answers |= {"include_example": "example" in parts, "include_jobs": "jobs" in parts}
    project = bake(output, **answers)
    if "jobs" in parts and "conversations" not in parts:
        remove(project, "conversations")
    return project


def service_files() -> list[str]:
    """Return the tracked files of the service, relative to its directory."""
    prefix = f"{SOURCE}/"
    return [name.removeprefix(prefix) for name in tracked() if name.startswith(prefix)]
