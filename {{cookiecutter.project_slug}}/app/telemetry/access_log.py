"""Access lines: collected, and written together, since one write(2) for each costs more than making it."""

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

#: A pipe takes up to so many bytes whole, so that lines of several processes do not mix (POSIX, PIPE_BUF).
CHUNK_BYTES = select.PIPE_BUF if hasattr(select, "PIPE_BUF") else 512
#: What may wait for a reader that does not read; beyond it lines are dropped, and counted.
MAX_PENDING_BYTES = 1 << 20
#: For which the end waits for a reader, at each part.
CLOSE_MS = 500


class AccessLog:
    """Writes one line for each request, within `ACCESS_LOG_FLUSH_MS`."""

    def __init__(self, settings: Settings, dropped: Callable[[int], None]) -> None:
        """Take what is to be told the number of lines that were dropped."""
        self.logger = logging.getLogger("access")
        self.is_enabled = self.logger.isEnabledFor(logging.INFO)
        self.writes_json = logs.uses_json(settings)
        self.delay_seconds = settings.access_log_flush_ms / 1000
        self.dropped = dropped
        constant: dict[str, Any] = {"level": "info", "logger": "access", "message": "request"}
        constant |= {"service": settings.service_name, "pid": os.getpid()}
        self.constant = b'Z",' + orjson.dumps(constant)[1:-1] + b","
        self.second, self.head = 0, b""  # the start of a line changes once a second
        self.chunk = bytearray()
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self.timer: asyncio.TimerHandle | None = None
        self.stdout = select.poll()
        self.stdout.register(1, select.POLLOUT)

    def write(self, fields: dict[str, Any]) -> None:
        """Write a line with these fields, which must be what JSON knows; at once with a delay of 0."""
        if not self.is_enabled:
            return
        if not self.writes_json:
            self.logger.info("%(method)s %(path)r %(status)d %(duration_ms).1f ms", fields)
            return
        now = time.time()
        second = int(now)
        if second != self.second:
            self.second = second
            self.head = time.strftime(
                '{"timestamp":"%Y-%m-%dT%H:%M:%S.', time.gmtime(second)
            ).encode()
        line = b"%b%03d%b%b\n" % (
            self.head,
            (now - second) * 1000,
            self.constant,
            orjson.dumps(fields)[1:],
        )
        if len(self.chunk) + len(line) > CHUNK_BYTES:
            self._seal_chunk()
        self.chunk += line
        if not self.delay_seconds:
            self.flush()
        elif self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(self.delay_seconds, self.flush)

    def _seal_chunk(self) -> None:
        """Pass on what is full. A reader that does not read must not stop the service."""
        if self.pending_bytes < MAX_PENDING_BYTES:
            self.pending.append(bytes(self.chunk))
            self.pending_bytes += len(self.chunk)
        else:
            self.dropped(self.chunk.count(b"\n"))
        self.chunk.clear()
        self._write_pending()

    def _write_pending(self) -> None:
        written = 0
        for chunk in self.pending:
            if not self.stdout.poll(0):
                break
            try:
                logs.write_stdout(chunk)
            except OSError:  # nobody will ever read it
                self.dropped(chunk.count(b"\n"))
            written += 1
            self.pending_bytes -= len(chunk)
        del self.pending[:written]

    def flush(self) -> None:
        """Write all lines, as far as somebody reads them."""
        self.timer = None
        if self.chunk:
            self._seal_chunk()
        else:
            self._write_pending()
        if self.pending:
            self.timer = asyncio.get_running_loop().call_later(
                max(self.delay_seconds, 0.1), self.flush
            )

    def close(self) -> None:
        """Write what is left, as long as it is read; what is not is dropped, and counted."""
        self.flush()
        while self.pending and self.stdout.poll(CLOSE_MS):
            self._write_pending()
        for chunk in self.pending:
            self.dropped(chunk.count(b"\n"))
        self.pending.clear()
