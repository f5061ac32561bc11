"""The servers that are measured: how each is started, watched and ended."""

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
END_SECONDS = 10
MEGABYTE = 1 << 20
#: All that servers get of this process' environment, so that nobody's settings steer them.
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")


def environment(**settings: str) -> dict[str, str]:
    """Return a clean environment with these settings."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | settings


def fetch(
    url: str,
    method: str = "GET",
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Return status and body of an answer; 0 where there was none."""
    fields = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, body, fields, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def pss_mb(process: psutil.Process) -> float:
    """Return the proportional set size: memory of its own, and its share of what it has in common with others."""
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {process.pid}: no Pss in smaps_rollup")


def listens(process: psutil.Process, port: int) -> bool:
    """Tell whether a process listens on a port."""
    sockets = process.net_connections(kind="tcp")
    return any(
        socket.status == psutil.CONN_LISTEN and socket.laddr.port == port for socket in sockets
    )


@dataclass
class Server:
    """One gunicorn: started and answering within `with`, ended with all its processes after it."""

    name: str
    command: list[str]
    folder: Path
    port: int
    path: str
    settings: dict[str, str] = field(default_factory=dict)
    #: What ends it. The service drains for ten seconds on SIGTERM, and ends at once on SIGINT.
    end_with: int = signal.SIGTERM

    def __enter__(self) -> Self:
        """Start it, and wait for the first 200."""
        start = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=environment(**self.settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours, and we end it
        )
        self.said: deque[bytes] = deque(maxlen=2)
        threading.Thread(target=self._read, daemon=True).start()
        try:
            while fetch(self.url)[0] != 200:
                self.check()
                if time.monotonic() > start + START_SECONDS:
                    raise BenchError(
                        f"{self.name}: no 200 from {self.path} in {START_SECONDS} s: {self.last_words}"
                    )
                time.sleep(0.005)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.start_seconds = time.monotonic() - start
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all its processes."""
        if self.process.poll() is not None:
            return
        tree = self.tree()
        self.process.send_signal(self.end_with)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        for process in psutil.wait_procs(tree, 1)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _read(self) -> None:
        """Read what it writes, as a log collector does; keep the end, in case it is needed."""
        assert self.process.stdout
        while part := os.read(self.process.stdout.fileno(), 65536):
            self.said.append(part)
        self.process.stdout.close()

    @property
    def url(self) -> str:
        """Where the measured route is."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    @property
    def last_words(self) -> str:
        """The last line it wrote."""
        lines = b"".join(self.said).decode(errors="replace").split("\n")
        return next(
            (line.strip()[:300] for line in reversed(lines) if line.strip()), "it wrote nothing"
        )

    def check(self) -> None:
        """Raise `BenchError` if it has ended."""
        if (code := self.process.poll()) is not None:
            time.sleep(0.1)  # for what it wrote
            raise BenchError(f"{self.name}: ended with exit code {code}: {self.last_words}")

    def tree(self) -> list[psutil.Process]:
        """Return its processes, the master first."""
        master = psutil.Process(self.process.pid)
        return [master, *master.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return what all its processes have used, user and system, with those that have ended since the start."""
        master = psutil.Process(self.process.pid).cpu_times()
        total = master.children_user + master.children_system
        for process in self.tree():
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # then it is in the master's sum next time
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory(self) -> dict[str, float]:
        """Return megabytes: RSS of a worker, PSS of the workers, of the master and of the metrics process."""
        master, *others = self.tree()
        workers = [process for process in others if listens(process, self.port)]
        metrics = [process for process in others if process not in workers]
        used = {"worker_rss_mb": max(worker.memory_info().rss for worker in workers) / MEGABYTE}
        if sys.platform == "linux":
            used |= {"workers_pss_mb": sum(map(pss_mb, workers)), "master_pss_mb": pss_mb(master)}
            used |= {"metrics_pss_mb": sum(map(pss_mb, metrics))}
        return used
