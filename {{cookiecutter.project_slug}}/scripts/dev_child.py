"""Run a module as a program that ends with the process that started it.

Usage: `python -m scripts.dev_child PARENT_PID MODULE [ARGUMENT ...]`.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time

from scripts.parent import Parent

CHECK_SECONDS = 0.5
#: Time limit for a graceful end; then SIGKILL.
STOP_SECONDS = 3.0


def start(module: str, *arguments: str, **options: object) -> "subprocess.Popen[bytes]":
    """Start a module as a child; the options are those of `Popen`."""
    command = [sys.executable, "-m", "scripts.dev_child", str(os.getpid()), module, *arguments]
    process: subprocess.Popen[bytes] = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    return process


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a child and wait. One that does not end, such as one at a breakpoint, is killed."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with(parent: Parent) -> None:
    while parent.is_running:
        time.sleep(CHECK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the module in this process."""
    parent = Parent(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
