"""The generated project passes its own lint, types and tests without the example."""

import pytest

from tests.conftest import Bake, interpreter
from tests.projects import make

#: Those of the server know nothing of the example.
ROOMS = ("network", "process_pool", "scripts", "sizing", "storage", "telemetry", "web")


@pytest.mark.slow
@pytest.mark.parametrize(("version", "include_example"), [("3.12", False)])
def test_project_passes_its_own_checks(bake: Bake, version: str, include_example: bool) -> None:
    project = bake(project_slug="orders", include_example=include_example)
    python = interpreter(version)
    make(project, "lint", "types", "test", PYTHON=python)
    tests = " ".join(f"tests/{room}" for room in ROOMS)
    make(project, "test", f"T={tests}", PYTHON=python)
