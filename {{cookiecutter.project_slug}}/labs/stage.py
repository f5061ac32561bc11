"""The stage of a lab: its processes, its own Postgres and Redis, and a limit of time.

Everything has free ports and temporary directories, so that labs run side by side. Everything ends
with the lab.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil

from app.settings import Settings
from labs.claims import Claims
from labs.picture import Picture
from scripts import dev_services, dev_watch
from scripts.dev_services import Postgres, free_port

PROJECT = Path(__file__).parents[1]
START_SECONDS = 60
STOP_SECONDS = 40
#: A lab that needs longer is stopped.
LIMIT_SECONDS = 110


class LabError(Exception):
    """The lab cannot run. The message is one line with the reason."""


class Process:
    """A process of a lab, with its output in a file."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], output: Path) -> None:
        self.output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C must not reach it before the stage stops it.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The pid."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not exited."""
        return self.process.poll() is None

    @property
    def text(self) -> str:
        """The output so far."""
        return self.output.read_text(errors="replace")

    def check(self) -> None:
        """Raise `LabError` if it has exited."""
        if not self.is_running:
            last = self.text.strip().rpartition("\n")[2]
            msg = f"a process exited with {self.process.returncode}: {last}"
            raise LabError(msg)

    def send(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(seconds)

    def family(self) -> list[psutil.Process]:
        """Return the process and its children, as far as they run."""
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill it with its children; nothing happens if it has exited."""
        family = self.family()
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()
        wait_until(lambda: all(map(has_ended, family)), "killed processes end")


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended. A container may have no init that removes zombies."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Instance(Process):
    """One instance of the service: gunicorn with its workers, on a port of its own."""

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], output: Path, port: int
    ) -> None:
        super().__init__(command, variables, output)
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.metrics_url = f"http://{variables['METRICS_BIND']}/metrics"

    def wait_until_ready(self, path: str = "/health/ready") -> None:
        """Wait until a path responds with 2xx. Raises `LabError`."""
        wait_until(lambda: self._responds(path), f"{self.url}{path} responds", START_SECONDS)

    def _responds(self, path: str) -> bool:
        self.check()
        return status(f"{self.url}{path}") in range(200, 300)


def status(url: str, seconds: float = 2) -> int:
    """Return the status of a GET request; 0 without a response within the time."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def wait_until(condition: Callable[[], object], name: str, seconds: float = START_SECONDS) -> None:
    """Wait until the condition holds. Raises `LabError` with its name after the time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            msg = f"not within {seconds:g} s: {name}"
            raise LabError(msg)
        time.sleep(0.05)


class Ports(NamedTuple):
    """The ports of a process that a live view shows."""

    service: int
    metrics: int


class Stage:
    """The means of a lab: processes that end with it, claims, pictures, and text."""

    def __init__(self, stack: contextlib.ExitStack, say: Callable[[str], None]) -> None:
        self.claims = Claims()
        self.picture: Picture | None = None
        self.said: list[str] = []
        self.directory = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="lab-", ignore_cleanup_errors=True)
            )
        )
        self.started = 0
        self._stack = stack
        self._say = say

    def say(self, text: str = "") -> None:
        """Print a line of the result; it is written to the text file, too."""
        self.said.append(text)
        self._say(text)

    @cached_property
    def postgres(self) -> Postgres:
        """A Postgres server of this lab, with the migrations applied."""
        server = self._stack.enter_context(dev_services.postgres())
        command = [sys.executable, "-m", "alembic", "upgrade", "head"]
        variables = clean_environment() | {"DATABASE_URL": server.url}
        done = subprocess.run(
            command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            msg = f"alembic upgrade head failed: {done.stderr.strip().rpartition(chr(10))[2]}"
            raise LabError(msg)
        return server

    @cached_property
    def redis_url(self) -> str:
        """The URL of a Redis server of this lab: a real one if it is on PATH, else a fake one."""
        return self._stack.enter_context(dev_services.redis()).url

    def variables(self, **settings: str) -> dict[str, str]:
        """Return the environment of a process of the service."""
        own = {
            "DATABASE_URL": self.postgres.url,
            "REDIS_URL": self.redis_url,
            "ENVIRONMENT": "development",
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "warning",
            "METRICS_BIND": f"127.0.0.1:{free_port()}",
        }
        return clean_environment() | own | settings

    def watch(self, *, is_worker: bool = False) -> Ports:
        """Return ports for the process that readers want to see; with WATCH=1, a page shows it.

        The processes of a lab may take turns on these ports: the page shows the next one. A worker
        has its probes and its metrics on the same port.
        """
        metrics = free_port()
        service = metrics if is_worker else free_port()
        url = f"http://127.0.0.1:{service}"
        self._stack.enter_context(dev_watch.showing(url, [f"127.0.0.1:{metrics}"]))
        return Ports(service, metrics)

    def start(self, *command: str, variables: Mapping[str, str] | None = None) -> Process:
        """Start a process."""
        environment = self.variables() if variables is None else variables
        process = Process(command, environment, self._next_output())
        self._stack.callback(process.kill)
        return process

    def serve(
        self,
        app: str = "",
        *,
        port: int = 0,
        ports: Ports | None = None,
        options: str = "",
        **settings: str,
    ) -> Instance:
        """Start the service, or another application, under gunicorn; return before it is ready.

        `ports` are those of `watch`. `options` are gunicorn's: `--config FILE` serves with other
        workers.
        """
        if ports:
            port = ports.service
            settings["METRICS_BIND"] = f"127.0.0.1:{ports.metrics}"
        port = port or free_port()
        own = {"BIND": f"127.0.0.1:{port}", "WEB_CONCURRENCY": "1", "DRAIN_SECONDS": "0"}
        variables = self.variables(**own | settings) | {"GUNICORN_CMD_ARGS": options}
        command = [sys.executable, "-m", "gunicorn", *([app] if app else [])]
        instance = Instance(command, variables, self._next_output(), port)
        self._stack.callback(instance.kill)
        return instance

    def serve_usual(self, *, ports: Ports | None = None, **settings: str) -> Instance:
        """Start the same application with the usual worker, see labs/usual.py."""
        options = "--config python:labs.usual"
        return self.serve("app.main:app", port=0, ports=ports, options=options, **settings)

    def _next_output(self) -> Path:
        self.started += 1
        return self.directory / f"output-{self.started}"


def clean_environment() -> dict[str, str]:
    """Return the environment without the settings of the service: a lab has its own."""
    own = {name.upper() for name in Settings.model_fields} | {"GUNICORN_CMD_ARGS"}
    return {name: value for name, value in os.environ.items() if name not in own}


@contextlib.contextmanager
def open_stage(say: Callable[[str], None], limit: float = LIMIT_SECONDS) -> Iterator[Stage]:
    """Yield a stage; stop all that it has started after the block.

    SIGTERM and the limit of time end the block, too. Raises `LabError`.
    """
    previous = {
        signal.SIGALRM: signal.signal(signal.SIGALRM, _too_long),
        signal.SIGTERM: signal.signal(signal.SIGTERM, _stop),
    }
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.ExitStack() as stack:
            yield Stage(stack, say)
            # The end must not be interrupted.
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooLong:
        msg = f"not done within {limit:g} s; stop other programs, and run it again"
        raise LabError(msg) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


class _TooLong(BaseException):
    """The limit has passed. Not an `Exception`, which a task of a lab could catch."""


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise _TooLong


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
