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
PART_BYTES = select.PIPE_BUF if hasattr(select, "PIPE_BUF") else 512
#: What may wait for a reader that does not read; beyond it lines are dropped, and counted.
MAX_WAITING_BYTES = 1 << 20
#: For which the end waits for a reader, at each part.
CLOSE_MS = 500


class AccessLog:
    """Writes one line for each request, within `ACCESS_LOG_FLUSH_MS`."""

    def __init__(self, settings: Settings, dropped: Callable[[int], None]) -> None:
        """Take what is to be told the number of lines that were dropped."""
        self.logger = logging.getLogger("access")
        self.is_enabled = self.logger.isEnabledFor(logging.INFO)
        self.writes_json = logs.wants_json(settings)
        self.delay_seconds = settings.access_log_flush_ms / 1000
        self.dropped = dropped
        constant: dict[str, Any] = {"level": "info", "logger": "access", "message": "request"}
        constant |= {"service": settings.service_name, "pid": os.getpid()}
        self.constant = b'Z",' + orjson.dumps(constant)[1:-1] + b","
        self.second, self.head = 0, b""  # the start of a line changes once a second
        self.part = bytearray()
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
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
            self.head = time.strftime('{"timestamp":"%Y-%m-%dT%H:%M:%S.', time.gmtime(second)).encode()
        line = b"%b%03d%b%b\n" % (self.head, (now - second) * 1000, self.constant, orjson.dumps(fields)[1:])
        if len(self.part) + len(line) > PART_BYTES:
            self._end_part()
        self.part += line
        if not self.delay_seconds:
            self.flush()
        elif self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(self.delay_seconds, self.flush)

    def _end_part(self) -> None:
        """Pass on what is full. A reader that does not read must not stop the service."""
        if self.waiting_bytes < MAX_WAITING_BYTES:
            self.waiting.append(bytes(self.part))
            self.waiting_bytes += len(self.part)
        else:
            self.dropped(self.part.count(b"\n"))
        self.part.clear()
        self._write_waiting()

    def _write_waiting(self) -> None:
        written = 0
        for part in self.waiting:
            if not self.stdout.poll(0):
                break
            try:
                logs.write(part)
            except OSError:  # nobody will ever read it
                self.dropped(part.count(b"\n"))
            written += 1
            self.waiting_bytes -= len(part)
        del self.waiting[:written]

    def flush(self) -> None:
        """Write all lines, as far as somebody reads them."""
        self.timer = None
        if self.part:
            self._end_part()
        else:
            self._write_waiting()
        if self.waiting:
            self.timer = asyncio.get_running_loop().call_later(max(self.delay_seconds, 0.1), self.flush)

    def close(self) -> None:
        """Write what is left, as long as it is read; what is not is dropped, and counted."""
        self.flush()
        while self.waiting and self.stdout.poll(CLOSE_MS):
            self._write_waiting()
        for part in self.waiting:
            self.dropped(part.count(b"\n"))
        self.waiting.clear()
