"""Measure the figures of the service's docs/tuning.md: `make tuning`. Takes two minutes."""

import asyncio
import sys

from benchmarks import BenchError
from benchmarks.__main__ import prepare_run
from benchmarks.load import Clients, measure, percentile, require_wrk
from benchmarks.servers import Server
from benchmarks.testbed import Testbed, open_testbed

SECONDS = 4
HEAVY_CLIENTS = 2
#: Interval between small requests, which show how long all other requests wait.
PROBE_SECONDS = 0.01
PATIENCE_SECONDS = 5
#: Where CPU-heavy work runs, and its route in apps/cpu_heavy.py.
PLACES = {
    "nowhere": "/",
    "in an `async def`": "/in-the-loop",
    "in a `def`, so in a thread": "/in-a-thread",
    "in a process": "/in-a-process",
}
POOL_SIZES = (1, 2, 3, 7, 15, 31)


def print_line(text: str) -> None:
    """Print a line of a table at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def load_together(server: Server, heavy: str) -> tuple[float, float, float]:
    """Load the route `heavy` without a pause, and probe `/` meanwhile.

    Return the responses of `heavy` per second, and p50 and p99 of `/` in ms.
    """
    base = server.url.removesuffix(server.path)
    small = Clients(f"{base}/", PATIENCE_SECONDS)
    large = Clients(base + heavy, PATIENCE_SECONDS)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SECONDS

    async def keep_busy() -> None:
        while loop.time() < deadline:
            await large.get(loop.time(), counts=True)

    async with asyncio.TaskGroup() as group:
        if heavy != "/":
            for _ in range(HEAVY_CLIENTS):
                group.create_task(keep_busy())
        while loop.time() < deadline:
            group.create_task(small.get(loop.time(), counts=True))
            await asyncio.sleep(PROBE_SECONDS)
    unexpected = (set(small.seconds) | set(large.seconds)) - {200}
    if unexpected:
        raise BenchError(f"{heavy}: returned {unexpected.pop()}")
    p50 = percentile(small.seconds[200], 0.5) * 1000
    p99 = percentile(small.seconds[200], 0.99) * 1000
    return len(large.seconds[200]) / SECONDS, p50, p99


def cpu_heavy(testbed: Testbed) -> None:
    """Print how CPU-heavy work delays other requests, by the place where it runs."""
    print_line("\n| the work runs | its requests/s | p50 of `/` | p99 of `/` |\n|---|---|---|---|")
    for name, path in PLACES.items():
        server = testbed.service("/health/live")
        server.command[-1] = "cpu_heavy:app"
        with server:
            asyncio.run(load_together(server, path))  # warm-up
            rate, p50, p99 = asyncio.run(load_together(server, path))
        print_line(f"| {name} | {rate:.0f} | {p50:.1f} ms | {p99:.0f} ms |")


def pool_sizes(testbed: Testbed) -> None:
    """Print the throughput of one worker by the number of its Postgres connections."""
    path = testbed.new_payment()
    headers = "| connections of a worker | requests/s | p99 | CPU of the service |"
    print_line(f"\n{headers}\n|---|---|---|---|")
    for size in POOL_SIZES:
        with testbed.service(path, DATABASE_MAX_CONNECTIONS=str(size + 1)) as server:
            measure(server, 1)  # warm-up
            run = measure(server, SECONDS)
        figures = f"{run.requests_per_second:.0f} | {run.p99_ms:.1f} ms | {run.cpu_us:.0f} us"
        print_line(f"| {size} | {figures} |")


def main() -> None:
    """Measure, and print Markdown; on an error, print one line and exit with code 1."""
    try:
        require_wrk()
        with prepare_run() as directory, open_testbed(directory) as testbed:
            cpu_heavy(testbed)
            pool_sizes(testbed)
    except BenchError as error:
        sys.exit(f"tuning failed: {error}")


if __name__ == "__main__":
    main()
