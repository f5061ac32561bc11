"""The template directory is a project that passes its own tests, on this Python.

Those of the server are run here; those of the rooms above it in `test_generated.py`, and all of
them in `test_ordinary_user.py`.
"""

import sys

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE
from tests.projects import make


@pytest.mark.slow
def test_template_directory_passes_its_own_tests() -> None:
    for tests in ("", "tests/serving"):
        arguments = [f"VENV={SERVICE_BIN.parent}", f"T={tests}"]
        make(ROOT / SOURCE, *arguments, "test", PYTHON=sys.executable)
