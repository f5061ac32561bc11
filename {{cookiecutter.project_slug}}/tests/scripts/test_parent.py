"""Commands of development end with the process that has started them, however early it ends."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.service_process import PROJECT, eventually

#: A parent that ends before the command has read its pid. It prints the pid of the command.
PARENT = """
import os, subprocess, sys
variables = os.environ | {"DEV_PARENT": str(os.getpid())}
command = [each.format(parent=os.getpid()) for each in sys.argv[1:]]
print(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL).pid)
"""
SLEEP = "import time; time.sleep(60)"


def orphan(*command: str, **variables: str) -> psutil.Process:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, sys.executable, "-m", *command],
        cwd=PROJECT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        check=True,
    )
    return psutil.Process(int(done.stdout))


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended. One that nobody waits for stays a zombie."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_command_whose_parent_has_ended_at_its_start_ends() -> None:
    urls = {"DATABASE_URL": "postgresql://a", "REDIS_URL": "redis://b"}
    command = orphan("scripts.dev_environment", sys.executable, "-c", SLEEP, **urls)
    eventually(lambda: has_ended(command))


def test_child_whose_parent_has_ended_at_its_start_ends(tmp_path: Path) -> None:
    """As the server and the consumer of `make dev`."""
    (tmp_path / "sleeping.py").write_text(SLEEP)
    command = orphan("scripts.dev_child", "{parent}", "sleeping", PYTHONPATH=str(tmp_path))
    eventually(lambda: has_ended(command))
