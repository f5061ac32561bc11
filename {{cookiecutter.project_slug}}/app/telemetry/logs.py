"""Logging: one JSON object per line on stdout, from everything in the process.

On a terminal the lines are plain text.
"""

import contextlib
import io
import json
import logging
import logging.config
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Set
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol

import orjson

from app.telemetry import gcp_logs
from app.telemetry.context import log_keys
from app.telemetry.stdout import LOG_LINES, STDOUT

# A character of a URL in a line of JSON, other than a slash: no white space, and not the end of a
# JSON string, but a quote within one (`\"`).
_CHARACTER = r"""(?:[^/\s"\\]|\\[^nrt])"""
_PASSWORD_PATTERNS = (
    # scheme://user:password@host; with slashes in it, unless that is a port and a path
    r"(?P<url>:\\{0,4}/\\{0,4}/(?:[^/\s:\"\\]|\\[^nrt])*:)"
    rf"(?:{_CHARACTER}*|(?!"
    r"\d{1,5}[/?#]"
    rf")(?:{_CHARACTER}|/(?!/))*)(?=@)",
    # the same, percent-encoded once or more: a URL that is a parameter of another
    r"(?P<encoded>%(?:25)*3A(?:%(?:25)*2F){2}(?:(?!%(?:25)*(?:3A|2F|40))[^\s\"&])*%(?:25)*3A)"
    r"(?:(?!(?:%(?:25)*2F){2})[^\s\"&])*(?=%(?:25)*40)",
    # password=...
    r"(?P<key>passw(?:or)?d=)[^&\s\"',;)\\]+",
    # "password": "...", password='...'
    r"(?P<quoted>passw(?:or)?d(?:\\?[\"'])?\s?[=:]\s?(?P<quote>\\?[\"']))"
    r"(?:(?!(?P=quote))(?:\\.|[^\"\\]))+",
)
#: Each pattern is linear in the size of the text, which a client may have sent.
_PASSWORD = re.compile("|".join(_PASSWORD_PATTERNS), re.IGNORECASE)
_REDACTED = r"\g<url>\g<encoded>\g<key>\g<quoted>***"
#: Keys that only this module sets. An `extra` that is named like one of them, or like a field of
#: `LOG_FIELDS`, gets the prefix `extra_`.
_RESERVED_KEYS = frozenset(
    {"timestamp", "level", "logger", "service", "pid", "request_id", "exception", "stack"}
)
#: Attributes of a record that are not from `extra`: logging's own, its formatters', uvicorn's.
_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
#: Size at which a printed text is logged without a newline.
MAX_UNFINISHED_BYTES = 1 << 16
#: The start of the line with which `app.settings` exits. It stays plain text.
CONFIGURATION_ERROR = "configuration error: "
_JSON_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def _unchanged(entry: dict[str, Any]) -> dict[str, Any]:
    return entry


#: By `LOG_FORMAT`, what a line has in place of its entry; `configure` sets it.
_convert: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged


class LogSettings(Protocol):
    """The settings of the log: those of the service, or a part of them in a process of a pool.

    The part saves such a process the import of all settings and their clients, 20 MB.
    """

    @property
    def service_name(self) -> str: ...  # noqa: D102
    @property
    def log_level(self) -> str: ...  # noqa: D102
    @property
    def log_format(self) -> str: ...  # noqa: D102
    @property
    def log_fields(self) -> Iterable[tuple[str, str]]: ...  # noqa: D102


def redact(text: str) -> str:
    """Hide the passwords in a text or a line of JSON: `redis://user:***@host`."""
    may_have_password = "@" in text or "%" in text or "passw" in text.lower()
    return _PASSWORD.sub(_REDACTED, text) if may_have_password else text


def truncate(text: str, max_bytes: int) -> str:
    """Return the start of a text: at most this many bytes of UTF-8, no half character."""
    return text.encode(errors="replace")[:max_bytes].decode(errors="ignore")


def safe_str(value: object) -> str:
    """Return `str(value)`, or a placeholder if that raises."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a `__str__` may raise anything
        return f"<{type(value).__name__} that cannot be printed>"


def safe_repr(value: object) -> str:
    """Return `repr(value)`, or a placeholder if that raises."""
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - a `__repr__` may raise anything
        return f"<{type(value).__name__} that cannot be printed>"


def format_line(
    seconds: float, level: str, logger: str, message: str, fields: dict[str, Any]
) -> bytes:
    """Return one line of JSON, with the IDs of the current request and span.

    `seconds` is a Unix time.
    """
    entry = {
        "timestamp": _timestamp(seconds),
        "level": level,
        "logger": logger,
        "message": message,
        **fields,
        **log_keys(),
    }
    try:
        entry = _convert(entry)
        return orjson.dumps(entry, default=safe_str, option=_JSON_OPTIONS)
    except Exception:  # noqa: BLE001 - a value can raise anything while it is read
        # orjson rejects lone surrogates, integers over 64 bits, circular and deeply nested values.
        texts = {safe_str(name): safe_str(value) for name, value in entry.items()}
        return json.dumps(texts).encode() + b"\n"


def _timestamp(seconds: float) -> str:
    """Return a Unix time as RFC 3339 in UTC, with milliseconds."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


class LineHandler(logging.Handler):
    """Writes each record to stdout as one line, also if it cannot be formatted."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        error: Exception | None
        try:
            line = self.format(record).encode(errors="backslashreplace")
            is_urgent = (record.levelno or 0) >= logging.CRITICAL
            STDOUT.write(line, LOG_LINES, is_urgent=is_urgent)
            error = STDOUT.take_error()
        except Exception as bug:  # noqa: BLE001 - a line must not stop the service
            error = bug
        if error:
            message = f"log lines are lost: {safe_str(error)}"
            constant = getattr(self.formatter, "constant_fields", {})
            fields = {**constant, "pid": os.getpid()}
            _write_stderr(format_line(time.time(), "error", "app", message, fields))

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; if that fails, as with a wrong argument, its parts.

        logging would print them to stderr, with their passwords.
        """
        try:
            return super().format(record)
        except Exception as error:  # noqa: BLE001 - a `__str__` may raise anything
            return super().format(_printable(record, error))


def _printable(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    """Return a copy of a record that can be formatted, with the error as `format_error`."""
    values = dict(vars(record))
    values["msg"] = safe_str(record.msg)
    values["args"] = ()
    values["arguments"] = safe_repr(record.args)
    values["format_error"] = f"{type(error).__name__}: {safe_str(error)}"
    if not isinstance(record.exc_info, tuple):
        values["exc_info"] = None
    return logging.makeLogRecord(values)


def _write_stderr(line: bytes) -> None:
    """Write a line to the real stderr, unless that would block."""
    stderr = select.poll()
    stderr.register(2, select.POLLOUT)
    with contextlib.suppress(Exception):
        if sys.__stderr__ and stderr.poll(0):
            sys.__stderr__.write(redact(line.decode()))
            sys.__stderr__.flush()


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; each value of `extra` becomes a key."""

    def __init__(self, constant_fields: dict[str, str]) -> None:
        super().__init__()
        self.constant_fields = constant_fields
        self.reserved_keys = _RESERVED_KEYS | constant_fields.keys()

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        extras = _extras(record, self.reserved_keys)
        fields = {**self.constant_fields, "pid": record.process, **extras}
        error = record.exc_info[1] if record.exc_info else None
        if error:
            fields["exception"] = {
                "type": type(error).__qualname__,
                "message": safe_str(error),
                "traceback": _traceback(error),
            }
        if record.stack_info:
            fields["stack"] = record.stack_info
        level = record.levelname.lower()
        line = format_line(record.created, level, record.name, record.getMessage(), fields)
        return redact(line.decode())


def _traceback(error: BaseException) -> str:
    """Return the traceback of an exception; of one that cannot be printed, its frames."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - attributes of an exception may raise anything
        return "".join(traceback.format_tb(error.__traceback__))


class ConsoleFormatter(logging.Formatter):
    """Formats a record as plain text: time, level, logger, message, extra fields."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        fields = _extras(record) | log_keys()
        first_line, *trace = super().format(record).split("\n", 1)
        pairs = [f"{key}={safe_str(value)}" for key, value in fields.items()]
        first_line = " ".join([first_line, *pairs])
        return redact("\n".join([first_line, *trace, ""]))


def _extras(record: logging.LogRecord, reserved_keys: Set[str] = _RESERVED_KEYS) -> dict[str, Any]:
    """Return the `extra` of a record: logging stores it in attributes."""
    extras = {}
    for key, value in vars(record).items():
        if key in reserved_keys:
            extras[f"extra_{key}"] = value
        elif key not in _RECORD_ATTRIBUTES:
            extras[key] = value
    return extras


def uses_json(settings: LogSettings) -> bool:
    """Return whether lines are JSON, which `LOG_FORMAT` decides.

    `auto` means JSON unless stdout is a terminal.
    """
    if settings.log_format == "auto":
        return not os.isatty(1)
    return settings.log_format in {"json", "gcp"}


def constant_fields(settings: LogSettings) -> dict[str, str]:
    """Return the fields that are the same in every line: `service` and those of `LOG_FIELDS`."""
    return {"service": settings.service_name, **dict(settings.log_fields)}


def config(settings: LogSettings) -> dict[str, Any]:
    """Return the `logging.config` dictionary for every logger of the process.

    Those of gunicorn and uvicorn are included. Their access logs are off: the middleware has one.
    """
    json_lines = {"()": JsonFormatter, "constant_fields": constant_fields(settings)}
    console_lines = {
        "()": ConsoleFormatter,
        "fmt": "%(asctime)s %(levelname)-8s %(name)s: %(message)s",
        "datefmt": "%T",
    }
    root = {"level": settings.log_level.upper(), "handlers": ["stdout"]}
    server_log = {**root, "propagate": False}
    off = {"level": "CRITICAL", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": json_lines if uses_json(settings) else console_lines},
        "handlers": {"stdout": {"class": "app.telemetry.logs.LineHandler", "formatter": "line"}},
        "root": root,
        "loggers": {
            "gunicorn.error": server_log,
            "uvicorn.error": server_log,
            "gunicorn.access": off,
            "uvicorn.access": off,
        },
    }


def configure(settings: LogSettings) -> None:
    """Set up logging for this process, with warnings and uncaught exceptions."""
    global _convert
    _convert = gcp_logs.convert if settings.log_format == "gcp" else _unchanged
    logging.config.dictConfig(config(settings))
    logging.captureWarnings(capture=True)
    # For a logger without a handler. logging would print the message alone to stderr.
    logging.lastResort = logging.getLogger().handlers[0]
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def capture_prints(settings: LogSettings) -> None:
    """Turn every line that is printed to stdout and stderr into a log line, if lines are JSON.

    Libraries print, and logging itself does. For a process whose stdout is its log; a command
    line tool such as alembic prints its results there.
    """
    if uses_json(settings):
        sys.stdout = _PrintedLines(settings, "stdout", "info", 1).text
        sys.stderr = _PrintedLines(settings, "stderr", "warning", 2).text


class _PrintedLines(io.BufferedIOBase):
    """Writes each line of text to the log, as a stream for `sys.stdout` or `sys.stderr`.

    Not with a logger: a handler that fails would print, and so log, and so fail.
    """

    def __init__(self, settings: LogSettings, name: str, level: str, descriptor: int) -> None:
        self.log_name = name
        self.level = level
        self.descriptor = descriptor
        self.constant_fields = constant_fields(settings)
        self.unfinished = threading.local()
        buffer: Any = self
        self.text = io.TextIOWrapper(buffer, "utf-8", "backslashreplace", write_through=True)

    def writable(self) -> bool:
        """Return True: `TextIOWrapper` asks."""
        return True

    def fileno(self) -> int:
        """Return the descriptor of the real stream, for a child process or a C library."""
        return self.descriptor

    def write(self, data: Any) -> int:
        """Log complete lines; keep the rest, for each thread, until its line is complete."""
        content = bytes(data)
        text = getattr(self.unfinished, "text", b"") + content
        *lines, rest = text.split(b"\n")
        if len(rest) > MAX_UNFINISHED_BYTES:
            lines.append(rest)
            rest = b""
        self.unfinished.text = rest
        for line in lines:
            self._log(line)
        return len(content)

    def flush(self) -> None:
        """Log what this thread has printed without a newline."""
        rest = getattr(self.unfinished, "text", b"")
        self.unfinished.text = b""
        self._log(rest)

    def _log(self, line: bytes) -> None:
        text = line.decode(errors="backslashreplace")
        if text.startswith(CONFIGURATION_ERROR):
            _write_stderr(line + b"\n")
        elif text.strip():
            fields = {**self.constant_fields, "pid": os.getpid()}
            entry = format_line(time.time(), self.level, self.log_name, text, fields)
            STDOUT.write(redact(entry.decode()).encode(), LOG_LINES)


def _log_uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    logging.getLogger("app").critical("uncaught exception", exc_info=error)


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if not issubclass(args.exc_type, SystemExit):  # ignored, as `threading.excepthook` documents
        text = "uncaught exception in a thread"
        logging.getLogger("app").critical(text, exc_info=args.exc_value)


def _log_unraisable(args: Any) -> None:
    """Log an exception that nothing can catch, such as one in `__del__`."""
    logging.getLogger("app").critical("unraisable exception", exc_info=args.exc_value)
