"""The generated project passes its own checks for an ordinary user, in a path with spaces."""

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import Bake, interpreter
from tests.parts import ALL_PARTS, bake_parts
from tests.projects import make, tools

#: An ordinary user that exists on every Linux and macOS.
USER = "nobody"
CHECKS = ("lint", "types", "test-all")
#: GNU make separates the words of its lists by spaces, and has no quotes for file names ("Rule
#: Syntax" in its manual).
PARENT = "it's a project"


def publish(project: Path, python: Path, public: Path) -> Path:
    """Copy project, interpreter and uv to a directory that belongs to `USER`.

    An ordinary user cannot read them inside root's own directories. Returns the project's copy.
    """
    copy = public / PARENT / "orders"
    shutil.copytree(project, copy)
    ignored = shutil.ignore_patterns("site-packages", "__pycache__", "test", "idlelib")
    installation = python.resolve().parent.parent
    shutil.copytree(installation, public / "python", symlinks=True, ignore=ignored)
    shutil.copytree(tools() / "bin", public / "my tools/bin")
    account = pwd.getpwnam(USER)
    for path in (public, *public.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.13"])
def test_project_passes_its_own_checks_for_an_ordinary_user(bake: Bake, version: str) -> None:
    python = Path(interpreter(version))
    project = bake_parts(bake, ALL_PARTS, PARENT, project_slug="orders")
    if os.geteuid() != 0:
        make(project, *CHECKS, PYTHON=str(python))
        return
    with tempfile.TemporaryDirectory(
        prefix="ordinary-", dir="/tmp", ignore_cleanup_errors=True
    ) as name:
        public = Path(name)
        copy = publish(project, python, public)
        make(
            copy,
            *CHECKS,
            user=USER,
            PYTHON=str(public / "python/bin" / f"python{version}"),
            TOOLS=str(public / "my tools"),
            LD_LIBRARY_PATH=str(public / "python/lib"),
        )
