"""The template's folder is a project as it stands: it passes its own tests, on the Python of whoever runs these."""

import sys

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE
from tests.projects import make


@pytest.mark.slow
def test_the_template_as_it_stands_passes_its_own_tests() -> None:
    make(ROOT / SOURCE, f"VENV={SERVICE_BIN.parent}", "test", python=sys.executable)
