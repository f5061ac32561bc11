"""The generated project passes its own lint, types and tests without some of its parts.

With all of them it does in `test_service.py` and `test_ordinary_user.py`.
"""

import pytest

from tests.conftest import Bake, interpreter
from tests.parts import Parts, bake_parts
from tests.projects import make

#: Those of the server know nothing of the example.
ROOMS = ("network", "process_pool", "scripts", "sizing", "storage", "telemetry", "web")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "parts"),
    [
        ("3.12", ()),
        ("3.11", ("jobs", "conversations")),
        ("3.11", ("jobs",)),
        ("3.11", ("example",)),
    ],
)
def test_project_passes_its_own_checks(bake: Bake, version: str, parts: Parts) -> None:
    """Of the runtime, the tests of the rooms run once, without any part."""
    project = bake_parts(bake, parts, project_slug="orders")
    python = interpreter(version)
    make(project, "lint", "types", "test", PYTHON=python)
    if parts:
        return
    tests = " ".join(f"tests/{room}" for room in ROOMS)
    make(project, "test", f"T={tests}", PYTHON=python)
