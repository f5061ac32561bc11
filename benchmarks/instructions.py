"""Count the instructions of a request, which do not depend on what else the machine does.

cachegrind counts those in user space: neither the kernel's nor those of Postgres. The count differs
by 0.1 % from run to run, CPU time by 10 % and more. So a test can require a ratio.
"""

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import BenchError
from benchmarks.servers import environment
from benchmarks.testbed import POOL_SIZE, Testbed

REQUESTS = 200
TIMEOUT_SECONDS = 300
VALGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
TOTAL = re.compile(r"I\s+refs:\s+([\d,]+)")
#: The applications of apps/ and their routes; see apps/in_process.py.
BARE = {
    "small": "bare:small",
    "query": "bare_postgres:query",
    "post": "bare_post:post",
    "first_route": "many_bare:first",
    "last_route": "many_bare:last",
}
SERVICE = {
    "small": "stored:small",
    "query": "stored:query",
    "plain": "stored:plain",
    "post": "stored:post",
    "first_route": "many_service:first",
    "last_route": "many_service:last",
}


def require_valgrind() -> None:
    """Raise `BenchError` if valgrind is missing."""
    if not shutil.which("valgrind"):
        raise BenchError("valgrind is missing; install it: apt-get install valgrind")


@dataclass(frozen=True)
class Target:
    """A server whose instructions are counted: its Python, its routes by name, its settings."""

    name: str
    python: Path
    directory: Path
    routes: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)


def targets(testbed: Testbed) -> list[Target]:
    """Return bare FastAPI and the service, both with the same Python and Postgres."""
    apps = testbed.directory / "apps"
    database = {"DATABASE_URL": testbed.database.geturl()}
    bare = database | {"POOL_SIZE": str(POOL_SIZE)}
    service = database | {
        "REDIS_URL": testbed.redis.geturl(),
        "LOG_FORMAT": "json",
        "ACCESS_LOG_FLUSH_MS": "1000000000",
        "RATE_LIMIT_PER_MINUTE": "1000000",
        # cachegrind makes everything fifty times slower.
        "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "60",
        "DATABASE_COMMAND_TIMEOUT_SECONDS": "60",
        "REQUEST_TIMEOUT_SECONDS": "300",
    }
    return [
        Target("bare", testbed.python, apps, BARE, bare),
        Target("service", testbed.python, testbed.project, SERVICE, service),
    ]


def measure(
    found: list[Target], apps: Path, requests: int = REQUESTS
) -> dict[str, dict[str, float]]:
    """Return the instructions per request of each target's routes, in thousands.

    Raises `BenchError` if valgrind is missing, or a request fails.
    """
    require_valgrind()
    with ThreadPoolExecutor() as pool:
        counts = pool.map(lambda target: count(target, apps, requests), found)
    return {target.name: each for target, each in zip(found, counts, strict=True)}


def count(target: Target, apps: Path, requests: int) -> dict[str, float]:
    """Return the instructions per request of one target's routes, in thousands."""
    with tempfile.TemporaryDirectory(prefix="instructions-") as name:
        directory = Path(name)
        metrics = directory / "metrics"
        metrics.mkdir()
        settings = environment(
            PYTHONPATH=f"{target.directory}{os.pathsep}{apps}",
            PYTHONHASHSEED="0",
            PYTHONPYCACHEPREFIX=str(directory / "cache"),
            PROMETHEUS_MULTIPROC_DIR=str(metrics),
            **target.settings,
        )
        program = [str(target.python), "-m", "in_process"]
        # Without valgrind it compiles all modules quickly, and shows errors.
        run([*program, "1", *target.routes.values()], target.directory, settings)
        logs = directory / "%p.log"
        counted = [*VALGRIND, f"--log-file={logs}", *program, str(requests)]
        run([*counted, *target.routes.values()], target.directory, settings)
        return read_counts(directory, target, requests)


def run(command: list[str], directory: Path, settings: dict[str, str]) -> None:
    """Run a command. Raises `BenchError` with its last line if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=settings,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[-1]}: not served within {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise BenchError(f"{Path(command[0]).name} ... {command[-1]}: {lines[-1][:300]}")


def read_counts(directory: Path, target: Target, requests: int) -> dict[str, float]:
    """Return the instructions between the marks of each route.

    The main process goes on after each mark, so the marks are in order of their counts.
    """
    text = "".join(log.read_text() for log in directory.glob("*.log"))
    totals = sorted(int(total.replace(",", "")) for total in TOTAL.findall(text))
    if len(totals) != 2 * len(target.routes) + 1:
        raise BenchError(f"{target.name}: {len(totals)} counts for {len(target.routes)} routes")
    counts = {}
    for number, name in enumerate(target.routes):
        before, after = totals[2 * number : 2 * number + 2]
        counts[name] = (after - before) / requests / 1000
    return counts
