"""The generated project passes its own checks with some of its parts, on this Python.

Its tests are those of its features, and those that compare what the parts edit: settings, routes,
migrations, manifests. Those of the runtime are run with all parts and with none; those of the
example's authentication, gateway, replica, traces and outages of Redis with all parts.
"""

import pytest

from tests.conftest import Bake
from tests.parts import Parts, bake_parts, parts_id
from tests.projects import make
from tests.test_feature import link_environment

TESTS = "tests/test_main.py tests/test_settings.py tests/test_migrations.py"
#: Empty: the tests of the combinations around it are enough.
FEATURES: dict[Parts, str] = {
    ("jobs", "conversations"): "tests/conversations tests/deploy",
    ("example",): "tests/payments/test_payments.py tests/payments/test_consumer.py tests/deploy",
    ("example", "jobs"): "",
    ("jobs",): "",
}


@pytest.mark.slow
@pytest.mark.parametrize("parts", FEATURES, ids=parts_id)
def test_project_with_some_parts_passes_its_own_checks(bake: Bake, parts: Parts) -> None:
    project = bake_parts(bake, parts, project_slug="orders")
    link_environment(project)
    make(project, "lint", "types")
    if FEATURES[parts]:
        make(project, f"T={TESTS} {FEATURES[parts]}", "test")
