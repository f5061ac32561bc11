"""The generated project passes its own lint, types and tests without the parts.

With all of them it does in `test_ordinary_user.py`, with some of them in `test_combinations.py`.
"""

import pytest

from tests.conftest import Bake, interpreter
from tests.parts import bake_parts
from tests.projects import make

#: Those of the server know nothing of the example.
ROOMS = (
    *("auth", "network", "outbound", "process_pool", "scripts", "sizing", "storage", "telemetry"),
    "web",
)


@pytest.mark.slow
def test_project_passes_its_own_checks(bake: Bake) -> None:
    project = bake_parts(bake, (), project_slug="orders")
    python = interpreter("3.12")
    make(project, "lint", "types", "test", PYTHON=python)
    tests = " ".join(f"tests/{room}" for room in ROOMS)
    make(project, "test", f"T={tests}", PYTHON=python)
