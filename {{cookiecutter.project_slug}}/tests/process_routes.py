"""The service with routes that start other processes: forked, or of `multiprocessing`."""

import multiprocessing
import os
import signal
import time
from typing import NoReturn

from tests.fault_routes import app

__all__ = ["app"]

forked: list[int] = []
fork = multiprocessing.get_context("fork")


def sleep_forever() -> NoReturn:
    while True:
        time.sleep(60)


@app.get("/fork")
async def fork_child() -> int:
    """Fork a child that lives until it is killed, and return its pid."""
    pid = os.fork()
    if pid == 0:
        sleep_forever()
    forked.append(pid)
    return pid


@app.get("/fork-thread")
def fork_child_in_thread() -> int:
    """Fork a child from a thread, as a `def` route does."""
    pid = os.fork()
    if pid == 0:
        sleep_forever()
    return pid


@app.get("/fork-and-return")
async def fork_child_that_returns() -> int:
    """Fork a child that goes on with the event loop: a bug, but not the worker's end."""
    return os.fork()


@app.get("/terminate")
def terminate_child() -> int | None:
    """Start a process, terminate it at once, and return its exit code."""
    process = fork.Process(target=sleep_forever)
    process.start()
    process.terminate()
    process.join(20)
    return process.exitcode


@app.get("/signal")
def signal_child(number: int) -> int:
    """Fork a child, send it a signal at once, and return the signal that has ended it."""
    pid = os.fork()
    if pid == 0:
        sleep_forever()
    os.kill(pid, number)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 0
