"""The metrics process: it adds up what all workers, dead and alive, have counted, on each scrape.

Each worker writes its values to files in `PROMETHEUS_MULTIPROC_DIR`; this process, forked from the master, reads them.
So a scrape costs no worker any time, and no public route shows them.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler

from app.setting_types import HostPort
from app.settings import fail
from app.telemetry.multiprocess import WorkersCollector, claim_directory


def _listen(address: HostPort, directory: Path) -> WSGIServer:
    """Return a server of `GET /metrics` on `host:port`. Raises `OSError` if it cannot listen there."""
    registry = CollectorRegistry()
    registry.register(WorkersCollector(directory))
    metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        status, text = "404 Not Found", b"metrics are at /metrics\n"
        if environ["PATH_INFO"] == "/metrics":
            try:
                return metrics(environ, start_response)
            except Exception:  # wsgiref would print the traceback, which is no line of the log
                logging.getLogger("app.metrics").exception("a scrape failed")
                status, text = "500 Internal Server Error", b"the scrape failed; the log says why\n"
        start_response(status, [("Content-Type", "text/plain")])
        return [text]

    kind: type[WSGIServer] = type(
        "Server", (ThreadingWSGIServer,), {"address_family": address.family}
    )
    return make_server(address.host, address.port, app, kind, _SilentHandler)


class MetricsProcess:
    """Serves `GET /metrics` on `host:port` from a process that is forked from this one."""

    def __init__(self, address: HostPort, directory: Path) -> None:
        """Listen, and take the directory. Raises `SystemExit` with one line that names the setting in the way."""
        try:
            self.server = _listen(address, directory)
        except OSError as error:
            fail("METRICS_BIND", address, f"cannot listen there: {error.strerror}")
        try:
            self.owner = claim_directory(directory)
        except OSError as error:
            why = (
                "another instance uses it" if isinstance(error, BlockingIOError) else error.strerror
            )
            fail("PROMETHEUS_MULTIPROC_DIR", directory, f"{why}; set another directory")
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
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGQUIT,
            signal.SIGUSR1,
            signal.SIGUSR2,
        ):
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
