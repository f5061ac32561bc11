"""The metrics process: it serves the sum of all workers, running and dead.

Each worker writes its values to files in `PROMETHEUS_MULTIPROC_DIR`; this process, forked from the
master, reads them. So a scrape costs the workers no time, and no public route shows the metrics.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from app.setting_types import HostPort
from app.settings import fail
from app.telemetry.control_group import ControlGroupCollector
from app.telemetry.metric_files import retry_writes
from app.telemetry.metrics_directory import remove_abandoned
from app.telemetry.metrics_prefix import PrefixedMetrics
from app.telemetry.multiprocess import WorkersCollector
from app.telemetry.scrape_server import ScrapeServer, WSGIApp

#: How often the process checks that its parent is still running.
PARENT_CHECK_SECONDS = 1.0
#: How often it looks for the directories of killed masters, among all files of /dev/shm and /tmp.
#: A start removes them too.
SEARCH_SECONDS = 60.0
#: The master's signals. A terminal or an init sends them to every process; this one ignores them.
IGNORED_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
#: The signal with which `MetricsProcess.stop` ends the process.
STOP_SIGNAL = signal.SIGALRM

logger = logging.getLogger("app.metrics")


class MetricsProcess:
    """Serves `GET /metrics` on `host:port` from a child process."""

    def __init__(self, address: HostPort, directory: Path, prefix: str = "") -> None:
        """Listen on the address. Each metric's name gets the prefix.

        Raises `SystemExit` with one line that identifies the setting, if that fails.
        """
        self.parent = os.getpid()
        self.workers = WorkersCollector(directory)
        try:
            self.server = ScrapeServer(address, _wsgi_app(prefix, self.workers))
        except OSError as error:
            fail("METRICS_BIND", address, f"cannot listen there: {error.strerror}")
        self.pid = 0
        #: When to look for the directories of killed masters, by `time.monotonic()`.
        self.search_at = 0.0

    def ensure(self, inherited: Iterable[Any] = ()) -> None:
        """Start the process unless it is running. It closes the `inherited` sockets.

        The master calls this once a second, and so also writes its own values here, those of
        metrics that are set when the application is imported.
        """
        retry_writes()
        if self._is_running():
            return
        self.pid = os.fork()
        if self.pid == 0:
            for listener in inherited:
                listener.close()
            self._serve()

    def stop(self) -> None:
        """End the process, and release its address. In a child of the master, do nothing."""
        if os.getpid() != self.parent:
            return
        self.server.socket.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, STOP_SIGNAL)
            os.waitpid(self.pid, 0)

    def _is_running(self) -> bool:
        if self.pid == 0:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _serve(self) -> NoReturn:
        """Serve, in the child, until it is stopped or its parent has ended."""
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(STOP_SIGNAL, _exit)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        while os.getppid() == self.parent:
            self._clean_up()
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(0)

    def _clean_up(self) -> None:
        """Archive the metrics of dead processes, and delete the directories of killed masters."""
        try:
            self.workers.archive_dead()
            if time.monotonic() >= self.search_at:
                self.search_at = time.monotonic() + SEARCH_SECONDS
                remove_abandoned()
        except Exception:  # would end the process, which serves the metrics
            logger.exception("cannot clean up the metrics directory")


def _exit(*_: object) -> NoReturn:
    """End a forked process without the master's `atexit` handlers."""
    os._exit(0)


def _wsgi_app(prefix: str, workers: Collector) -> WSGIApp:
    registry = CollectorRegistry()
    for collector in (workers, ControlGroupCollector()):
        registry.register(PrefixedMetrics(collector, prefix))
    metrics: WSGIApp = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        plain_text = [("Content-Type", "text/plain")]
        if environ["PATH_INFO"] != "/metrics":
            start_response("404 Not Found", plain_text)
            return [b"metrics are at /metrics\n"]
        try:
            return metrics(environ, start_response)
        except Exception:  # wsgiref would print the traceback, which is not a line of JSON
            logger.exception("metrics scrape failed")
            start_response("500 Internal Server Error", plain_text)
            return [b"metrics scrape failed; see the log\n"]

    return app
