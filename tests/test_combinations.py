"""The generated project passes its own checks with some of its parts, on this Python.

With the default answers, its tests are all of `make test`. With other parts, they are those of its
features, and those that compare what the parts edit: settings, routes, migrations, manifests. Those
of the runtime are run with all parts and with none.
"""

import pytest

from tests.conftest import Bake
from tests.parts import Parts, bake_parts, parts_id
from tests.projects import make
from tests.test_feature import link_environment

TESTS = "tests/test_main.py tests/test_settings.py tests/test_migrations.py"
CONVERSATIONS = "tests/conversations tests/deploy"
#: What make runs. Without tests: those of the combinations around it are enough.
CHECKS: dict[Parts, tuple[str, ...]] = {
    ("example",): ("lint", "types", "test"),
    ("jobs", "conversations"): ("lint", "types", "test", f"T={TESTS} {CONVERSATIONS}"),
    ("example", "jobs"): ("lint", "types"),
    ("jobs",): ("lint", "types"),
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", CHECKS, ids=parts_id)
def test_project_with_some_parts_passes_its_own_checks(bake: Bake, parts: Parts) -> None:
    project = bake_parts(bake, parts, project_slug="orders")
    link_environment(project)
    make(project, *CHECKS[parts])
