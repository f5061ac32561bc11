"""Log lines: one JSON object each for any content, and plain text on a terminal."""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from app.settings import Settings
from app.telemetry import logs
from app.telemetry.access_log import AccessLog
from app.telemetry.context import request_context

ReadLines = Callable[[], list[dict[str, object]]]

CIRCULAR: list[object] = []
CIRCULAR.append(CIRCULAR)


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Iterator[ReadLines]:
    """Configure logging as the service does, and return a reader of its lines.

    Restores the logging of the test run afterwards.
    """
    root = logging.getLogger()
    handlers = root.handlers[:]
    level = root.level
    hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook)
    logs.configure(Settings(log_format="json", service_name="orders"))
    yield lambda: [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root.handlers = handlers
    root.level = level


def test_line_has_the_documented_keys(lines: ReadLines) -> None:
    logging.getLogger("some.library").warning("disk %s", "full", extra={"free_bytes": 0})
    (line,) = lines()
    assert str(line.pop("timestamp")).endswith("Z")
    assert isinstance(line.pop("pid"), int)
    assert line == {
        "level": "warning",
        "logger": "some.library",
        "message": "disk full",
        "service": "orders",
        "free_bytes": 0,
    }


def test_exception_is_an_object(lines: ReadLines) -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("app").exception("failed")
    exception = lines()[0]["exception"]
    assert isinstance(exception, dict)
    assert exception["type"] == "ValueError"
    assert exception["message"] == "a\nb"
    assert exception["traceback"].startswith("Traceback")


def test_extra_cannot_override_reserved_keys(lines: ReadLines) -> None:
    names = ("level", "logger", "service", "pid", "timestamp", "seconds", "request_id")
    logging.getLogger("app").info("odd", extra=dict.fromkeys(names, "forged"))
    (line,) = lines()
    assert line["level"] == "info"
    assert line["logger"] == "app"
    assert line["service"] == "orders"
    assert line["extra_level"] == "forged"
    assert line["seconds"] == "forged"
    assert "request_id" not in line


def test_unprintable_exception_is_logged(lines: ReadLines) -> None:
    try:
        raise UnprintableError
    except UnprintableError:
        logging.getLogger("app").exception("failed", stack_info=True)
    (line,) = lines()
    assert "UnprintableError that cannot be printed" in str(line["exception"])
    assert "Stack" in str(line["stack"])


@pytest.mark.parametrize(
    "value",
    [Unprintable(), CIRCULAR, "\udcff", 2**70, object(), {1: b"x"}, float("nan"), "\x00\r\n"],
)
def test_any_value_is_logged_as_one_json_line(lines: ReadLines, value: object) -> None:
    logging.getLogger("app").info("odd", extra={"value": value})
    assert len(lines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach postgresql://app:hunter2@db:5432/app?sslmode=verify-full",
        "redis://:hunter2@cache",
        "two: a://b:hunter2@c and d://e:hunter2@f",
        "at: a://b:x@hunter2@c",
        "quote: a://b:x'hunter2@c",
    ],
)
def test_password_of_a_url_is_redacted(lines: ReadLines, text: str) -> None:
    try:
        raise OSError(text)
    except OSError:
        logging.getLogger("app").exception("failed: %s", text, extra={"url": text})
    line = json.dumps(lines())
    assert "hunter2" not in line
    assert ":***@" in line


@pytest.mark.parametrize(
    "text",
    [
        'quote: a://b:x"hunter2@c',
        "slash: a://b:x/hunter2@c",
        "Azure: postgres://user@server:hunter2@db/app",
        "GET /?url=redis%3A%2F%2F%3Ahunter2%40cache",
        "GET /?url=redis%253A%252F%252Fuser%253Ahunter2%2540cache",
        r"JSON: redis:\/\/user:hunter2@cache",
        "host=db password=hunter2 user=app",
        "PGPASSWORD=hunter2",
        "{'password': 'hunter2'}",
        '{"password": "hunter2"}',
        "ConnectionParameters(user='app', password='hunter2')",
    ],
)
def test_password_in_other_forms_is_redacted(lines: ReadLines, text: str) -> None:
    """RFC 3986, section 2.1 (percent-encoding) and 3.2.1; libpq's keywords (PostgreSQL, 34.1.1)."""
    logger = logging.getLogger("app")
    logger.info("failed: %s", text)
    logger.info("failed", extra={"value": {"text": text}})
    handler = logs.LineHandler()
    handler.setFormatter(logs.JsonFormatter({"service": "orders"}))
    # Not by the logger: pytest's own handler raises an error for wrong arguments.
    handler.handle(logging.makeLogRecord({"msg": "failed", "args": (text,)}))
    all_lines = lines()
    assert len(all_lines) == 3
    for line in all_lines:
        assert "hunter2" not in str(line)
        assert "***" in str(line)


@pytest.mark.parametrize(
    "text",
    [
        "http://db:5432/items?owner=a@b",
        "https://registry:5000/image@sha256:aa",
        "password: must be longer",
        "50% of a@b",
        "http://host:80\nuser@host",
    ],
)
def test_text_without_a_password_is_kept(lines: ReadLines, text: str) -> None:
    logging.getLogger("app").info("%s", text)
    assert lines()[0]["message"] == text


def test_redaction_is_linear_in_the_size_of_the_text() -> None:
    """Backtracking over a text that a client sends would stop the event loop."""
    parts = ("://a:", "://:", "%3A%2F%2F%3A", "password='", "://a:/", "%25", ":", "passwd")
    for part in parts:
        start = time.process_time()
        logs.redact(part * 10_000 + " @")
        assert time.process_time() - start < 1


def test_line_of_a_request_has_its_request_id(lines: ReadLines) -> None:
    token = request_context.set({"request_id": "abc"})
    logging.getLogger("app").info("inside")
    request_context.reset(token)
    logging.getLogger("app").info("outside")
    assert [line.get("request_id") for line in lines()] == ["abc", None]


def test_uncaught_exceptions_and_warnings_are_logged(lines: ReadLines) -> None:
    error = RuntimeError("boom")
    sys.excepthook(RuntimeError, error, None)
    threading.excepthook(threading.ExceptHookArgs((RuntimeError, error, None, None)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    levels = [line["level"] for line in lines()]
    assert levels == ["critical", "critical", "warning"]


def test_failed_write_is_reported_on_stderr_and_not_raised(
    lines: ReadLines, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def write(_: int, __: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", write)
    logging.getLogger("app").info("lost")
    assert "No space left" in capfd.readouterr().err


def test_lines_are_plain_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.isatty", lambda _: True)
    assert not logs.uses_json(Settings())
    assert logs.uses_json(Settings(log_format="json"))
    formatter = logs.ConsoleFormatter("%(levelname)s %(name)s: %(message)s")
    values = {"name": "app", "levelname": "INFO", "msg": "redis://a:pw@b", "reason": "x"}
    record = logging.makeLogRecord(values)
    assert formatter.format(record) == "INFO app: redis://a:***@b reason=x\n"


async def test_closed_stdout_drops_access_lines_but_no_requests(settings: Settings) -> None:
    """A write to a pipe without a reader fails: the line is dropped and counted."""
    dropped: list[int] = []
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    stdout = os.dup(1)
    try:
        os.dup2(writing_end, 1)
        AccessLog(settings, dropped.append).write({"path": "/"})
    finally:
        os.dup2(stdout, 1)
    assert dropped == [1]
