"""Generate the default service and run it: gunicorn, a consumer, a gateway, Postgres and Redis.

A first payment is created and settled. Ctrl-C stops everything. The environment variable `TOOLS`
names the directory of the uv that installs the service.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cookiecutter.main import cookiecutter

from scripts.ports import free_port, is_listening

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / ".demo"
HOST = "127.0.0.1"
PORT = 8000
METRICS_PORT = 9464
READY_SECONDS = 60
SETTLE_SECONDS = 60
HEADERS = "-H 'Content-Type: application/json' -H 'Idempotency-Key: first'"
PAYMENT = '{"amount": 1250, "currency": "EUR", "reference": "order-1"}'
GUIDE = """
The service in {project} is ready. Its first payment:

{first}

In another terminal:

    curl -i http://{bind}/
    curl -i http://{bind}/health/ready
    curl -i http://{bind}/payments {headers} \\
      -d '{payment}'
    sleep 1; curl -s http://{bind}/payments
    curl -s http://{metrics_bind}/metrics | grep _count

Watch it drain: for ten seconds readiness is 503, and every request is still served, with
`Connection: close`.

    kill -TERM $(cat {pid}); sleep 1; curl -i http://{bind}/health/ready; curl -i http://{bind}/

Ctrl-C ends the demo.
"""


def wait_until_ready(process: subprocess.Popen[bytes], address: str) -> bool:
    """Wait until a process is ready; return False if it exits first or the time limit passes."""
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{address}/health/ready", timeout=1):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def request(path: str, **options: Any) -> dict[str, Any]:
    """Send a request to the service; return the JSON of the response."""
    prepared = urllib.request.Request(f"http://{HOST}:{PORT}{path}", **options)
    with urllib.request.urlopen(prepared, timeout=10) as response:
        body: dict[str, Any] = json.load(response)
        return body


def settle_a_payment() -> str:
    """Create a payment, and wait until the consumer has charged it; return a line for each."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": "demo"}
    start = time.monotonic()
    payment = request("/payments", data=PAYMENT.encode(), headers=headers)
    created = payment["status"]
    while payment["status"] != "settled" and time.monotonic() < start + SETTLE_SECONDS:
        time.sleep(0.2)
        payment = request(f"/payments/{payment['payment_id']}")
    later = f"{payment['status']}, {time.monotonic() - start:.1f} s later"
    path = f"/payments/{payment['payment_id']}"
    return f"    POST /payments    {created}\n    GET {path}    {later}"


@contextlib.contextmanager
def consuming(project: Path, environment: dict[str, str]) -> Iterator[bool]:
    """Run the consumer that charges payments, and a gateway for it, during the block.

    Yields whether the consumer is ready.
    """
    python = str(project / ".venv/bin/python")
    port = free_port()
    metrics_bind = f"{HOST}:{free_port()}"
    environment = environment | {
        "ENVIRONMENT": "development",
        "GATEWAY_URL": f"http://{HOST}:{port}",
        "METRICS_BIND": metrics_bind,
    }
    gateway = [python, "-m", "scripts.fake_gateway", str(port)]
    # It shares Postgres and Redis with the service.
    consumer = [python, "-m", "scripts.dev_environment", python, "-m", "app.payments.consumer"]
    processes = [
        subprocess.Popen(command, cwd=project, env=environment) for command in (gateway, consumer)
    ]
    try:
        yield wait_until_ready(processes[-1], metrics_bind)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def set_up(project: Path, **variables: str) -> dict[str, str]:
    """Create the environment of a project; return the environment variables for its make targets.

    The project's make must not inherit the options of the make that runs this.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "VENV"}
    }
    environment = inherited | variables
    subprocess.run(["make", "--silent", "setup"], cwd=project, check=True, env=environment)
    return environment


def require_free_ports() -> None:
    """Exit with one line if another process listens on a port of the demo."""
    in_use = [f"{HOST}:{port}" for port in (PORT, METRICS_PORT) if is_listening(port, HOST)]
    if in_use:
        sys.exit(f"{', '.join(in_use)}: already in use; stop the process that listens there")


def generate() -> Path:
    """Generate the default service in `.demo`; return its directory."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    start = time.monotonic()
    project = cookiecutter(str(ROOT), no_input=True, default_config=True, output_dir=str(DIRECTORY))
    seconds = time.monotonic() - start
    sys.stdout.write(f"generated in {seconds:.1f} s; installing its dependencies ...\n")
    sys.stdout.flush()
    return Path(project)


def print_guide(project: Path, pid: Path, first: str) -> None:
    """Print the first payment, and the requests to try."""
    guide = GUIDE.format(
        project=project.relative_to(Path.cwd()),
        bind=f"{HOST}:{PORT}",
        metrics_bind=f"{HOST}:{METRICS_PORT}",
        headers=HEADERS,
        payment=PAYMENT,
        pid=pid.relative_to(Path.cwd()),
        first=first,
    )
    sys.stdout.write(guide)
    sys.stdout.flush()


def ignore(_number: int, _frame: object) -> None:
    """Ignore a signal: the service in the foreground receives it too, and stops by itself."""


def main() -> int:
    """Generate, install, run; return the exit code."""
    require_free_ports()
    project = generate()
    pid = DIRECTORY / "gunicorn.pid"
    environment = set_up(
        project,
        GUNICORN_CMD_ARGS=shlex.join(["--pid", str(pid)]),
        BIND=f"{HOST}:{PORT}",
        METRICS_BIND=f"{HOST}:{METRICS_PORT}",
    )
    process = subprocess.Popen(["make", "--silent", "run"], cwd=project, env=environment)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ignore)
    if wait_until_ready(process, f"{HOST}:{PORT}"):
        with consuming(project, environment) as is_ready:
            # Ctrl-C may stop the service or the consumer meanwhile.
            with contextlib.suppress(OSError):
                first = settle_a_payment() if is_ready else "    (the consumer has not started)"
                print_guide(project, pid, first)
            process.wait()
    process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
