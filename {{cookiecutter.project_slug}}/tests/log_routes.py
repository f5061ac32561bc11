"""The service with routes that log, print and fail in every way that a library might."""

import asyncio
import gc
import logging
import os
import sys
import threading
import traceback
import warnings

from tests.fault_routes import app, logger

#: A URL of which no output may contain the password.
SECRET_URL = "postgresql://app:hunter2@db/app"

if "FAIL_AT_IMPORT" in os.environ:
    raise ValueError(SECRET_URL)

lonely_logger = logging.getLogger("tests.lonely")
lonely_logger.propagate = False
own_logger = logging.getLogger("tests.own")
own_logger.propagate = False
own_logger.addHandler(logging.StreamHandler())


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError(SECRET_URL)


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError(SECRET_URL)


class Undeletable:
    def __del__(self) -> None:
        raise RuntimeError(SECRET_URL)


@app.get("/log")
async def log(count: int, size: int, name: str = "") -> int:
    """Log lines of this size; return the pid of the worker."""
    for number in range(count):
        logger.info("x" * size, extra={"number": number, "batch": name})
    return os.getpid()


@app.get("/critical")
async def critical() -> None:
    """Log a line that has to be written."""
    logger.critical("important")


@app.get("/log-wrongly")
async def log_wrongly() -> None:
    """Log with wrong arguments, values that cannot be printed, and odd keys."""
    logger.error("too many", SECRET_URL)
    logger.error("too few %s %s", SECRET_URL)
    logger.error("wrong type %d", SECRET_URL)
    logger.error("wrong key %(b)s", {"a": SECRET_URL})
    logger.error("unprintable %r", Unprintable())
    logger.error("unprintable extra", extra={"value": Unprintable(), "key": {(1, 2): SECRET_URL}})
    logger.error(Unprintable())
    try:
        raise UnprintableError
    except UnprintableError:
        logger.exception("unprintable exception %s", SECRET_URL, SECRET_URL)


@app.get("/print")
def print_everything() -> None:
    """Write to stdout and stderr in the ways that libraries do, in a thread."""
    print("printed", SECRET_URL)  # noqa: T201
    sys.stdout.write("unfinished ")
    sys.stdout.write("line\n")
    sys.stderr.write(f"to stderr {SECRET_URL}\n")
    sys.stdout.buffer.write(b"printed bytes\n")
    print("flushed", end="", flush=True)  # noqa: T201
    warnings.warn(f"warned {SECRET_URL}", stacklevel=1)
    lonely_logger.error("no handler %s", SECRET_URL)
    own_logger.error("own handler %s", SECRET_URL)
    own_logger.error("own handler, wrong arguments", SECRET_URL)
    try:
        raise ValueError(SECRET_URL)
    except ValueError:
        traceback.print_exc()


@app.get("/fail-elsewhere")
async def fail_elsewhere() -> None:
    """Raise where no caller is: in a task, a callback, a thread, a finalizer."""

    def fail() -> None:
        raise RuntimeError(SECRET_URL)

    async def fail_in_task() -> None:
        fail()

    task = asyncio.create_task(fail_in_task(), name=SECRET_URL)
    asyncio.get_running_loop().call_soon(fail)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Undeletable()
    await asyncio.sleep(0.01)
    del task
    gc.collect()


@app.get("/die-within-a-line")
async def die_within_a_line() -> None:
    """End without a trace while a line is half written, as after SIGKILL."""
    logger.info("x" * 1_000_000)
    os._exit(1)
