"""Access lines: bounded in size, collected, and written together."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import orjson

from app.settings import Settings
from app.telemetry import logs
from app.telemetry.stdout import ACCESS_LINES, STDOUT

#: Size of the lines that are written together. A write costs 10 us, with its lock.
CHUNK_BYTES = 16_384
#: Maximum size of a line.
MAX_LINE_BYTES = 4096
#: Maximum size of a text in a line that would be larger, in bytes of JSON. If that is not enough,
#: half of it, and so on.
MAX_TEXT_BYTES = 1024


class AccessLog:
    """Writes one line for each request, within `ACCESS_LOG_FLUSH_MS`.

    Lines are collected in `chunk`, which is written when it is full: a write(2) for each line
    costs more than to make the line.
    """

    def __init__(self, settings: Settings, dropped: Callable[[int], None]) -> None:
        """`dropped` is called with the number of lines that were dropped."""
        self.logger = logging.getLogger("access")
        self.is_enabled = self.logger.isEnabledFor(logging.INFO)
        self.writes_json = logs.uses_json(settings)
        self.constant_fields = logs.constant_fields(settings)
        if settings.log_format == "gcp":
            self._format = self._format_gcp  # type: ignore[method-assign]
        self.delay_seconds = settings.access_log_flush_ms / 1000
        self.dropped = dropped
        # A line is: its time down to the second, the milliseconds, constant keys, the fields.
        self.second = 0
        self.time_prefix = b""
        self.constant_keys = _constant_keys(settings)
        self.chunk = bytearray()
        self.timer: asyncio.TimerHandle | None = None
        with contextlib.suppress(OSError):  # closed; each line is counted as dropped
            STDOUT.follow_redirection()

    def write(self, fields: dict[str, Any], max_text_bytes: int = MAX_TEXT_BYTES) -> None:
        """Write a line with these fields, at once if the delay is 0.

        Their values must be JSON types. If the line is larger than `MAX_LINE_BYTES`, its texts are
        truncated to `max_text_bytes`: a client chooses its method, its path and `X-Forwarded-For`.
        """
        if not self.is_enabled:
            return
        if not self.writes_json:
            self.logger.info("%(method)s %(path)r %(status)d %(duration_ms).1f ms", fields)
            return
        line = self._format(fields)
        if len(line) > MAX_LINE_BYTES and max_text_bytes:
            self.write(_truncate_texts(fields, max_text_bytes), max_text_bytes // 2)
            return
        if len(self.chunk) + len(line) > CHUNK_BYTES:
            self._write_chunk()
        self.chunk += line
        if not self.delay_seconds:
            self.flush()
        elif self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(self.delay_seconds, self.flush)

    def flush(self) -> None:
        """Write all lines, as far as stdout accepts them."""
        self.timer = None
        self._write_chunk()

    def close(self) -> None:
        """Write the remaining lines; drop and count those that stdout does not accept."""
        self.flush()
        STDOUT.drain(ACCESS_LINES)
        self._count_dropped()

    def _format(self, fields: dict[str, Any]) -> bytes:
        now = time.time()
        second = int(now)
        if second != self.second:
            self._start_second(second)
        return b"%b%03d%b%b\n" % (
            self.time_prefix,
            (now - second) * 1000,
            self.constant_keys,
            orjson.dumps(fields)[1:],
        )

    def _format_gcp(self, fields: dict[str, Any]) -> bytes:
        all_fields = {**self.constant_fields, "pid": os.getpid(), **fields}
        return logs.format_line(time.time(), "info", "access", "request", all_fields)

    def _start_second(self, second: int) -> None:
        """Render the time of the lines of this second, once for all of them."""
        self.second = second
        template = '{"timestamp":"%Y-%m-%dT%H:%M:%S.'
        self.time_prefix = time.strftime(template, time.gmtime(second)).encode()

    def _write_chunk(self) -> None:
        """Write the chunk, or have it written as soon as stdout accepts it."""
        if self.chunk:
            STDOUT.write(bytes(self.chunk), ACCESS_LINES)
            self.chunk.clear()
        self._count_dropped()

    def _count_dropped(self) -> None:
        dropped = ACCESS_LINES.take_dropped()
        if dropped:
            self.dropped(dropped)


def _constant_keys(settings: Settings) -> bytes:
    """Return the part between the milliseconds and the fields."""
    keys: dict[str, Any] = {
        "level": "info",
        "logger": "access",
        "message": "request",
        **logs.constant_fields(settings),
        "pid": os.getpid(),
    }
    without_braces = orjson.dumps(keys)[1:-1]
    return b'Z",' + without_braces + b","


def _truncate_texts(fields: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """Return the fields, each text truncated to this size in JSON."""
    return {
        key: _truncate_json(value, max_bytes) if isinstance(value, str) else value
        for key, value in fields.items()
    }


def _truncate_json(text: str, max_bytes: int) -> str:
    """Return the start of a text, at most this size in JSON: a control character is six bytes."""
    start = logs.truncate(text, max_bytes)
    while len(orjson.dumps(start)) - 2 > max_bytes:
        start = start[: len(start) * 3 // 4]
    return start
