"""Access lines: collected, and written together.

A write(2) for each line costs more than to make the line.
"""

import asyncio
import logging
import os
import select
import time
from collections.abc import Callable
from typing import Any

import orjson

from app.settings import Settings
from app.telemetry import logs

#: Maximum size of a write that a pipe accepts whole, so that lines of several processes do not mix
#: (POSIX, PIPE_BUF).
CHUNK_BYTES = select.PIPE_BUF if hasattr(select, "PIPE_BUF") else 512
#: Limit for chunks that wait for a slow reader. Beyond it, lines are dropped and counted.
MAX_PENDING_BYTES = 1 << 20
#: Pause before pending chunks are written again, at least.
MIN_RETRY_SECONDS = 0.1
#: Time limit at shutdown for the reader, per chunk.
CLOSE_MS = 500


class AccessLog:
    """Writes one line for each request, within `ACCESS_LOG_FLUSH_MS`.

    Lines are collected in `chunk`. A full chunk becomes `pending`, and is written when stdout
    accepts it: a reader that stalls must not stall the service.
    """

    def __init__(self, settings: Settings, dropped: Callable[[int], None]) -> None:
        """`dropped` is called with the number of lines that were dropped."""
        self.logger = logging.getLogger("access")
        self.is_enabled = self.logger.isEnabledFor(logging.INFO)
        self.writes_json = logs.uses_json(settings)
        self.delay_seconds = settings.access_log_flush_ms / 1000
        self.dropped = dropped
        # A line is: its time down to the second, the milliseconds, constant keys, the fields.
        self.second = 0
        self.time_prefix = b""
        self.constant_keys = _constant_keys(settings)
        self.chunk = bytearray()
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.timer: asyncio.TimerHandle | None = None
        self.stdout = select.poll()
        self.stdout.register(1, select.POLLOUT)

    def write(self, fields: dict[str, Any]) -> None:
        """Write a line with these fields, at once if the delay is 0.

        Their values must be JSON types.
        """
        if not self.is_enabled:
            return
        if not self.writes_json:
            self.logger.info("%(method)s %(path)r %(status)d %(duration_ms).1f ms", fields)
            return
        now = time.time()
        second = int(now)
        if second != self.second:
            self._start_second(second)
        line = b"%b%03d%b%b\n" % (
            self.time_prefix,
            (now - second) * 1000,
            self.constant_keys,
            orjson.dumps(fields)[1:],
        )
        if len(self.chunk) + len(line) > CHUNK_BYTES:
            self._seal_chunk()
        self.chunk += line
        if not self.delay_seconds:
            self.flush()
        elif self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(self.delay_seconds, self.flush)

    def flush(self) -> None:
        """Write all lines, as far as stdout accepts them."""
        self.timer = None
        if self.chunk:
            self._seal_chunk()
        else:
            self._write_pending()
        if self.pending:
            delay_seconds = max(self.delay_seconds, MIN_RETRY_SECONDS)
            self.timer = asyncio.get_running_loop().call_later(delay_seconds, self.flush)

    def close(self) -> None:
        """Write the remaining lines; drop and count those that stdout does not accept."""
        self.flush()
        while self.pending and self.stdout.poll(CLOSE_MS):
            self._write_pending()
        for chunk in self.pending:
            self.dropped(chunk.count(b"\n"))
        self.pending.clear()

    def _start_second(self, second: int) -> None:
        """Render the time of the lines of this second, once for all of them."""
        self.second = second
        template = '{"timestamp":"%Y-%m-%dT%H:%M:%S.'
        self.time_prefix = time.strftime(template, time.gmtime(second)).encode()

    def _seal_chunk(self) -> None:
        """Move the chunk to the pending ones, or drop it at their limit; then write them."""
        if self.pending_bytes < MAX_PENDING_BYTES:
            self.pending.append(bytes(self.chunk))
            self.pending_bytes += len(self.chunk)
        else:
            self.dropped(self.chunk.count(b"\n"))
        self.chunk.clear()
        self._write_pending()

    def _write_pending(self) -> None:
        """Write the pending chunks until stdout would block."""
        written = 0
        for chunk in self.pending:
            if not self.stdout.poll(0):
                break
            try:
                logs.write_stdout(chunk)
            except OSError:  # the reader is gone
                self.dropped(chunk.count(b"\n"))
            written += 1
            self.pending_bytes -= len(chunk)
        del self.pending[:written]


def _constant_keys(settings: Settings) -> bytes:
    """Return the part between the milliseconds and the fields."""
    keys: dict[str, Any] = {
        "level": "info",
        "logger": "access",
        "message": "request",
        "service": settings.service_name,
        "pid": os.getpid(),
    }
    without_braces = orjson.dumps(keys)[1:-1]
    return b'Z",' + without_braces + b","
