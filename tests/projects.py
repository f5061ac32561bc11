"""Runs make in a project: the generated one, or the template as it stands."""

import os
import pwd
import subprocess
from pathlib import Path

from tests.conftest import ROOT

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
        environment |= {
            "HOME": str(project.parent),
            "PATH": os.defpath,
            "USER": user,
            "LOGNAME": user,
        }
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
