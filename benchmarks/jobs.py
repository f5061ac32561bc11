"""Measure the figures of the service's docs/jobs.md: `make job-figures`. Takes ten minutes.

`PART=concurrency` measures only that part; the others are `dispatchers` and `latency`. It needs
rabbitmq-server. The consumer with pika, to which the worker is compared, has an environment of its
own: the service does not depend on pika.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import BenchError
from benchmarks.__main__ import prepare_run
from benchmarks.testbed import Testbed, open_testbed
from scripts import demo

#: The packages of the usual consumer.
PACKAGES = ("pika>=1.4,<2", "psycopg[binary]>=3.2,<4")
NO_RABBITMQ = (
    "rabbitmq-server is missing; install it: apt-get install rabbitmq-server, or brew install"
    " rabbitmq"
)


def require_rabbitmq() -> None:
    """Raise `BenchError` if RabbitMQ is missing."""
    if not shutil.which("rabbitmq-server"):
        raise BenchError(NO_RABBITMQ)


def install_pika(testbed: Testbed) -> Path:
    """Create an environment with pika; return its Python. Raises `BenchError`."""
    tools = Path(os.environ.get("TOOLS", demo.ROOT / ".tools"))
    uv = shutil.which("uv") or str(tools / "bin/uv")
    directory = testbed.directory / "venv-pika"
    python = directory / "bin/python"
    for command in (
        [uv, "venv", "--quiet", "--python", str(testbed.python), str(directory)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise BenchError(f"{' '.join(command[1:3])}: {lines[0]}")
    return python


def main() -> None:
    """Measure, and print Markdown; on an error, print one line and exit with code 1."""
    parts = os.environ.get("PART", "").split()
    try:
        require_rabbitmq()
        with prepare_run() as directory, open_testbed(directory, "include_jobs=true") as testbed:
            testbed.run_figures("job_figures", *parts, SEED_PYTHON=str(install_pika(testbed)))
    except (BenchError, subprocess.CalledProcessError) as error:
        sys.exit(f"job figures failed: {error}")


if __name__ == "__main__":
    main()
