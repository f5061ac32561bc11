"""Bake the default service and run it under its production server, on a throw-away Postgres and Redis.

It ends with Ctrl-C. `TOOLS` in the environment names the folder of the uv that sets the service up.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from cookiecutter.main import cookiecutter

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
BIND, METRICS = "127.0.0.1:8000", "127.0.0.1:9464"
READY_SECONDS = 60
GUIDE = f"""
The service of {{project}} runs. In another terminal:

    curl -i http://{BIND}/
    curl -i http://{BIND}/health/ready
    curl -i http://{BIND}/payments -H 'Content-Type: application/json' -H 'Idempotency-Key: first' \\
      -d '{{{{"amount": 1250, "currency": "EUR", "reference": "order-1"}}}}'
    curl -s http://{METRICS}/metrics | grep _count

Watch it drain: for ten seconds it is not ready, and serves all the same, with `Connection: close`.

    kill -TERM $(cat {{pid}}); sleep 1; curl -i http://{BIND}/health/ready; curl -i http://{BIND}/

Ctrl-C ends the demo.
"""


def free(address: str) -> bool:
    """Tell whether nobody listens on an address."""
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def wait_until_ready(process: subprocess.Popen[bytes]) -> bool:
    """Wait for the first 200 of readiness; return False if the process ended or time ran out."""
    end = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://{BIND}/health/ready", timeout=1):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def set_up(project: Path, **variables: str) -> dict[str, str]:
    """Make the environment of a project; return the variables, these among them, that its make targets take."""
    # The project's make must not take over what this one was told.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"MAKEFLAGS", "MFLAGS", "VENV"}
    }
    environment |= variables
    subprocess.run(["make", "--silent", "setup"], cwd=project, check=True, env=environment)
    return environment


def main() -> int:
    """Bake, set up, run; return the exit code of the service."""
    if taken := [address for address in (BIND, METRICS) if not free(address)]:
        sys.exit(f"{', '.join(taken)}: somebody listens there already; end that first")
    shutil.rmtree(FOLDER, ignore_errors=True)
    start = time.monotonic()
    project = Path(
        cookiecutter(str(ROOT), no_input=True, default_config=True, output_dir=str(FOLDER))
    )
    sys.stdout.write(f"baked in {time.monotonic() - start:.1f} s; setting up its environment ...\n")
    sys.stdout.flush()
    pid = FOLDER / "gunicorn.pid"
    environment = set_up(project, GUNICORN_CMD_ARGS=f"--pid {pid}", BIND=BIND, METRICS_BIND=METRICS)
    process = subprocess.Popen(["make", "--silent", "run"], cwd=project, env=environment)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the service gets Ctrl-C too, and ends by itself
        signal.signal(number, lambda *_: None)
    if wait_until_ready(process):
        sys.stdout.write(
            GUIDE.format(project=project.relative_to(Path.cwd()), pid=pid.relative_to(Path.cwd()))
        )
        sys.stdout.flush()
    process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
