"""The metrics process: it adds up what all workers, dead and alive, have counted, on each scrape.

Each worker writes its values to files in `PROMETHEUS_MULTIPROC_DIR`; this process, forked from the master, reads them.
So a scrape costs no worker any time, and no public route shows them.
"""

import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import IO, Any
from wsgiref.simple_server import WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.metrics import FOLD_SECONDS


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, operation)
        yield


def prepare(folder: Path) -> IO[str]:
    """Make the folder and empty it of an earlier run's files. Keep what this returns: it keeps other instances out.

    Raises `OSError` if the folder cannot be used, or is another instance's: the two would erase each other's counts.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = (folder / ".owner").open("a")
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner.close()
        raise
    for file in folder.glob("*.db"):
        file.unlink()
    return owner


def fold(folder: Path, pid: int) -> None:
    """Add a dead worker's counts to the archive and delete its files; what a killed one left half-written is lost.

    prometheus_client keeps the files of the dead for ever: after 1,000 recycled workers a scrape takes 1.5 s.
    """
    with _locked(folder, fcntl.LOCK_EX):
        for file in folder.glob(f"*_{pid}.db"):
            kind, values = file.name.split("_")[0], []
            try:
                values = list(MmapedDict.read_all_values_from_file(str(file)))
            except Exception:
                logging.getLogger("app.metrics").exception("the counts in %s are lost", file.name)
            if values and kind != "gauge":  # a gauge ends with its process
                archive = MmapedDict(str(folder / f"{kind}_archive.db"))
                for key, value, _, _ in values:
                    archive.write_value(key, archive.read_value(key)[0] + value, 0.0)
                archive.close()
            file.unlink()


class AllWorkers(Collector):
    """Collects the values of all workers, dead and alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterable[Metric]:  # noqa: D102
        time.sleep(1.5 * FOLD_SECONDS)  # what was answered before the scrape is in it
        with _locked(self.folder, fcntl.LOCK_SH):
            return list(MultiProcessCollector(None, str(self.folder)).collect())


def _listen(address: str, folder: Path) -> WSGIServer:
    """Return a server of `GET /metrics` on `host:port`. Raises `OSError` if it cannot listen there."""
    registry = CollectorRegistry()
    registry.register(AllWorkers(folder))
    metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"metrics are at /metrics\n"]

    host, _, port = address.rpartition(":")
    family = {"address_family": AF_INET6 if "[" in host else AF_INET}
    kind: type[WSGIServer] = type("Server", (ThreadingWSGIServer,), family)
    return make_server(host.strip("[]"), int(port), app, kind, _SilentHandler)


class MetricsProcess:
    """Serves `GET /metrics` on `host:port` from a process that is forked from this one."""

    def __init__(self, address: str, folder: Path) -> None:
        """Listen, and take the folder. Raises `SystemExit` with one line that names the setting in the way."""
        try:
            self.server = _listen(address, folder)
        except OSError as error:
            sys.exit(f"configuration error: METRICS_BIND={address}: cannot listen there: {error.strerror}")
        try:
            self.owner = prepare(folder)
        except OSError as error:
            why = "another instance uses it" if isinstance(error, BlockingIOError) else error.strerror
            sys.exit(f"configuration error: PROMETHEUS_MULTIPROC_DIR={folder}: {why}; name another folder")
        self.pid = 0

    def ensure(self, inherited: Iterable[Any] = ()) -> None:
        """Start it, unless it runs. It closes the sockets that it has inherited, and ends with its parent."""
        if self._is_running():
            return
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            return
        for listener in inherited:
            listener.close()
        # Signals are the master's, and a terminal or an init sends them to all: nobody sends this one.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    def _is_running(self) -> bool:
        try:
            if self.pid:
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return self.pid != 0

    def stop(self) -> None:
        """End it, and free its address."""
        self.server.socket.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGALRM)
            os.waitpid(self.pid, 0)
        self.owner.close()
