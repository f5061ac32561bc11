"""Runs make in a project: a generated one, or the template directory itself."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from tests.conftest import ROOT, SERVICE_BIN

#: Variables of the calling environment that would change the result of the project's make.
STEERING = {"MAKEFLAGS", "MFLAGS", "VENV", "UV_CACHE_DIR", "DATABASE_URL", "REDIS_URL"}


def tools() -> Path:
    """Return the directory whose `bin` contains the uv of this repository."""
    return Path(os.environ.get("TOOLS", ROOT / ".tools")).resolve()


def copy_types(cache: Path) -> None:
    """Let mypy start in this directory with the cache of the service, if there is one.

    It compares the hash of each file, so that it reads only those that differ. Without it, mypy
    reads all packages again.
    """
    service = SERVICE_BIN.parent / "cache/mypy"
    if service.exists():
        shutil.copytree(service, cache)


def environment(**variables: str) -> dict[str, str]:
    """Return the environment for make: this one without `STEERING`, plus `variables`.

    `TOOLS` is `tools()` unless `variables` set it.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in STEERING}
    return inherited | {"TOOLS": str(tools())} | variables


def make(project: Path, *targets: str, user: str = "", **variables: str) -> str:
    """Run make targets in a project and return their output.

    With `user`, make runs as that user, with the project's parent as home and the system's PATH.
    Raises `AssertionError` with the output if make fails.
    """
    account = {}
    if user:
        account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        variables |= {
            "HOME": str(project.parent),
            "PATH": os.defpath,
            "USER": user,
            "LOGNAME": user,
        }
    done = subprocess.run(
        ["make", "--silent", *targets],
        cwd=project,
        env=environment(**variables),
        **account,  # type: ignore[call-overload]
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output: str = done.stdout.decode()
    assert done.returncode == 0, output[-20_000:]
    if {"test", "test-all"} & set(targets):
        assert " passed" in output
        assert " failed" not in output
    return output
