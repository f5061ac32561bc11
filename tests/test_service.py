"""The template directory is a project that passes its own tests, on this Python.

Those of the server are run here, and those of files that a generated project has with its answers
in them: settings, migrations, manifests. The others are those of code that is copied as it is: on
this Python, those of the features are run in `test_combinations.py`. `test_ordinary_user.py` has
all.
"""

import sys

import pytest

from tests.conftest import ROOT, SERVICE_BIN, SOURCE
from tests.projects import make
from tests.test_combinations import TESTS


@pytest.mark.slow
def test_template_directory_passes_its_own_tests() -> None:
    arguments = [f"VENV={SERVICE_BIN.parent}", f"T={TESTS} tests/deploy tests/serving"]
    make(ROOT / SOURCE, *arguments, "test", PYTHON=sys.executable)
