"""Find a Python interpreter by its version."""

import os
import shutil
import subprocess
from pathlib import Path


def find(version: str) -> str | None:
    """Return the path of a working Python of this minor version, from PATH or pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [shutil.which(f"python{version}")]
    candidates += map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))
    for candidate in filter(None, candidates):
        # A shim of pyenv prints the path of the real interpreter.
        command = [candidate, "-c", "import sys; print(sys.executable)"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return None
