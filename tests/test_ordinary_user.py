"""The generated project passes its own lint, types and tests for a user who is not root."""

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import Bake, interpreter
from tests.projects import make, tools

#: An ordinary user that every Linux and macOS has.
USER = "nobody"


@pytest.mark.slow
@pytest.mark.parametrize(("version", "include_example"), [("3.13", True)])
def test_a_project_passes_its_own_checks_for_an_ordinary_user(
    bake: Bake, version: str, include_example: bool
) -> None:
    python = Path(interpreter(version))
    project = bake(project_slug="orders", include_example=include_example)
    if os.geteuid() != 0:
        make(project, "lint", "types", "test", python=str(python))
        return
    # What root's own folders hold an ordinary user may not read: interpreter, uv and project move to a public one.
    account = pwd.getpwnam(USER)
    with tempfile.TemporaryDirectory(
        prefix="ordinary-", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        public = Path(folder)
        shutil.copytree(project, public / "orders")
        ignored = shutil.ignore_patterns("site-packages", "__pycache__", "test", "idlelib")
        shutil.copytree(
            python.resolve().parent.parent, public / "python", symlinks=True, ignore=ignored
        )
        shutil.copytree(tools() / "bin", public / "tools/bin")
        for path in (public, *public.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        own = str(public / "python/bin" / f"python{version}")
        make(
            public / "orders",
            "lint",
            "types",
            "test",
            python=own,
            tools=str(public / "tools"),
            user=USER,
        )
