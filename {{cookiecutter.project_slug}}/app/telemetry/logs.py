"""Logging: one JSON object per line on stdout, from everything in the process.

On a terminal the lines are plain text.
"""

import json
import logging
import logging.config
import os
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import orjson

from app.settings import Settings
from app.telemetry.context import request_context

#: The password in `scheme://user:password@host`, or in a query: `?password=...`.
_PASSWORD = re.compile(r"(://[^/\s:\"]*:)[^/\s\"]*(?=@)|(?<=[?&])(password=)[^&\s\"]+")
#: Keys that only this module sets; an `extra` of the same name gets the prefix `extra_`.
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
_JSON_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS


def redact(text: str) -> str:
    """Hide the password of every URL in a text: `redis://user:***@host`."""
    may_have_password = "@" in text or "password=" in text
    return _PASSWORD.sub(r"\1\2***", text) if may_have_password else text


def safe_str(value: object) -> str:
    """Return `str(value)`, or a placeholder if that raises."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a `__str__` may raise anything
        return f"<{type(value).__name__} that cannot be printed>"


def format_line(
    seconds: float, level: str, logger: str, message: str, fields: dict[str, Any]
) -> bytes:
    """Return one line of JSON, with the IDs of the current request.

    `seconds` is a Unix time.
    """
    entry = {
        "timestamp": _timestamp(seconds),
        "level": level,
        "logger": logger,
        "message": message,
        **fields,
        **(request_context.get() or {}),
    }
    try:
        return orjson.dumps(entry, default=safe_str, option=_JSON_OPTIONS)
    except TypeError:
        # orjson rejects lone surrogates, integers over 64 bits, circular and deeply nested values.
        texts = {name: safe_str(value) for name, value in entry.items()}
        return json.dumps(texts).encode() + b"\n"


def _timestamp(seconds: float) -> str:
    """Return a Unix time as RFC 3339 in UTC, with milliseconds."""
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def write_stdout(data: bytes) -> None:
    """Write to stdout with one write(2).

    So lines of several processes do not mix on a pipe. Raises `OSError`.
    """
    while data:
        written = os.write(1, data)
        data = data[written:]


class LineHandler(logging.Handler):
    """Writes each formatted record to stdout at once."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        try:
            write_stdout(self.format(record).encode(errors="backslashreplace"))
        except Exception:  # noqa: BLE001 - as in the standard library: a line must not stop the service
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; each value of `extra` becomes a key."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        fields = {"service": self.service, "pid": record.process, **_extras(record)}
        error = record.exc_info[1] if record.exc_info else None
        if error:
            fields["exception"] = {
                "type": type(error).__qualname__,
                "message": safe_str(error),
                "traceback": "".join(traceback.format_exception(error)),
            }
        if record.stack_info:
            fields["stack"] = record.stack_info
        level = record.levelname.lower()
        line = format_line(record.created, level, record.name, record.getMessage(), fields)
        return redact(line.decode())


class ConsoleFormatter(logging.Formatter):
    """Formats a record as plain text: time, level, logger, message, extra fields."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        fields = _extras(record) | (request_context.get() or {})
        first_line, *trace = super().format(record).split("\n", 1)
        first_line = " ".join([first_line, *(f"{key}={value}" for key, value in fields.items())])
        return redact("\n".join([first_line, *trace, ""]))


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """Return the `extra` of a record: logging stores it in attributes."""
    extras = {}
    for key, value in vars(record).items():
        if key in _RESERVED_KEYS:
            extras[f"extra_{key}"] = value
        elif key not in _RECORD_ATTRIBUTES:
            extras[key] = value
    return extras


def uses_json(settings: Settings) -> bool:
    """Return whether lines are JSON, which `LOG_FORMAT` decides.

    `auto` means JSON unless stdout is a terminal.
    """
    if settings.log_format == "auto":
        return not os.isatty(1)
    return settings.log_format == "json"


def config(settings: Settings) -> dict[str, Any]:
    """Return the `logging.config` dictionary for every logger of the process.

    Those of gunicorn and uvicorn are included. Their access logs are off: the middleware has one.
    """
    json_lines = {"()": JsonFormatter, "service": settings.service_name}
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


def configure(settings: Settings) -> None:
    """Set up logging for this process, with warnings and uncaught exceptions."""
    logging.config.dictConfig(config(settings))
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def _log_uncaught(_: type[BaseException], error: BaseException, __: TracebackType | None) -> None:
    logging.getLogger("app").critical("uncaught exception", exc_info=error)


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    logging.getLogger("app").critical("uncaught exception in a thread", exc_info=args.exc_value)


def _log_unraisable(args: Any) -> None:
    """Log an exception that nothing can catch, such as one in `__del__`."""
    logging.getLogger("app").critical("unraisable exception", exc_info=args.exc_value)
