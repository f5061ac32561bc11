"""Measure what authentication costs a request: `make auth-figures`. Takes a minute.

Neither a provider nor a network takes part, see apps/auth_figures.py.
"""

import subprocess
import sys

from benchmarks import BenchError
from benchmarks.__main__ import prepare_run
from benchmarks.testbed import Testbed, open_testbed

#: Many short rounds: what else the machine does adds to most of them, but not to the quickest.
ROUNDS = 400
REQUESTS = 20


def measure(testbed: Testbed) -> None:
    """Run the measurement in the environment of the service. Raises `BenchError`."""
    metrics = testbed.directory / "metrics"
    metrics.mkdir()
    testbed.run_figures(
        "auth_figures",
        str(ROUNDS),
        str(REQUESTS),
        DATABASE_URL=testbed.database.geturl(),
        REDIS_URL=testbed.redis.geturl(),
        PROMETHEUS_MULTIPROC_DIR=str(metrics),
        LOG_FORMAT="json",
        ACCESS_LOG_FLUSH_MS="1000000000",
        AUTH_ISSUER="https://127.0.0.1:9",
        AUTH_AUDIENCE="orders",
    )


def main() -> None:
    """Measure, and print Markdown; on an error, print one line and exit with code 1."""
    try:
        with prepare_run() as directory, open_testbed(directory) as testbed:
            measure(testbed)
    except (BenchError, subprocess.CalledProcessError) as error:
        sys.exit(f"figures of authentication failed: {error}")


if __name__ == "__main__":
    main()
