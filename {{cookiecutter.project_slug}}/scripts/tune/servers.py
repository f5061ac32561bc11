"""The processes of `make tune`: the API, a worker, and temporary servers of its own."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import psutil

from scripts import dev_services
from scripts.dev_services import POSTGRES_SETTINGS, Postgres, free_port

PROJECT = Path(__file__).parents[2]
START_SECONDS = 60
STOP_SECONDS = 60
#: The URLs of the environment are those of servers that others may use.
URLS = ("DATABASE_URL", "REDIS_URL", "AMQP_URL", "SECRETS_DIR")
MEGABYTE = 1e6


class TuneError(Exception):
    """The measurement is not possible. The message is one line with the reason."""


class Process:
    """A process of the service, in the block."""

    def __init__(self, module: str, ready_port: int, variables: Mapping[str, str]) -> None:
        """`ready_port` is that of its probes."""
        self.module = module
        self.ready_port = ready_port
        self.variables = variables

    async def __aenter__(self) -> Self:
        self._start()
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def _start(self) -> None:
        # `__aexit__` closes it.
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=PROJECT,
            env=self.variables,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            # Ctrl-C must not reach it before this process stops it. It stays in this session: Linux
            # divides the CPU time among sessions first, and priorities count within one.
            process_group=0,
        )

    async def __aexit__(self, *_: object) -> None:
        """Stop it with its children."""
        processes = self.family()
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, STOP_SECONDS)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.output.close()

    async def _wait_until_ready(self) -> None:
        url = f"http://127.0.0.1:{self.ready_port}/health/ready"
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            self.check()
            try:
                await asyncio.to_thread(urllib.request.urlopen, url, None, 2)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return
        msg = f"{self.module} was not ready within {START_SECONDS} s: {self.last_line}"
        raise TuneError(msg)

    def check(self) -> None:
        """Raise `TuneError` if the process has exited."""
        if self.process.poll() is not None:
            msg = f"{self.module} exited with {self.process.returncode}: {self.last_line}"
            raise TuneError(msg)

    @property
    def last_line(self) -> str:
        """The last line of its output."""
        size = os.fstat(self.output.fileno()).st_size
        text = os.pread(self.output.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
        return text.strip().rpartition("\n")[2]

    def family(self) -> list[psutil.Process]:
        """Return the process and its children, as far as they run."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process and its children so far."""
        total = 0.0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory_mb(self) -> float:
        """Return the memory of the process and its children; shared pages count once."""
        total = 0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                # Not every system has the proportional set size.
                total += getattr(memory, "pss", memory.uss)
        return total / MEGABYTE


class Servers(NamedTuple):
    """Servers of this run alone, with the migrations applied."""

    postgres: Postgres
    variables: dict[str, str]

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.postgres.url

    def api(self, port: int) -> Process:
        """Return the API, with one worker process."""
        own = {
            "WEB_CONCURRENCY": "1",
            "BIND": f"127.0.0.1:{port}",
            "METRICS_BIND": f"127.0.0.1:{free_port()}",
            "DRAIN_SECONDS": "0",
        }
        return Process("gunicorn", port, self.variables | own)

    def worker(self, processes: int, concurrency: int) -> Process:
        """Return a worker that does jobs."""
        port = free_port()
        own = {
            "JOB_PROCESSES": str(processes),
            "JOB_CONCURRENCY": str(concurrency),
            "METRICS_BIND": f"127.0.0.1:{port}",
        }
        return Process("app.jobs_main", port, self.variables | own)


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    """Run temporary servers during the block.

    Postgres waits for the disk at each commit, as in production.
    """
    with tempfile.TemporaryDirectory(prefix="tune-", ignore_cleanup_errors=True) as directory:
        postgres = Postgres(Path(directory))
        postgres.settings = POSTGRES_SETTINGS | {"synchronous_commit": "on"}
        postgres.start()
        try:
            with dev_services.redis() as redis:
                variables = _variables(postgres.url, redis.url)
                _migrate(variables)
                yield Servers(postgres, variables)
        finally:
            postgres.stop()


def _variables(database_url: str, redis_url: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in URLS}
    # Of another run of the service.
    inherited.pop("PROMETHEUS_MULTIPROC_DIR", None)
    own = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "ENVIRONMENT": "development",
        "LOG_LEVEL": "warning",
    }
    return inherited | own


def _migrate(variables: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    done = subprocess.run(
        command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        msg = f"alembic upgrade head failed: {lines[-1]}"
        raise TuneError(msg)
