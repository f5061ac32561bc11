"""The service as a real process: started, asked over sockets, stopped, and its output read."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from scripts.dev_services import free_port

PROJECT = Path(__file__).parent.parent
DEADLINE_SECONDS = (
    30.0  # a start takes 10 where others run their tests too; under GRACEFUL_TIMEOUT_SECONDS
)


def eventually(look: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until `look` returns something true; a connection error counts as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if look():
                return
        time.sleep(0.05)
    msg = f"not within {seconds} s"
    raise AssertionError(msg)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process and its children, as a machine does that swaps or a network that drops everything."""
    parent = psutil.Process(pid)
    parent.suspend()  # first, or it has another child meanwhile
    family = [*parent.children(recursive=True), parent]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


class Running:
    """A process that runs, and what it has printed."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def stop(self, number: int = signal.SIGTERM, seconds: float = DEADLINE_SECONDS) -> int:
        """Signal it and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    @property
    def text(self) -> str:
        """Everything printed so far; a seek would move the place where the process writes, too."""
        number = self.output.fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All whole lines printed so far; fails on one that is not JSON."""
        return [
            json.loads(line) for line in self.text.splitlines(keepends=True) if line.endswith("\n")
        ]


class Service(Running):
    """A running gunicorn with the service."""

    def __init__(
        self, app: str | None, port: int, stdout: IO[bytes] | None, /, **settings: str
    ) -> None:
        self.port, self.metrics_port = port or free_port(), free_port()
        self.output = stdout or tempfile.TemporaryFile()  # noqa: SIM115 - closed by serving()
        addresses = {
            "BIND": f"127.0.0.1:{self.port}",
            "METRICS_BIND": f"127.0.0.1:{self.metrics_port}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *([app] if app else [])],
            cwd=PROJECT,
            env=os.environ | {"WEB_CONCURRENCY": "2", "DRAIN_SECONDS": "0"} | addresses | settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        # A new connection each time, so that any worker may answer. Not by a limit of idle ones: with threads, httpx
        # can close a connection just when it gives it to the next request.
        every_one_new = {"Connection": "close"}
        address = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=address, timeout=DEADLINE_SECONDS, headers=every_one_new)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Ask over a connection of its own."""
        return self.http.get(path, headers=headers)

    def metrics(self) -> str:
        """Scrape the metrics."""
        return self.http.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text

    def wait_for_workers(self, number: int = 2) -> None:
        """Wait until so many workers have started, those that have ended included."""
        eventually(lambda: self.text.count("Application startup complete.") == number)

    def wait(
        self, path: str = "/health/ready", status: int = 200, seconds: float = DEADLINE_SECONDS
    ) -> None:
        """Wait until a path answers with a status, or fail."""

        def answers() -> bool:
            assert self.process.poll() is None, self.text
            return self.get(path).status_code == status

        eventually(answers, seconds)


@contextlib.contextmanager
def serving(
    app: str | None = None, port: int = 0, stdout: IO[bytes] | None = None, /, **settings: str
) -> Iterator[Service]:
    """Run the service, or another app in its place, and end it, whatever happens; port 0 is any that is free."""
    service = Service(app, port, stdout, **settings)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.stop()
        service.http.close()
        service.output.close()
