"""The consumer for `make dev`, with a fake gateway unless another one listens."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator

from app.telemetry.logs import redact
from scripts.dev_services import free_port
from scripts.fake_gateway import DEFAULT_PORT, DEFAULT_URL


@contextlib.contextmanager
def consuming() -> Iterator[None]:
    """Run a consumer during the block.

    A fake gateway runs too, unless `GATEWAY_URL` is set or a gateway listens at its default.
    """
    environment = dict(os.environ)
    environment["ENVIRONMENT"] = "development"
    environment["METRICS_BIND"] = f"127.0.0.1:{free_port()}"
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    commands = [["app.payments.consumer"]]
    url = environment.setdefault("GATEWAY_URL", DEFAULT_URL)
    if url == DEFAULT_URL and not _is_listening(DEFAULT_PORT):
        port = free_port()
        commands.append(["scripts.fake_gateway", str(port)])
        environment["GATEWAY_URL"] = f"http://127.0.0.1:{port}"
    processes = [
        subprocess.Popen([sys.executable, "-m", *command], env=environment) for command in commands
    ]
    _print_guide(environment)
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _print_guide(environment: dict[str, str]) -> None:
    """Print the address of the metrics, and commands for other terminals."""

    def assignment(name: str) -> str:
        return f"{name}={shlex.quote(redact(environment.get(name, '')))}"

    names = ("ENVIRONMENT", "DATABASE_URL", "REDIS_URL", "GATEWAY_URL")
    assignments = [assignment(name) for name in names]
    second_metrics = f"METRICS_BIND=127.0.0.1:{free_port()}"
    second_consumer = " ".join([*assignments, second_metrics, "make consume"])
    sys.stdout.write(
        f"a consumer charges payments; it is not reloaded: "
        f"http://{environment['METRICS_BIND']}/metrics\n"
        f"  its events, in another terminal: {assignment('REDIS_URL')} make tail\n"
        f"  a second consumer: {second_consumer}\n"
    )
    sys.stdout.flush()
