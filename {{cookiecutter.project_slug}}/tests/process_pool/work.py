"""Functions that tests run in a process pool."""

import ctypes
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from app.errors import ConflictError

logger = logging.getLogger("tests")


class OddError(Exception):
    """Cannot be unpickled: its argument is not in `args`."""

    def __init__(self, *, number: int) -> None:
        super().__init__(f"odd number {number}")


def pid() -> int:
    return os.getpid()


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def write() -> int:
    """Log, print, write as a library in C does, and have a program write."""
    logger.info("logged in the pool")
    sys.stdout.write("printed in the pool\n")
    os.write(2, b"written in the pool\n")
    subprocess.run(["/bin/echo", "echoed in the pool"], check=True)
    return os.getpid()


def crash() -> None:
    """End as with a bug in a library in C."""
    ctypes.string_at(0)


def conflict() -> None:
    raise ConflictError("It is shipped.")


def bug() -> None:
    raise LookupError("the bug")


def odd() -> None:
    raise OddError(number=3)


def leave() -> None:
    sys.exit(3)


def return_unpicklable() -> Callable[[], int]:
    return lambda: 1


def large(content: bytes) -> bytes:
    return content


def warm_up_if_file_exists() -> None:
    Path(os.environ["WARM_UP_FILE"]).stat()


def warm_up_that_hangs_once() -> None:
    file = Path(os.environ["WARM_UP_FILE"])
    if not file.exists():
        file.write_text(str(os.getpid()))
        time.sleep(600)
