"""A process of a pool: it runs one call after another, and ends with its parent."""

import contextlib
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple, cast

from app.telemetry import logs
from app.telemetry.context import request_context

#: In front of each message: the number of its bytes.
HEADER = struct.Struct("!Q")
#: Signals that reach every process of a terminal or of a control group. The parent ends this one.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: Interval of the check that the parent is running.
PARENT_SECONDS = 0.5
#: Added to the badness of this process, of 1000, so that the kernel kills it before its parent.
OOM_SCORE_ADJUSTMENT = "300"
WarmUp = Callable[[], object]


class LogOptions(NamedTuple):
    """The settings of the log. A process of a pool has no others, and imports no others."""

    service_name: str
    log_level: str
    log_format: str
    log_fields: tuple[tuple[str, str], ...]


def main(descriptor: int, parent: int) -> None:
    """Run the calls that arrive on a socket until the parent closes it or ends."""
    for number in SIGNALS:
        # A handler, not SIG_IGN: the programs that a call starts would ignore the signals too.
        signal.signal(number, _do_nothing)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE_ADJUSTMENT)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        while message := _read(cast("BinaryIO", stream)):
            result = _run(message)
            stream.write(HEADER.pack(len(result)) + result)
            stream.flush()


def start(settings: LogOptions, warm_up: WarmUp | None, *, is_background: bool) -> None:
    """Set up the log, then warm up: the first call of each process."""
    logs.configure(settings)
    logs.capture_prints(settings)
    if warm_up:
        warm_up()
    if is_background:
        _yield_to_others()


def _yield_to_others() -> None:
    """Let the processes of this control group or session that wake up run at once (Linux only).

    At the priority of the others, they would wait for the rest of this one's slice, up to 3 ms.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _do_nothing(_: int, __: FrameType | None) -> None: ...


def _end_with(parent: int) -> None:
    """End when the parent has ended, also in the middle of a call.

    The end of the socket is not enough: processes that the parent has forked may keep it open.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _read(stream: BinaryIO) -> bytes:
    """Return the next message; nothing when the parent has closed the socket."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return b""
    return stream.read(HEADER.unpack(header)[0])


def _run(message: bytes) -> bytes:
    """Run a call, and return its pickled result or exception."""
    try:
        function, arguments, context = pickle.loads(message)  # noqa: S301 - the parent's
        request_context.set(context)
        return pickle.dumps((function(*arguments), None))
    except BaseException as error:  # noqa: BLE001 - of `sys.exit` the caller gets an error too
        return _pickle_error(error)


def _pickle_error(error: BaseException) -> bytes:
    """Return an exception with its traceback as a note: tracebacks cannot be pickled."""
    note = f"In process {os.getpid()}:\n{''.join(traceback.format_exception(error))}"
    if isinstance(error, Exception):
        error.add_note(note)
        # An exception with arguments of its own can be pickled, and fails to be unpickled.
        with contextlib.suppress(Exception):
            content = pickle.dumps((None, error))
            pickle.loads(content)  # noqa: S301 - our own
            return content
    replacement = RuntimeError(f"{type(error).__name__}: {logs.safe_str(error)}")
    replacement.add_note(note)
    return pickle.dumps((None, replacement))


def read_result(content: bytes) -> Any:
    """Return the result of a call, in the parent. Raises what the call has raised."""
    result, error = pickle.loads(content)  # noqa: S301 - the child's
    if error is not None:
        raise error
    return result
