"""The template's folder is a project as it stands: it passes its own tests, on the Python of whoever runs these."""

import os
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SOURCE
from tests.projects import make


@pytest.mark.slow
def test_the_template_as_it_stands_passes_its_own_tests() -> None:
    environment = Path(os.environ.get("SERVICE_BIN", ROOT / ".venv-service/bin")).parent
    make(ROOT / SOURCE, f"VENV={environment}", "test", python=sys.executable)
