"""Run the service for development: uvicorn with auto-reload, Postgres and Redis included.

Usage: `python -m scripts.dev [--no-reload]`. Without reload it is one process, for a debugger.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from app.settings import Settings, load_settings
from app.telemetry import metrics_directory
from app.telemetry.logs import redact
from scripts import addresses, dev_environment, dev_reload, dev_server
from scripts.dev_consumer import consuming  # example

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEFAULTS = {"ENVIRONMENT": "development", "WEB_CONCURRENCY": "1", "DRAIN_SECONDS": "0"}


def main() -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP. Raises `SystemExit` if something cannot start."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)

    for number in SIGNALS:
        signal.signal(number, receive)
    os.environ.update(DEFAULTS)
    load_settings()  # an invalid one stops it before anything is started
    with contextlib.ExitStack() as stack:
        variables = stack.enter_context(dev_environment.environment())
        # Those that are set are in the environment, or in a file of SECRETS_DIR.
        started = {
            name for name in dev_environment.URLS if name in variables and not os.environ.get(name)
        }
        os.environ.update(variables)
        if received or not dev_reload.migrate():
            sys.exit(1)
        os.environ["BIND"] = addresses.free_address("BIND", load_settings().bind)
        stack.enter_context(_serving_metrics())
        settings = load_settings()
        listener = stack.enter_context(addresses.listen(settings.bind))
        _print_guide(settings, started)
        stack.enter_context(consuming())  # example
        if "--no-reload" in sys.argv:
            # uvicorn handles only the other two.
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
            dev_server.serve(listener)
        else:
            dev_reload.Reloader(listener, lambda: bool(received)).run()


@contextlib.contextmanager
def _serving_metrics() -> Iterator[None]:
    """Run the metrics process during the block, on the next free port."""
    directory = metrics_directory.claim(None)
    # prometheus_client reads PROMETHEUS_MULTIPROC_DIR when it is imported.
    from app.telemetry import metrics_server

    address = addresses.free_address("METRICS_BIND", load_settings().metrics_bind)
    os.environ["METRICS_BIND"] = address
    metrics = metrics_server.MetricsProcess(address, directory.path, load_settings().metrics_prefix)
    metrics.ensure()
    try:
        yield
    finally:
        metrics.stop()
        directory.release()


def _print_guide(settings: Settings, started: set[str]) -> None:
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
        f"  database  {shown['DATABASE_URL']}   `make psql`\n"
        f"  redis     {shown['REDIS_URL']}\n\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
