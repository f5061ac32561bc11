"""The service as a real process: its start, its sockets, its signals, its output."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from app.settings import Settings
from scripts.dev_services import free_port
from tests import default_token
from tests.patience import slowness
from tests.streams import Event, parse_events

PROJECT = Path(__file__).parent.parent
#: A start needs 10 s on a machine that runs other tests. Less than GRACEFUL_TIMEOUT_SECONDS.
DEADLINE_SECONDS = 30.0


def eventually(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until `condition` returns something true; a connection error counts as false.

    `seconds` are those of a machine that runs nothing else: on a busy one they are more.
    """
    start = time.monotonic()
    while time.monotonic() < start + seconds * slowness():
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        time.sleep(0.05)
    msg = f"not within {time.monotonic() - start:.1f} s"
    raise AssertionError(msg)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Suspend a process and its children for the duration of the block.

    To its clients it looks like a machine that swaps or a network that drops every packet.
    """
    parent = psutil.Process(pid)
    # First, or it could start another child meanwhile.
    parent.suspend()
    processes = [*parent.children(recursive=True), parent]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


class Running:
    """A running process and its output."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def stop(self, number: int = signal.SIGTERM, seconds: float = DEADLINE_SECONDS) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds * slowness())

    @property
    def text(self) -> str:
        """The output so far.

        Read without a seek, which would also move the position at which the process writes.
        """
        number = self.output.fileno()
        return os.pread(number, os.fstat(number).st_size, 0).decode()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The complete lines so far. Raises an error for a line that is not JSON."""
        lines = self.text.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def messages(self) -> list[str]:
        """The message of each line so far."""
        return [line["message"] for line in self.lines]


class Service(Running):
    """gunicorn with the service, or with another application."""

    def __init__(
        self,
        app: str | None,
        port: int,
        stdout: IO[bytes] | None,
        prefix: Sequence[str],
        /,
        **settings: str,
    ) -> None:
        self.port = port or free_port()
        self.metrics_port = free_port()
        # `serving` closes it.
        self.output = stdout or tempfile.TemporaryFile()  # noqa: SIM115
        command = [*prefix, sys.executable, "-m", "gunicorn"]
        if app:
            command.append(app)
        variables = default_token.settings | settings
        defaults = {
            "WEB_CONCURRENCY": "2",
            "DRAIN_SECONDS": "0",
            "BIND": f"127.0.0.1:{self.port}",
            "METRICS_BIND": f"127.0.0.1:{self.metrics_port}",
            # Or else each start logs a warning.
            "AUTH_DISABLED": str("AUTH_ISSUER" not in os.environ | variables).lower(),
        }
        self.process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=os.environ | defaults | variables,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        # A new connection for each request, so that any worker may serve it. Not by a limit of
        # idle connections: with threads, httpx can close one while it gives it to a request.
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Connection": "close", **default_token.headers},
            timeout=DEADLINE_SECONDS * slowness(),
        )

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Send a GET request over a new connection."""
        return self.http.get(path, headers=headers)

    @contextlib.contextmanager
    def events(self, path: str, **headers: str) -> Iterator[Iterator[Event]]:
        """Open a stream of server-sent events; yield them, and disconnect after the block."""
        with self.http.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200, response.read()
            yield parse_events(response.iter_lines())

    def websocket(self, path: str, **headers: str) -> Connection:
        """Open a WebSocket, a context manager with `send` and `recv`."""
        url = f"ws://127.0.0.1:{self.port}{path}"
        all_headers = default_token.headers | headers
        return connect(url, additional_headers=all_headers, open_timeout=DEADLINE_SECONDS)

    def metrics(self, strip_prefix: bool = True) -> str:
        """Scrape the metrics; without the prefix that is the default of `METRICS_PREFIX`."""
        text = self.http.get(f"http://127.0.0.1:{self.metrics_port}/metrics").text
        prefix = Settings.model_fields["metrics_prefix"].default
        if strip_prefix and prefix:
            text = re.sub(rf"^(# \w+ )?{prefix}", r"\1", text, flags=re.MULTILINE)
        return text

    def wait_for_workers(self, number: int = 2) -> None:
        """Wait until this number of workers have started, including those that have exited."""
        eventually(lambda: self.text.count("Application startup complete.") == number)

    def wait(
        self, path: str = "/health/ready", status: int = 200, seconds: float = DEADLINE_SECONDS
    ) -> None:
        """Wait until a path responds with this status. Fails if the process exits."""

        def responds() -> bool:
            assert self.process.poll() is None, self.text
            return self.get(path).status_code == status

        eventually(responds, seconds)


@contextlib.contextmanager
def serving(
    app: str | None = None,
    port: int = 0,
    stdout: IO[bytes] | None = None,
    prefix: Sequence[str] = (),
    /,
    **settings: str,
) -> Iterator[Service]:
    """Run the service, or another application, and stop it after the block.

    Port 0 is any free port. `prefix` is a command that runs gunicorn by `exec`.
    """
    service = Service(app, port, stdout, prefix, **settings)
    try:
        yield service
    finally:
        try:
            if service.process.poll() is None:
                service.stop()
        finally:
            service.process.kill()
            service.http.close()
            service.output.close()
