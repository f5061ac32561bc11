"""The generated projects pass their own lint, types and tests: each option, root or not.

The template as it stands, with the example, is tested before by `make test`, on the Python of whoever runs it.
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, Bake, interpreter

pytestmark = pytest.mark.slow
#: An ordinary user that every Linux and macOS has.
USER = "nobody"
#: Variables of whoever runs these tests that would steer the make of the project.
STEERING = {"MAKEFLAGS", "MFLAGS", "VENV", "UV_CACHE_DIR", "DATABASE_URL", "REDIS_URL"}


def tools() -> Path:
    """Return the folder whose `bin` has the uv that this repository uses."""
    return Path(os.environ.get("TOOLS", ROOT / ".tools")).resolve()


def make(project: Path, *targets: str, python: str, **other: str | None) -> None:
    """Run make targets in a project, with other folders and as another user if named; show why they fail."""
    environment = {name: value for name, value in os.environ.items() if name not in STEERING}
    environment |= {"PYTHON": python, "TOOLS": other.get("tools") or str(tools())}
    user = other.get("user")
    account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    if user:
        environment |= {"HOME": str(project.parent), "PATH": os.defpath, "USER": user, "LOGNAME": user}
        environment |= {"LD_LIBRARY_PATH": str(Path(python).parent.parent / "lib")}
    done = subprocess.run(
        ["make", "--silent", *targets],
        cwd=project,
        env=environment,
        **account,  # type: ignore[call-overload]
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()[-20_000:]
    if "test" in targets:
        assert b" passed" in done.stdout
        assert b" failed" not in done.stdout


@pytest.mark.parametrize(("version", "include_example"), [("3.12", False)])
def test_a_project_passes_its_own_checks(bake: Bake, version: str, include_example: bool) -> None:
    project = bake(project_slug="orders", include_example=include_example)
    make(project, "lint", "types", "test", python=interpreter(version))


@pytest.mark.parametrize(("version", "include_example"), [("3.13", True)])
def test_a_project_passes_its_own_checks_for_an_ordinary_user(
    bake: Bake, tmp_path: Path, version: str, include_example: bool
) -> None:
    python = Path(interpreter(version))
    project = bake(project_slug="orders", include_example=include_example)
    if os.geteuid() != 0:
        make(project, "lint", "types", "test", python=str(python))
        return
    # What root's own folders hold an ordinary user may not read: interpreter, uv and project move to a public one.
    public = Path("/tmp") / f"ordinary-{tmp_path.name}"
    account = pwd.getpwnam(USER)
    try:
        shutil.copytree(project, public / "orders")
        ignored = shutil.ignore_patterns("site-packages", "__pycache__", "test", "idlelib")
        shutil.copytree(python.resolve().parent.parent, public / "python", symlinks=True, ignore=ignored)
        shutil.copytree(tools() / "bin", public / "tools/bin")
        for path in (public, *public.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        own = str(public / "python/bin" / f"python{version}")
        make(public / "orders", "lint", "types", "test", python=own, tools=str(public / "tools"), user=USER)
    finally:
        shutil.rmtree(public, ignore_errors=True)
