"""The worker of `make dev`: it does the jobs, and restarts when a file changes.

`make dev` runs this module as a child. Without reload, it runs the worker itself.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from app.settings import load_settings
from scripts import dev_child, dev_watch
from scripts.dev_reload import ENV_FILE, POLL_SECONDS, EnvFile, WatchedFiles
from scripts.dev_services import free_port

WORKER = "app.jobs_main"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: One process starts quickly. At the end, running jobs get one second of the six; then they are
#: put back, within the time after which `dev_child` kills.
DEFAULTS = {"JOB_PROCESSES": "1", "GRACEFUL_TIMEOUT_SECONDS": "6"}


@contextlib.contextmanager
def working(*, is_reloading: bool) -> Iterator[None]:
    """Run a worker during the block."""
    environment = DEFAULTS | os.environ
    environment["METRICS_BIND"] = f"127.0.0.1:{free_port()}"
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    dev_watch.others.append(environment["METRICS_BIND"])
    _print_guide(environment)
    module = "scripts.dev_worker" if is_reloading else WORKER
    process = dev_child.start(module, env=environment)
    try:
        yield
    finally:
        dev_child.stop(process)


def _print_guide(environment: dict[str, str]) -> None:
    """Print the dispatcher, the address of the metrics, and commands for other terminals."""
    has_rabbitmq = bool(load_settings().amqp_url.get_secret_value())
    dispatcher = "RabbitMQ" if has_rabbitmq else "Postgres"
    metrics = f"METRICS_BIND=127.0.0.1:{free_port()}"
    sys.stdout.write(
        f"  A worker does the jobs, which {dispatcher} hands out. In another terminal:\n"
        "  failed jobs         make parked\n"
        f"  its metrics         curl http://{environment['METRICS_BIND']}/metrics\n"
        f"  a second worker     ENVIRONMENT=development {metrics} make work\n\n"
    )
    sys.stdout.flush()


def _exit(_: int, __: FrameType | None) -> None:
    """End, once: a second signal must not interrupt the end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def main() -> None:
    """Run a worker until a signal. Restart it after each change of a file."""
    for number in SIGNALS:
        signal.signal(number, _exit)
    files = WatchedFiles()
    env = EnvFile()
    worker = dev_child.start(WORKER)
    try:
        while True:
            changed = files.changed()
            if ENV_FILE in changed:
                env.reload()
            if changed:
                dev_child.stop(worker)
                worker = dev_child.start(WORKER)
            time.sleep(POLL_SECONDS)
    finally:
        dev_child.stop(worker)


if __name__ == "__main__":
    main()
