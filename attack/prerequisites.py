"""Programs that this suite needs on the machine."""

import os
import shutil
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip the test because a program is missing; with CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; CI=true makes that a failure")
    pytest.skip(reason)


def program(name: str) -> str:
    """Return the path of a program; skip the test without it."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found:
        return found
    missing(f"{name} is missing: install the Debian package of that name")
