"""The template directory is a project that passes its own tests, on this Python."""

import sys

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE
from tests.projects import make


@pytest.mark.slow
def test_template_directory_passes_its_own_tests() -> None:
    make(ROOT / SOURCE, f"VENV={SERVICE_BIN.parent}", "test", PYTHON=sys.executable)
