"""Run the service for development: uvicorn with auto-reload, Postgres and Redis included.

Usage: `python -m scripts.dev [--no-reload]`. Without reload it is one process, for a debugger.
"""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

from app.settings import Settings, load_settings
from app.telemetry import metrics_directory
from app.telemetry.logs import redact
from scripts import (
    addresses,
    dev_environment,
    dev_issuer,
    dev_reload,
    dev_server,
    dev_traces,
    dev_watch,
)
from scripts.dev_consumer import consuming  # example
from scripts.dev_worker import working  # jobs
from scripts.parent import Parent

DEFAULTS = {"ENVIRONMENT": "development", "WEB_CONCURRENCY": "1", "DRAIN_SECONDS": "0"}


class Signals:
    """The signals that end this command. None interrupts the start or the stop of the servers."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: list[int] = []
        self.is_serving = False
        for number in self.NUMBERS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.is_serving and number == signal.SIGHUP:
            # uvicorn handles only the other two.
            signal.raise_signal(signal.SIGTERM)
            return
        self.received.append(number)
        if self.is_serving:
            self.is_serving = False
            sys.exit(0)

    def serve(self, listener: socket.socket) -> None:
        """Serve in this process until a signal, even one before uvicorn handles them."""
        self.is_serving = True
        try:
            if not self.received:
                dev_server.serve(listener)
        finally:
            self.is_serving = False


def main() -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP. Raises `SystemExit` if something cannot start."""
    parent = Parent()
    signals = Signals()
    os.environ.update(DEFAULTS)
    load_settings()  # an invalid one stops it before anything is started
    with _servers() as started:
        if signals.received or not dev_reload.migrate():
            sys.exit(1)
        with _listening(started) as listener:
            if "--no-reload" in sys.argv:
                signals.serve(listener)
            else:
                dev_reload.Reloader(listener, parent, lambda: bool(signals.received)).run()


@contextlib.contextmanager
def _servers() -> Iterator[set[str]]:
    """Run Postgres and Redis during the block; yield the settings of those that it started."""
    with dev_environment.environment() as variables:
        # Those that are set are in the environment, or in a file of SECRETS_DIR.
        started = {
            name for name in dev_environment.URLS if name in variables and not os.environ.get(name)
        }
        os.environ.update(variables)
        yield started


@contextlib.contextmanager
def _listening(started: set[str]) -> Iterator[socket.socket]:
    """Yield the socket of the service; its metrics and its consumer run during the block."""
    os.environ["BIND"] = addresses.free_address("BIND", load_settings().bind)
    with contextlib.ExitStack() as stack:
        stack.enter_context(serving_metrics())
        traces = stack.enter_context(dev_traces.tracing())
        tokens = stack.enter_context(dev_issuer.issuing())
        settings = load_settings()
        listener = stack.enter_context(addresses.listen(settings.bind))
        _print_guide(settings, started, traces, tokens)
        stack.enter_context(consuming())  # example
        stack.enter_context(working(is_reloading="--no-reload" not in sys.argv))  # jobs
        stack.enter_context(dev_watch.watching(settings))
        yield listener


@contextlib.contextmanager
def serving_metrics() -> Iterator[None]:
    """Run the metrics process during the block, on the next free port."""
    directory = metrics_directory.claim(None)
    with contextlib.ExitStack() as stack:
        stack.callback(directory.release)
        # prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported.
        from app.telemetry.metrics_server import MetricsProcess

        address = addresses.free_address("METRICS_BIND", load_settings().metrics_bind)
        os.environ["METRICS_BIND"] = address
        metrics = MetricsProcess(address, directory.path, load_settings().metrics_prefix)
        metrics.ensure()
        stack.callback(metrics.stop)
        yield


def _print_guide(settings: Settings, started: set[str], traces: str, tokens: str) -> None:
    """Print the addresses. Passwords are shown only of the servers that this command started.

    `started` has the settings that are the URLs of those servers.
    """
    base = f"http://{settings.bind}{settings.root_path}"
    urls = {"DATABASE_URL": settings.database_url, "REDIS_URL": settings.redis_url}
    shown = {
        name: url.get_secret_value() if name in started else redact(url.get_secret_value())
        for name, url in urls.items()
    }
    sys.stdout.write(
        f"\n  service   {base}/\n"
        f"  docs      {base}/docs\n"
        f"  metrics   http://{settings.metrics_bind}/metrics\n"
        f"  traces    {traces or '`make dev TRACE=1`'}\n"
        f"  tokens    {tokens}\n"
        f"  database  {shown['DATABASE_URL']}   `make psql`\n"
        f"  redis     {shown['REDIS_URL']}\n\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
