"""Stdout for log lines: full, closed, redirected, shared with a child."""

import contextlib
import os
import socket
import threading
import time
import tty
from collections.abc import Iterator

import pytest

from app.telemetry.stdout import ACCESS_LINES, LOG_LINES, PATIENCE_SECONDS, STDOUT


@contextlib.contextmanager
def stdout_in_pipe() -> Iterator[int]:
    """Yield the reading end of a pipe that is descriptor 1 for the duration of the block."""
    with stdout_in(*os.pipe()) as reader:
        yield reader


@contextlib.contextmanager
def stdout_in(reader: int, writer: int) -> Iterator[int]:
    """Use another descriptor 1, and yield the end at which it is read.

    No fixture: pytest redirects descriptor 1 between its fixtures and the test.
    """
    stdout = os.dup(1)
    os.dup2(writer, 1)
    os.close(writer)
    STDOUT.follow_redirection()
    try:
        yield reader
    finally:
        os.close(reader)
        STDOUT.patience_seconds = PATIENCE_SECONDS
        STDOUT.drain()
        STDOUT.lock.is_line_open = False
        os.dup2(stdout, 1)
        os.close(stdout)
        LOG_LINES.take_dropped()
        ACCESS_LINES.take_dropped()


def read(descriptor: int, size: int) -> bytes:
    content = b""
    while len(content) < size:
        content += os.read(descriptor, size - len(content))
    return content


def test_stdout_does_not_share_its_mode() -> None:
    """O_NONBLOCK belongs to the open file description (POSIX, open)."""
    with stdout_in_pipe():
        assert STDOUT.descriptor != 1
        assert os.get_blocking(1)
        assert not os.get_blocking(STDOUT.descriptor)


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("is_blocking", [True, False])
def test_full_pipe_keeps_lines_in_order(
    is_own: bool, is_blocking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a descriptor of its own: the pipe of another user cannot be opened."""
    with stdout_in_pipe() as reading_end:
        os.set_blocking(1, is_blocking)
        if not is_own:
            monkeypatch.setattr("os.open", fail)
            STDOUT.identity = None
        lines = [b"%d %b\n" % (number, b"x" * 100_000) for number in range(20)]
        start = time.monotonic()
        for line in lines:
            STDOUT.write(line, LOG_LINES)
        assert time.monotonic() - start < 5
        assert (STDOUT.descriptor != 1) is is_own
        assert read(reading_end, sum(map(len, lines))) == b"".join(lines)
        assert LOG_LINES.take_dropped() == 0


@pytest.mark.parametrize("kind", ["socket", "terminal"])
def test_stdout_that_is_no_pipe_keeps_lines_in_order(kind: str) -> None:
    """systemd's journal is a socket; a container with a terminal has a pseudo-terminal (pty(7))."""
    if kind == "socket":
        ends = [end.detach() for end in socket.socketpair()]
    else:
        ends = list(os.openpty())
        tty.setraw(ends[1])
    lines = [b"%d %b\n" % (number, b"x" * 100_000) for number in range(20)]
    with stdout_in(*ends) as reading_end:
        start = time.monotonic()
        for line in lines:
            STDOUT.write(line, LOG_LINES)
        assert time.monotonic() - start < 5
        assert read(reading_end, sum(map(len, lines))) == b"".join(lines)


def fail(*_: object) -> int:
    raise PermissionError


def test_stopped_reader_costs_patience_once() -> None:
    with stdout_in_pipe():
        start = time.monotonic()
        for _ in range(2000):
            STDOUT.write(b"x" * 9999 + b"\n", LOG_LINES)
            STDOUT.write(b"important\n", LOG_LINES, is_urgent=True)
        assert time.monotonic() - start < PATIENCE_SECONDS + 5
        assert LOG_LINES.pending_bytes <= LOG_LINES.limit_bytes + 10_000
        assert LOG_LINES.take_dropped() > 1000


def test_urgent_line_waits_for_its_reader() -> None:
    with stdout_in_pipe() as reading_end:
        STDOUT.write(b"x" * 100_000 + b"\n", LOG_LINES)
        thread = threading.Timer(0.05, read, (reading_end, 100_001))
        thread.start()
        STDOUT.write(b"important\n", LOG_LINES, is_urgent=True)
        assert LOG_LINES.pending_bytes == 0
        thread.join()


def test_access_lines_do_not_take_the_room_of_others() -> None:
    with stdout_in_pipe():
        for _ in range(300):
            STDOUT.write(b"x" * 16_383 + b"\n", ACCESS_LINES)
        assert ACCESS_LINES.take_dropped() > 0
        STDOUT.write(b"kept\n", LOG_LINES)
        assert LOG_LINES.take_dropped() == 0
        STDOUT.drain(ACCESS_LINES)
        assert ACCESS_LINES.take_dropped() > 0


def test_line_after_one_that_was_cut_begins_on_its_own() -> None:
    """A process that is killed within a line leaves its start."""
    with stdout_in_pipe() as reading_end:
        child = os.fork()
        if child == 0:
            STDOUT.write(b"x" * 100_000 + b"\n", LOG_LINES)
            os._exit(0)
        os.waitpid(child, 0)
        STDOUT.write(b"whole\n", LOG_LINES)
        content = b""
        while not content.endswith(b"\n"):
            content += os.read(reading_end, 65_536)
        content += os.read(reading_end, 65_536) if b"whole" not in content else b""
        assert content.strip(b"x") == b"\nwhole\n"


def test_forked_child_leaves_pending_lines_to_its_parent() -> None:
    with stdout_in_pipe() as reading_end:
        line = b"x" * 100_000 + b"\n"
        STDOUT.write(line, LOG_LINES)
        child = os.fork()
        if child == 0:
            os._exit(len(STDOUT.pending) + LOG_LINES.pending_bytes)
        assert os.waitpid(child, 0)[1] == 0
        assert read(reading_end, len(line)) == line
