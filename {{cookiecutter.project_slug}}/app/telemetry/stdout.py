"""Stdout for log lines: whole lines, from every thread and process, that wait for no reader.

- A line of one process is never cut by a line of another. Lines up to PIPE_BUF need one write(2),
  which a pipe accepts as a whole or not at all (POSIX, write). Longer ones need several, so every
  write holds a lock between the processes.
- A pipe that is full does not block: its lines are kept, and a thread writes them as soon as the
  reader goes on. Beyond a limit they are dropped and counted.
"""

import atexit
import contextlib
import fcntl
import mmap
import os
import select
import stat
import tempfile
import threading
import time
from collections import deque

#: Maximum size of a write that a pipe accepts as a whole (POSIX, PIPE_BUF).
PIPE_BUF = select.PIPE_BUF if hasattr(select, "PIPE_BUF") else 512
#: Total time that writers wait for a reader that has stopped.
PATIENCE_SECONDS = 0.5
#: A reader that is at least this fast loses no line: each byte that it reads restores patience.
READER_BYTES_PER_SECOND = 2 << 20
#: Pause while another process is writing: a write takes 5 us.
LOCK_RETRY_SECONDS = 0.0001
LOCK_ATTEMPTS = 20
#: Pause of the writing thread if another process holds the lock for longer.
RETRY_SECONDS = 0.01
#: How often the writing thread looks whether descriptor 1 was redirected.
POLL_SECONDS = 1.0
NEWLINE = 0x0A


class LineBudget:
    """Lines of one kind: the size of those that wait, and the number of those that were dropped."""

    def __init__(self, limit_bytes: int, *, waits: bool) -> None:
        """`waits`: whether their writer waits at the limit before they are dropped."""
        self.limit_bytes = limit_bytes
        self.waits = waits
        self.pending_bytes = 0
        self.dropped_lines = 0

    def drop(self, lines: bytes) -> None:
        """Count lines as dropped."""
        self.dropped_lines += lines.count(b"\n")

    def take_dropped(self) -> int:
        """Return the number of lines dropped since the last call."""
        count = self.dropped_lines
        self.dropped_lines -= count
        return count


#: 200 lines of 40 kB, each a traceback, in a burst before the reader runs.
LOG_LINES = LineBudget(8 << 20, waits=True)
ACCESS_LINES = LineBudget(1 << 20, waits=False)


class _ProcessLock:
    """A lock between this process and those that it forks.

    The kernel releases it when its owner ends (POSIX, fcntl). It lies in memory, since the file
    system may be read-only.
    """

    def __init__(self) -> None:
        self.file = _anonymous_file()
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def is_line_open(self) -> bool:
        """Whether the last write ended within a line. Set by the owner of the lock."""
        return self.shared[0] != 0

    @is_line_open.setter
    def is_line_open(self, value: bool) -> None:
        self.shared[0] = value

    def acquire(self) -> bool:
        """Acquire the lock, again if this process has it; return False after 2 ms."""
        for _ in range(LOCK_ATTEMPTS):
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(LOCK_RETRY_SECONDS)
            except (OSError, ValueError):  # no such locks here: lines may mix, none is lost
                return True
            else:
                return True
        return False

    def release(self) -> None:
        """Release the lock."""
        with contextlib.suppress(OSError, ValueError):
            fcntl.lockf(self.file, fcntl.LOCK_UN)


def _anonymous_file() -> int:
    """Return the descriptor of a file without a name; -1 if there can be none."""
    with contextlib.suppress(AttributeError, OSError):
        return os.memfd_create("log-lock")
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
    return -1


def _open_if_closed() -> None:
    """Open /dev/null as descriptor 1 if it is closed, or the next socket would be stdout."""
    try:
        os.fstat(1)
    except OSError:
        # The lowest free descriptor, which may be 0.
        os.open(os.devnull, os.O_RDWR)
        _open_if_closed()


class Stdout:
    """Writes lines to descriptor 1. A process has one, as it has one descriptor 1."""

    def __init__(self) -> None:
        _open_if_closed()
        self.lock = _ProcessLock()
        self.identity: tuple[int, int] | None = None
        self.descriptor = 1
        self.must_poll = True
        self.part_bytes = PIPE_BUF
        self.poll = select.poll()
        #: Why stdout rejects lines: the first error since the last successful write.
        self.error: OSError | None = None
        self.reported_error: OSError | None = None
        self._reset()
        atexit.register(self.drain)
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Start without lines; a forked child leaves them to its parent."""
        self.mutex = threading.RLock()
        self.pending: deque[tuple[bytes, LineBudget]] = deque()
        #: Bytes of the first pending lines that are written. While there are some, this process
        #: keeps the lock.
        self.written_bytes = 0
        self.patience_seconds = PATIENCE_SECONDS
        self.thread: threading.Thread | None = None
        # A signal handler can log while the code that it interrupts is writing.
        self.is_writing = False
        for budget in (LOG_LINES, ACCESS_LINES):
            budget.pending_bytes = 0
            budget.dropped_lines = 0

    def write(self, lines: bytes, budget: LineBudget, *, is_urgent: bool = False) -> None:
        """Write whole lines, or keep them until stdout accepts them.

        Beyond the limit of their budget they are dropped. That, or an urgent line, can last
        `PATIENCE_SECONDS`, once until the reader goes on.
        """
        with self.mutex:
            if budget.waits and budget.pending_bytes >= budget.limit_bytes:
                self._wait_until(budget, budget.limit_bytes - 1)
            if budget.pending_bytes >= budget.limit_bytes:
                budget.drop(lines)
                return
            self.pending.append((lines, budget))
            budget.pending_bytes += len(lines)
            if self.thread is None:
                self._write_pending()
            if is_urgent:
                self._wait_until(budget, 0)
            if self.pending and self.thread is None:
                self._start_thread()

    def drain(self, budget: LineBudget | None = None) -> None:
        """Write all pending lines, of one budget or of all, as far as patience goes.

        Those that are left are dropped and counted.
        """
        with self.mutex:
            for each in [budget] if budget else [LOG_LINES, ACCESS_LINES]:
                self._wait_until(each, 0)
                self._drop_pending(each)

    def take_error(self) -> OSError | None:
        """Return why stdout rejects lines, once until it accepts one again."""
        error = self.error
        if error is None or error is self.reported_error:
            return None
        self.reported_error = error
        return error

    def _wait_until(self, budget: LineBudget, pending_bytes: int) -> None:
        """Write until at most this much of a budget is pending, as long as patience lasts."""
        while not self.is_writing and budget.pending_bytes > pending_bytes:
            if self.patience_seconds <= 0:
                return
            start = time.monotonic()
            self._wait_writable(self.patience_seconds)
            self.patience_seconds -= time.monotonic() - start
            self._write_pending()

    def _write_pending(self) -> bool:
        """Write pending lines until stdout would block. Return whether any were written."""
        if self.is_writing:
            return False
        self.is_writing = True
        before = (len(self.pending), self.written_bytes)
        try:
            while self.pending and self._write_first():
                pass
        finally:
            self.is_writing = False
        if not self.pending:
            self.patience_seconds = PATIENCE_SECONDS
        return (len(self.pending), self.written_bytes) != before

    def _write_first(self) -> bool:
        """Write the first of the pending lines. Return False if stdout would block."""
        lines, budget = self.pending[0]
        try:
            if budget is LOG_LINES:
                self.follow_redirection()
            is_written = self.lock.acquire() and self._write_parts(lines)
            if is_written:
                self.error = None
        except OSError as error:
            self.error = self.error or error
            budget.drop(lines)
            is_written = True
        if is_written:
            self.pending.popleft()
            self.written_bytes = 0
            budget.pending_bytes -= len(lines)
        if not self.written_bytes:
            self.lock.release()
        return is_written

    def _write_parts(self, lines: bytes) -> bool:
        """Write what is left of these lines. Return False if stdout would block."""
        is_cut = not self.written_bytes and self.lock.is_line_open
        # The process that began that line has been killed, or the disk was full.
        if is_cut and not self._write_part(b"\n"):
            return False
        while self.written_bytes < len(lines):
            end = self.written_bytes + self.part_bytes
            size = self._write_part(memoryview(lines)[self.written_bytes : end])
            if not size:
                return False
            self.written_bytes += size
            self.lock.is_line_open = lines[self.written_bytes - 1] != NEWLINE
            patience_seconds = self.patience_seconds + size / READER_BYTES_PER_SECOND
            self.patience_seconds = min(PATIENCE_SECONDS, patience_seconds)
        return True

    def _write_part(self, part: bytes | memoryview) -> int:
        """Return how many bytes stdout accepted; 0 if it would block. Raises `OSError`."""
        if self.must_poll and not self.poll.poll(0):
            return 0
        try:
            return os.write(self.descriptor, part)
        except BlockingIOError:
            return 0

    def _wait_writable(self, seconds: float) -> None:
        """Wait until stdout is likely to accept bytes. Threads cannot share a `poll`."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        poll.poll(seconds * 1000)

    def follow_redirection(self) -> None:
        """Use what descriptor 1 is now: `gunicorn --daemon` redirects it, for one.

        Raises `OSError` if it is closed.
        """
        status = os.fstat(1)
        identity = (status.st_dev, status.st_ino)
        if identity != self.identity:
            self._open(status.st_mode)
            self.identity = identity

    def _open(self, mode: int) -> None:
        """Open a pipe or a terminal again, so that O_NONBLOCK is ours alone.

        It belongs to the open file description, which descriptor 1 shares with the parent (POSIX,
        open). What cannot be opened is used as it is: the pipe of another user, or a socket. A
        file is, too: a second description would have its own position.
        """
        if self.descriptor != 1:
            os.close(self.descriptor)
        self.descriptor = 1
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            with contextlib.suppress(OSError):
                self.descriptor = os.open("/proc/self/fd/1", flags)
        never_blocks = stat.S_ISREG(mode) or self.descriptor != 1
        # After `poll` returns, even a blocking pipe accepts this much.
        self.part_bytes = 1 << 30 if never_blocks else PIPE_BUF
        self.must_poll = not never_blocks
        self.poll = select.poll()
        self.poll.register(self.descriptor, select.POLLOUT)

    def _start_thread(self) -> None:
        """Write the pending lines in a thread, which ends when there are none."""
        self.thread = threading.Thread(target=self._write_later, name="log-writer", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # too many threads, or the process is ending
            self.thread = None

    def _write_later(self) -> None:
        while True:
            self._wait_writable(POLL_SECONDS)
            with self.mutex:
                has_written = self._write_pending()
                if not self.pending:
                    self.thread = None
                    return
            if not has_written:
                time.sleep(RETRY_SECONDS)

    def _drop_pending(self, budget: LineBudget) -> None:
        """Drop and count the pending lines of a budget, except one that is half written."""
        kept: deque[tuple[bytes, LineBudget]] = deque()
        if self.written_bytes:
            kept.append(self.pending.popleft())
        for lines, owner in self.pending:
            if owner is budget:
                budget.drop(lines)
                budget.pending_bytes -= len(lines)
            else:
                kept.append((lines, owner))
        self.pending = kept


STDOUT = Stdout()
