"""Every line is one JSON object, whatever is logged; on a terminal lines are for people."""

import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest

from app.settings import Settings
from app.telemetry import logs
from app.telemetry.access_log import AccessLog
from app.telemetry.context import request_context

Read = Callable[[], list[dict[str, object]]]


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Iterator[Read]:
    """Configure logging as the service does, put everything back, and return a reader of the lines."""
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook, sys.unraisablehook)
    handlers, level = root.handlers[:], root.level
    logs.configure(Settings(log_format="json", service_name="orders"))
    yield lambda: [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    root.handlers, root.level = handlers, level


def test_a_line_has_the_agreed_keys(lines: Read) -> None:
    logging.getLogger("some.library").warning("disk %s", "full", extra={"free_bytes": 0})
    (line,) = lines()
    assert str(line.pop("timestamp")).endswith("Z")
    assert isinstance(line.pop("pid"), int)
    expected = {
        "level": "warning",
        "logger": "some.library",
        "message": "disk full",
        "service": "orders",
        "free_bytes": 0,
    }
    assert line == expected


def test_an_exception_is_an_object(lines: Read) -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("app").exception("failed")
    exception = lines()[0]["exception"]
    assert isinstance(exception, dict)
    assert (exception["type"], exception["message"]) == ("ValueError", "a\nb")
    assert exception["traceback"].startswith("Traceback")


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)


def test_fields_of_a_caller_do_not_pass_for_our_own(lines: Read) -> None:
    names = ("level", "logger", "service", "pid", "timestamp", "seconds", "request_id")
    logging.getLogger("app").info("odd", extra=dict.fromkeys(names, "forged"))
    (line,) = lines()
    assert (line["level"], line["logger"], line["service"]) == ("info", "app", "orders")
    assert line["extra_level"] == line["seconds"] == "forged"
    assert "request_id" not in line


def test_an_exception_that_cannot_be_printed_is_a_line_all_the_same(lines: Read) -> None:
    class EvilError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    try:
        raise EvilError
    except EvilError:
        logging.getLogger("app").exception("failed", stack_info=True)
    (line,) = lines()
    assert "EvilError that cannot be printed" in str(line["exception"])
    assert "Stack" in str(line["stack"])


@pytest.mark.parametrize(
    "value", [Unprintable(), CIRCLE, "\udcff", 2**70, object(), {1: b"x"}, float("nan"), "\x00\r\n"]
)
def test_whatever_is_logged_is_one_line_of_json(lines: Read, value: object) -> None:
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
def test_the_password_of_a_url_is_hidden(lines: Read, text: str) -> None:
    try:
        raise OSError(text)
    except OSError:
        logging.getLogger("app").exception("failed: %s", text, extra={"url": text})
    line = json.dumps(lines())
    assert "hunter2" not in line
    assert ":***@" in line


def test_a_line_of_a_request_carries_its_id(lines: Read) -> None:
    token = request_context.set({"request_id": "abc"})
    logging.getLogger("app").info("inside")
    request_context.reset(token)
    logging.getLogger("app").info("outside")
    assert [line.get("request_id") for line in lines()] == ["abc", None]


def test_uncaught_exceptions_and_warnings_are_lines_too(lines: Read) -> None:
    error = RuntimeError("boom")
    sys.excepthook(RuntimeError, error, None)
    threading.excepthook(threading.ExceptHookArgs((RuntimeError, error, None, None)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    levels = [line["level"] for line in lines()]
    assert levels == ["critical", "critical", "warning"]


def test_a_handler_that_cannot_write_does_not_stop_the_service(
    lines: Read, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(_: int, __: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    logging.getLogger("app").info("lost")
    assert "No space left" in capfd.readouterr().err


def test_on_a_terminal_lines_are_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.isatty", lambda _: True)
    settings = Settings()
    assert not logs.uses_json(settings)
    assert logs.uses_json(Settings(log_format="json"))
    formatter = logs.ConsoleFormatter("%(levelname)s %(name)s: %(message)s")
    record = logging.makeLogRecord(
        {"name": "app", "levelname": "INFO", "msg": "redis://a:pw@b", "reason": "x"}
    )
    assert formatter.format(record) == "INFO app: redis://a:***@b reason=x\n"


async def test_a_reader_that_is_gone_costs_lines_and_no_request(settings: Settings) -> None:
    dropped: list[int] = []
    reading, writing = os.pipe()
    os.close(reading)
    stdout = os.dup(1)
    try:
        os.dup2(writing, 1)
        AccessLog(settings, dropped.append).write({"path": "/"})
    finally:
        os.dup2(stdout, 1)
    assert dropped == [1]
