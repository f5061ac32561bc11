"""Which Python of a version runs on this machine."""

import os
import shutil
import subprocess
from pathlib import Path


def find(version: str) -> str | None:
    """Return the path of a Python of this minor version that runs, from PATH or from pyenv, or None."""
    pyenv = (
        Path(os.environ.get("PYENV_ROOT", "~/.pyenv"))
        .expanduser()
        .glob(f"versions/{version}.*/bin/python")
    )
    for candidate in (shutil.which(f"python{version}"), *map(str, sorted(pyenv))):
        if candidate:
            ask = [
                candidate,
                "-c",
                "import sys; print(sys.executable)",
            ]  # a pyenv shim names itself otherwise
            answer = subprocess.run(ask, capture_output=True, text=True, check=False)
            if answer.returncode == 0:
                return answer.stdout.strip()
    return None
