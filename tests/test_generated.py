"""The generated project passes its own lint, types and tests without the example."""

import pytest

from tests.conftest import Bake, interpreter
from tests.projects import make


@pytest.mark.slow
@pytest.mark.parametrize(("version", "include_example"), [("3.12", False)])
def test_project_passes_its_own_checks(bake: Bake, version: str, include_example: bool) -> None:
    project = bake(project_slug="orders", include_example=include_example)
    make(project, "lint", "types", "test-all", PYTHON=interpreter(version))
