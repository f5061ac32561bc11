"""The generated project passes its own checks for a user other than root."""

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import Bake, interpreter
from tests.projects import make, tools

#: An ordinary user that exists on every Linux and macOS.
USER = "nobody"
CHECKS = ("lint", "types", "test")


def publish(project: Path, python: Path, public: Path) -> None:
    """Copy project, interpreter and uv to a directory that belongs to `USER`.

    An ordinary user cannot read them inside root's own directories.
    """
    shutil.copytree(project, public / "orders")
    ignored = shutil.ignore_patterns("site-packages", "__pycache__", "test", "idlelib")
    installation = python.resolve().parent.parent
    shutil.copytree(installation, public / "python", symlinks=True, ignore=ignored)
    shutil.copytree(tools() / "bin", public / "tools/bin")
    account = pwd.getpwnam(USER)
    for path in (public, *public.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "include_example"), [("3.13", True)])
def test_project_passes_its_own_checks_for_an_ordinary_user(
    bake: Bake, version: str, include_example: bool
) -> None:
    python = Path(interpreter(version))
    project = bake(project_slug="orders", include_example=include_example)
    if os.geteuid() != 0:
        make(project, *CHECKS, PYTHON=str(python))
        return
    with tempfile.TemporaryDirectory(
        prefix="ordinary-", dir="/tmp", ignore_cleanup_errors=True
    ) as name:
        public = Path(name)
        publish(project, python, public)
        make(
            public / "orders",
            *CHECKS,
            user=USER,
            PYTHON=str(public / "python/bin" / f"python{version}"),
            TOOLS=str(public / "tools"),
            LD_LIBRARY_PATH=str(public / "python/lib"),
        )
