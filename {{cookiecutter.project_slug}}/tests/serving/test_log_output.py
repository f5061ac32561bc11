"""The log of the real service: whole lines of JSON without passwords, whatever its reader does."""

import concurrent.futures
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from app.telemetry.access_log import MAX_LINE_BYTES
from scripts.dev_services import Redis
from tests.service_process import Service, eventually, serving

APP = "tests.log_routes:app"
#: More than a pipe holds: 65,536 bytes (Linux, pipe(7)).
LONG = 40_000
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


class Reader:
    """The reading end of the service's stdout. It reads only on request."""

    def __init__(self) -> None:
        self.descriptor, writing_end = os.pipe()
        self.writing_end = os.fdopen(writing_end, "wb")
        self.content = bytearray()
        self.thread = threading.Thread(target=self._read)

    def start(self) -> None:
        """Read until the service has ended."""
        self.writing_end.close()
        self.thread.start()

    def _read(self) -> None:
        while data := os.read(self.descriptor, 1 << 16):
            self.content += data

    def lines(self) -> list[dict[str, Any]]:
        """The lines, once the service has ended. Raises an error for a line that is not JSON."""
        self.thread.join(30)
        return [json.loads(line) for line in self.content.splitlines()]


@contextlib.contextmanager
def pipe() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    os.close(reader.descriptor)


@contextlib.contextmanager
def serving_to(reader: Reader, /, **settings: str) -> Iterator[Service]:
    with serving(APP, 0, reader.writing_end, **settings) as service:
        service.wait()
        yield service


def dropped(service: Service, metric: str) -> int:
    found = re.search(rf"^{metric} (.+)$", service.metrics(), re.MULTILINE)
    return round(float(found[1])) if found else 0


def numbers(lines: list[dict[str, Any]], batch: str = "") -> list[int]:
    return [line["number"] for line in lines if line.get("batch") == batch]


def test_stopped_reader_blocks_no_request(urls: dict[str, str]) -> None:
    """Long access lines and long application lines are kept, then dropped and counted.

    A pipe that is full blocks its writers (POSIX, write): 65,536 bytes on Linux.
    """
    path = "/" + "%F0%9F%90%8D" * 1023
    with pipe() as reader, serving_to(reader, **urls, WEB_CONCURRENCY="1") as service:
        seconds = []
        for _ in range(300):
            start = time.monotonic()
            response = service.get(path, **{"X-Forwarded-For": "x" * 19_000})
            assert response.status_code == 404
            assert service.get(f"/log?count=1&size={LONG}").status_code == 200
            seconds.append(time.monotonic() - start)
        assert max(seconds) < 5
        eventually(lambda: dropped(service, "log_dropped_lines_total") > 0)
        assert service.get("/critical").status_code == 200
        written = dropped(service, "access_log_dropped_lines_total")
        reader.start()
        assert service.stop() == 0
        lines = reader.lines()
    access = [line for line in lines if line["logger"] == "access" and line["status"] == 404]
    assert len(access) + written == 300
    assert 0 < len(numbers(lines)) < 300


def test_reader_that_resumes_gets_every_line(urls: dict[str, str]) -> None:
    """A descriptor is non-blocking for all of its owners (POSIX, open: O_NONBLOCK).

    node and some shells leave it so.
    """
    with pipe() as reader:
        os.set_blocking(reader.writing_end.fileno(), False)
        with serving_to(reader, **urls, WEB_CONCURRENCY="1") as service:
            assert service.get(f"/log?count=200&size={LONG}").status_code == 200
            reader.start()
            eventually(lambda: reader.content.count(b'"batch"') == 200)
            assert dropped(service, "log_dropped_lines_total") == 0
            assert service.stop() == 0
        assert numbers(reader.lines()) == list(range(200))


def test_long_lines_of_two_workers_are_whole(urls: dict[str, str]) -> None:
    """A write of more than PIPE_BUF bytes can be interleaved with others (POSIX, write)."""
    with pipe() as reader, serving_to(reader, **urls) as service:
        reader.start()
        batches: list[str] = []

        def both_workers_log() -> bool:
            """Request more batches; return whether both workers have logged some of these."""
            more = [f"batch-{len(batches) + number}" for number in range(20)]
            batches.extend(more)
            paths = [f"/log?count=20&size={LONG}&name={batch}" for batch in more]
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                responses = list(pool.map(service.get, paths))
            assert {response.status_code for response in responses} == {200}
            return len({response.json() for response in responses}) == 2

        # On a busy machine one worker may accept all connections of a moment.
        eventually(both_workers_log)
        assert service.stop() == 0
        lines = reader.lines()
    for batch in batches:
        assert numbers(lines, batch) == list(range(20))
    assert len({line["pid"] for line in lines if "batch" in line}) == 2


def test_line_of_a_killed_worker_cuts_no_other(urls: dict[str, str]) -> None:
    """The kernel releases the lock of a process that ends (POSIX, fcntl)."""
    with pipe() as reader, serving_to(reader, **urls) as service:
        with contextlib.suppress(Exception):
            service.get("/die-within-a-line")
        reader.start()
        service.wait()
        assert service.stop() == 0
        with contextlib.suppress(json.JSONDecodeError):
            reader.lines()
        lines = reader.content.splitlines()
    cut = [line for line in lines if not line.endswith(b"}")]
    assert len(cut) == 1
    assert cut[0].endswith(b"x")
    assert all(json.loads(line) for line in lines if line != cut[0])


@pytest.mark.parametrize(
    ("method", "path", "header"),
    [
        ("GET", "/" + "%F0%9F%90%8D" * 1023, {}),
        ("GET", "/" + "%01" * 2000, {}),
        ("GET", "/" + "%22" * 2000, {}),
        ("GET", "/nowhere", {"X-Forwarded-For": "x" * 20_000}),
        ("GET", "/nowhere", {"X-Forwarded-For": "\u00ff" * 9_000}),
        ("GET", "/nowhere", {"X-Request-ID": "x" * 20_000}),
        ("PROPPATCH", "/nowhere", {}),
    ],
)
def test_access_line_is_bounded_in_bytes(
    service: Service, method: str, path: str, header: dict[str, str]
) -> None:
    """The size of JSON is that of UTF-8 and escapes (RFC 8259, sections 7 and 8.1)."""
    headers = {name.encode(): value.encode("latin-1") for name, value in header.items()}
    response = service.http.request(method, path, headers=headers)
    request_id = response.headers["x-request-id"]
    eventually(lambda: f'"request_id":"{request_id}"' in service.text)
    lines = [line for line in service.text.splitlines() if request_id in line]
    assert all(len(line.encode()) < MAX_LINE_BYTES for line in lines)
    (access,) = [json.loads(line) for line in lines if '"access"' in line]
    assert access["method"] == method
    assert len(access["path"].encode()) <= 1024


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    """One service for the tests that do not stop it."""
    with serving(APP, **urls, WEB_CONCURRENCY="1") as service:
        service.wait()
        yield service


def lines_during(service: Service, path: str) -> list[dict[str, Any]]:
    """Return the lines that a request writes, its access line last. Each is JSON."""
    start = len(service.text)
    assert service.get(path).status_code == 200
    eventually(lambda: '"logger":"access"' in service.text[start:])
    text = service.text[start:]
    assert "hunter2" not in text
    return [json.loads(line) for line in text.splitlines()]


def test_line_that_cannot_be_formatted_is_written(service: Service) -> None:
    """logging's own handlers print it, with its arguments, to stderr (logging, handleError)."""
    lines = [line for line in lines_during(service, "/log-wrongly") if line["logger"] == "tests"]
    assert [line["level"] for line in lines] == ["error"] * 8
    messages = [line["message"] for line in lines]
    assert messages[:4] == ["too many", "too few %s %s", "wrong type %d", "wrong key %(b)s"]
    for line in lines[:4]:
        assert ":***@" in line["arguments"]
        assert line["format_error"].startswith(("TypeError: ", "KeyError: "))
        assert line["request_id"]
    assert lines[5]["value"] == "<Unprintable that cannot be printed>"
    assert messages[6] == "<Unprintable that cannot be printed>"
    assert lines[7]["exception"]["type"] == "UnprintableError"


def test_printed_text_is_json_without_passwords(service: Service) -> None:
    lines = lines_during(service, "/print")
    printed = [line["message"] for line in lines if line["logger"] == "stdout"]
    assert printed == [
        "printed postgresql://app:***@db/app",
        "unfinished line",
        "printed bytes",
        "flushed",
    ]
    errors = [line["message"] for line in lines if line["logger"] == "stderr"]
    assert "to stderr postgresql://app:***@db/app" in errors
    assert "own handler postgresql://app:***@db/app" in errors
    assert "ValueError: postgresql://app:***@db/app" in errors
    (lonely,) = [line for line in lines if line["logger"] == "tests.lonely"]
    assert lonely["message"] == "no handler postgresql://app:***@db/app"
    assert lonely["level"] == "error"
    assert [line["level"] for line in lines if line["logger"] == "py.warnings"] == ["warning"]
    assert all(line["request_id"] for line in lines)


def test_exceptions_without_a_caller_are_json_without_passwords(service: Service) -> None:
    """sys.unraisablehook, threading.excepthook, and asyncio's exception handler."""
    lines = lines_during(service, "/fail-elsewhere")
    failures = [line for line in lines if "exception" in line]
    assert {line["logger"] for line in failures} == {"app", "asyncio"}
    assert len(failures) == 4


def test_failed_import_is_json_without_passwords(urls: dict[str, str]) -> None:
    """gunicorn prints errors of its start to stderr (gunicorn.app.base)."""
    with serving(APP, **urls, FAIL_AT_IMPORT="1") as failing:
        assert failing.process.wait(60) == 1
        assert "postgresql://app:***@db/app" in json.dumps(failing.lines)
        assert "hunter2" not in failing.text
