"""Logging: one JSON object per line on stdout from everything in the process; readable lines on a terminal."""

import json
import logging
import logging.config
import os
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson

from app.settings import Settings
from app.telemetry.context import request_context

_PASSWORD = re.compile(r"(://[^/\s:\"]*:)[^/\s\"]*(?=@)|(?<=[?&])(password=)[^&\s\"]+")
_OWN = frozenset(
    {"timestamp", "level", "logger", "service", "pid", "request_id", "exception", "stack"}
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


def redact(text: str) -> str:
    """Hide the password of every URL in a text: `redis://user:***@host`."""
    return _PASSWORD.sub(r"\1\2***", text) if "@" in text or "password=" in text else text


def safe_str(value: object) -> str:
    """Return `str(value)`, whatever that raises."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - it is somebody's __str__
        return f"<{type(value).__name__} that cannot be printed>"


def format_line(
    seconds: float, level: str, logger: str, message: str, fields: dict[str, Any]
) -> bytes:
    """Return one line of JSON. `seconds` is a Unix time; the fields of the request are added."""
    time = (
        datetime.fromtimestamp(seconds, UTC)
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )
    head = {"timestamp": time, "level": level, "logger": logger, "message": message}
    entry = head | fields | (request_context.get() or {})
    try:
        return orjson.dumps(
            entry, default=safe_str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
        )
    except (
        TypeError
    ):  # what orjson refuses: a lone surrogate, an integer over 64 bits, a circle, a deep nest
        return json.dumps({name: safe_str(value) for name, value in entry.items()}).encode() + b"\n"


def write_stdout(data: bytes) -> None:
    """Write a line to stdout with one write(2), so that lines of several processes do not mix on a pipe."""
    while data:
        data = data[os.write(1, data) :]


class LineHandler(logging.Handler):
    """Writes each formatted record to stdout at once."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        try:
            write_stdout(self.format(record).encode(errors="backslashreplace"))
        except Exception:  # noqa: BLE001 - as every handler of the standard library: a line must not stop the service
            self.handleError(record)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; what was passed as `extra` becomes keys of their own."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        fields: dict[str, Any] = {"service": self.service, "pid": record.process, **_extras(record)}
        if record.exc_info and (error := record.exc_info[1]):
            trace = "".join(traceback.format_exception(error))
            fields["exception"] = {
                "type": type(error).__qualname__,
                "message": safe_str(error),
                "traceback": trace,
            }
        if record.stack_info:
            fields["stack"] = record.stack_info
        message = record.getMessage()
        return redact(
            format_line(
                record.created, record.levelname.lower(), record.name, message, fields
            ).decode()
        )


class ConsoleFormatter(logging.Formatter):
    """Formats a record for a person: time, level, logger, message, then the extra fields."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        fields = _extras(record) | (request_context.get() or {})
        head, *trace = super().format(record).split("\n", 1)
        head = " ".join([head, *(f"{key}={value}" for key, value in fields.items())])
        return redact("\n".join([head, *trace, ""]))


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    found = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    return {f"extra_{key}" if key in _OWN else key: value for key, value in found.items()}


def uses_json(settings: Settings) -> bool:
    """Tell whether lines are JSON: as `LOG_FORMAT` says; `auto` means JSON unless stdout is a terminal."""
    return settings.log_format == "json" or (settings.log_format == "auto" and not os.isatty(1))


def config(settings: Settings) -> dict[str, Any]:
    """Return the `logging.config` dictionary for every logger of the process, gunicorn's and uvicorn's included."""
    console = {
        "()": ConsoleFormatter,
        "fmt": "%(asctime)s %(levelname)-8s %(name)s: %(message)s",
        "datefmt": "%T",
    }
    json_lines = {"()": JsonFormatter, "service": settings.service_name}
    root = {"level": settings.log_level.upper(), "handlers": ["stdout"]}
    own, off = root | {"propagate": False}, {"level": "CRITICAL", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": json_lines if uses_json(settings) else console},
        "handlers": {"stdout": {"class": "app.telemetry.logs.LineHandler", "formatter": "line"}},
        "root": root,  # the access lines are observe.py's
        "loggers": {
            "gunicorn.error": own,
            "uvicorn.error": own,
            "gunicorn.access": off,
            "uvicorn.access": off,
        },
    }


def configure(settings: Settings) -> None:
    """Set up logging for this process; warnings and uncaught exceptions become lines too."""
    logging.config.dictConfig(config(settings))
    logging.captureWarnings(capture=True)
    critical = logging.getLogger("app").critical
    sys.excepthook = lambda _, error, __: critical("uncaught exception", exc_info=error)
    threading.excepthook = lambda args: critical(
        "uncaught exception in a thread", exc_info=args.exc_value
    )
    sys.unraisablehook = lambda args: critical("unraisable exception", exc_info=args.exc_value)
