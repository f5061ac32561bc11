"""One process of a pool, seen from its parent."""

import asyncio
import contextlib
import functools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any, Self

from app.process_pool import child
from app.process_pool.child import HEADER, LogOptions, WarmUp, read_result
from app.settings import Settings
from app.telemetry.logs import uses_json
from app.telemetry.stdout import LOG_LINES, STDOUT

#: The program of a process. It has the parent's import path, whatever the current directory is.
PROGRAM = """
import sys
sys.path[:] = {path!r}
from app.process_pool.child import main
main({descriptor}, {parent})
"""
#: A line that a process has printed is logged at this size, even without its end.
MAX_LINE_BYTES = 1 << 16
#: Time limit for a killed process to end, and for its output to be read.
END_SECONDS = 1.0
#: The start of a line of JSON that the process has logged itself.
JSON_LINE = b'{"timestamp":'

logger = logging.getLogger("app.process_pool")
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ProcessDiedError(Exception):
    """The process has ended in the middle of a call."""


class WarmUpTimeoutError(Exception):
    """The process did not become warm in time."""


class PoolProcess:
    """A process that runs one call at a time.

    It is started as a program: a fork would copy sockets and threads, and `multiprocessing` starts
    a second process for its semaphores, which prints plain text when this worker is killed.
    """

    def __init__(
        self, popen: subprocess.Popen[bytes], calls: Stream, output: Stream, *, logs_json: bool
    ) -> None:
        self.popen = popen
        self.logs_json = logs_json
        self.reader, self.writer = calls
        self.output = output
        #: Calls until this process is replaced. The pool sets it.
        self.calls_left = 0
        #: Whether no call is running, or was given up.
        self.is_usable = True
        #: Whether a successor is being started, and whether it has started.
        self.has_successor = False
        self.is_retired = False
        #: Ends when the process does.
        self.forwarding = asyncio.create_task(self._forward_output())

    @classmethod
    async def start(
        cls,
        settings: Settings,
        warm_up: WarmUp | None,
        warm_up_seconds: float,
        *,
        is_background: bool,
    ) -> Self:
        """Start a process and warm it up. Raises what that raises, or `OSError`.

        Raises `WarmUpTimeoutError` if it hangs, and kills it.
        """
        popen, calls_stream, output_stream = await _connect()
        # The child cannot see whether lines are JSON: its stdout is not that of the parent.
        log_format = "json" if uses_json(settings) else "console"
        options = LogOptions(
            settings.service_name, settings.log_level, log_format, settings.log_fields
        )
        process = cls(popen, calls_stream, output_stream, logs_json=log_format == "json")
        try:
            first = functools.partial(child.start, is_background=is_background)
            first_call = pickle.dumps((first, (options, warm_up), None))
            read_result(await process.warm_up(first_call, warm_up_seconds))
        except BaseException:
            await process.end()
            raise
        return process

    @property
    def pid(self) -> int:
        """The ID of the process."""
        return self.popen.pid

    async def warm_up(self, message: bytes, seconds: float) -> bytes:
        """Send the first call, and return its result. Raises `WarmUpTimeoutError`."""
        try:
            async with asyncio.timeout(seconds):
                return await self.exchange(message)
        except TimeoutError:
            raise WarmUpTimeoutError(f"not warm after {seconds:g} s") from None

    async def exchange(self, message: bytes) -> bytes:
        """Send a call, and return its result. Raises `ProcessDiedError`.

        If it is cancelled, the process is not usable any more: it goes on with the call.
        """
        self.is_usable = False
        try:
            self.writer.write(HEADER.pack(len(message)))
            self.writer.write(message)
            await self.writer.drain()
            header = await self.reader.readexactly(HEADER.size)
            content = await self.reader.readexactly(HEADER.unpack(header)[0])
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise ProcessDiedError from error
        self.is_usable = True
        return content

    def kill(self) -> None:
        """Kill the process. It is not usable any more; `end` releases it."""
        self.is_usable = False
        self.popen.kill()

    async def end(self) -> str:
        """Kill the process, release its resources, and return how it has ended."""
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.popen.wait, END_SECONDS)
        # A process that the child has started may keep its output open.
        await asyncio.wait([self.forwarding], timeout=END_SECONDS)
        self.forwarding.cancel()
        self.writer.close()
        self.output[1].close()
        return _describe_exit(self.popen.returncode)

    async def _forward_output(self) -> None:
        """Log each line that the process writes to its stdout or stderr, until it ends."""
        rest = b""
        while chunk := await self.output[0].read(MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._forward(line)
        if rest:
            self._forward(rest)

    def _forward(self, line: bytes) -> None:
        """Log a line: as it is if the process has logged it, else as a warning.

        Others are from libraries in C, an interpreter that crashes, or programs that a call starts.
        """
        if line.startswith(JSON_LINE) or not self.logs_json:
            STDOUT.write(line + b"\n", LOG_LINES)
        elif line.strip():
            text = line.decode(errors="backslashreplace")
            logger.warning(text, extra={"process_pid": self.pid})


async def _connect() -> tuple[subprocess.Popen[bytes], Stream, Stream]:
    """Start a process; return it with the streams of its calls and its output.

    Nothing stays open if that fails or is cancelled.
    """
    with contextlib.ExitStack() as own, contextlib.ExitStack() as its:
        calls, its_calls = await _open_stream(own, its)
        output, its_output = await _open_stream(own, its)
        popen = _spawn(its_calls, its_output)
        own.pop_all()
    return popen, calls, output


async def _open_stream(own: contextlib.ExitStack, its: contextlib.ExitStack) -> tuple[Stream, int]:
    """Return a stream and the descriptor of its other end; add both to the stacks of their ends."""
    connection, its_connection = socket.socketpair()
    own.enter_context(connection)
    its.enter_context(its_connection)
    stream = await asyncio.open_connection(sock=connection)
    own.callback(stream[1].close)
    return stream, its_connection.fileno()


def _spawn(calls: int, output: int) -> subprocess.Popen[bytes]:
    """Start the program, with descriptors for its calls and its output. Takes 1 ms."""
    program = PROGRAM.format(path=sys.path, descriptor=calls, parent=os.getpid())
    return subprocess.Popen(  # noqa: S603 - the program above
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[calls],
        # Ctrl-C in a terminal reaches its parent alone, not a process that is being started.
        process_group=0,
    )


def _describe_exit(code: Any) -> str:
    """Return how a process has ended, from the code of `subprocess`."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
