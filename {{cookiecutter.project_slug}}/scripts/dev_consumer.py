"""The consumer for `make dev`, with a fake gateway unless another one listens."""

import contextlib
import os
import sys
from collections.abc import Iterator

from scripts import dev_child, dev_watch
from scripts.dev_services import free_port, is_listening
from scripts.fake_gateway import DEFAULT_PORT, DEFAULT_URL


@contextlib.contextmanager
def consuming() -> Iterator[None]:
    """Run a consumer during the block.

    A fake gateway runs too, unless `GATEWAY_URL` is set or a gateway listens at its default.
    """
    environment = dict(os.environ)
    environment["METRICS_BIND"] = f"127.0.0.1:{free_port()}"
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    url = environment.setdefault("GATEWAY_URL", DEFAULT_URL)
    commands = [["app.payments.consumer"]]
    if url == DEFAULT_URL and not is_listening(DEFAULT_PORT):
        port = free_port()
        commands.append(["scripts.fake_gateway", str(port)])
        environment["GATEWAY_URL"] = f"http://127.0.0.1:{port}"
    dev_watch.others.append(environment["METRICS_BIND"])
    _print_guide(environment)
    processes = [dev_child.start(*command, env=environment) for command in commands]
    try:
        yield
    finally:
        for process in processes:
            dev_child.stop(process)


def _print_guide(environment: dict[str, str]) -> None:
    """Print the address of the metrics, and commands for other terminals.

    They find Postgres and Redis as this command did: in `.dev`, or in the settings.
    """
    gateway = f"GATEWAY_URL={environment['GATEWAY_URL']}"
    metrics = f"METRICS_BIND=127.0.0.1:{free_port()}"
    sys.stdout.write(
        "  A consumer charges payments; it is not reloaded. In another terminal:\n"
        "  its events          make tail\n"
        f"  its metrics         curl http://{environment['METRICS_BIND']}/metrics\n"
        f"  a second consumer   ENVIRONMENT=development {gateway} {metrics} make consume\n\n"
    )
    sys.stdout.flush()
