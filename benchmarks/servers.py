"""The measured servers: start, observe and stop each."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from benchmarks import BenchError

START_SECONDS = 30
STOP_SECONDS = 10
FETCH_SECONDS = 5
MEGABYTE = 1 << 20
#: The only variables that servers inherit, so that local settings do not affect the figures.
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


def environment(**settings: str) -> dict[str, str]:
    """Return a clean environment with these settings."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return inherited | settings


def fetch(
    url: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Return status and body of a response; status 0 if there was none."""
    all_headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, body, all_headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def pss_mb(process: psutil.Process) -> float:
    """Return the proportional set size: private memory plus a share of the shared memory."""
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {process.pid}: no Pss in smaps_rollup")


def listens(process: psutil.Process, port: int) -> bool:
    """Return whether a process listens on a port."""
    for socket in process.net_connections(kind="tcp"):
        if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port:
            return True
    return False


@dataclass
class Server:
    """One gunicorn: it serves inside the `with` block, and stops with all its processes after."""

    name: str
    command: list[str]
    directory: Path
    port: int
    path: str
    settings: dict[str, str] = field(default_factory=dict)
    #: On SIGTERM the service drains for ten seconds; on SIGINT it stops at once.
    stop_signal: int = signal.SIGTERM

    def __enter__(self) -> Self:
        """Start the server, and wait for its first 200."""
        start = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.directory,
            env=environment(**self.settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C must not reach it: this process stops it.
            start_new_session=True,
        )
        self.output: deque[bytes] = deque(maxlen=2)
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._wait_for_200(start + START_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.start_seconds = time.monotonic() - start
        return self

    def _wait_for_200(self, deadline: float) -> None:
        while fetch(self.url)[0] != 200:
            self.check()
            if time.monotonic() > deadline:
                timing = f"no 200 from {self.path} within {START_SECONDS} s"
                raise BenchError(f"{self.name}: {timing}: {self.last_line}")
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        """Stop the server with all its processes."""
        if self.process.poll() is not None:
            return
        processes = self.processes()
        self.process.send_signal(self.stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        alive = psutil.wait_procs(processes, timeout=1)[1]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _read(self) -> None:
        """Read the output as a log collector does; keep the last two chunks for error messages."""
        assert self.process.stdout
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            self.output.append(chunk)
        self.process.stdout.close()

    @property
    def url(self) -> str:
        """The URL of the measured route."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def last_line(self) -> str:
        """The last line of the output."""
        lines = b"".join(self.output).decode(errors="replace").split("\n")
        for line in reversed(lines):
            if line.strip():
                return line.strip()[:300]
        return "no output"

    def check(self) -> None:
        """Raise `BenchError` if the server has exited."""
        code = self.process.poll()
        if code is not None:
            time.sleep(0.1)  # for its last output
            raise BenchError(f"{self.name}: exited with code {code}: {self.last_line}")

    def processes(self) -> list[psutil.Process]:
        """Return its processes, the master first."""
        master = psutil.Process(self.process.pid)
        return [master, *master.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return user and system time of all its processes, including exited ones."""
        exited = psutil.Process(self.process.pid).cpu_times()
        total = exited.children_user + exited.children_system
        for process in self.processes():
            # A process that exits meanwhile is part of the master's sum the next time.
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def workers(self) -> list[psutil.Process]:
        """Return the processes that serve."""
        _, *others = self.processes()
        return [process for process in others if listens(process, self.port)]

    def worker_cpu_ms(self, seconds: float) -> float:
        """Return the milliseconds of CPU that its only worker uses per second, over some time."""
        (worker,) = self.workers()
        before = worker.cpu_times()
        time.sleep(seconds)
        after = worker.cpu_times()
        return (after.user + after.system - before.user - before.system) * 1000 / seconds

    def memory(self) -> dict[str, float]:
        """Return megabytes: RSS of a worker; PSS of workers, master and metrics process."""
        master, *others = self.processes()
        workers = self.workers()
        metrics = [process for process in others if process not in workers]
        largest = max(worker.memory_info().rss for worker in workers)
        used = {"worker_rss_mb": largest / MEGABYTE}
        if sys.platform == "linux":
            used["workers_pss_mb"] = sum(map(pss_mb, workers))
            used["master_pss_mb"] = pss_mb(master)
            used["metrics_pss_mb"] = sum(map(pss_mb, metrics))
        return used
