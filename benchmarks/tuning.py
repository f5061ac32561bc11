"""The figures of docs/tuning.md, measured here: `python -m benchmarks.tuning`. It takes two minutes."""

import asyncio
import sys

from benchmarks import BenchError
from benchmarks.__main__ import prepared
from benchmarks.load import Clients, measure, percentile, require_wrk
from benchmarks.servers import Server
from benchmarks.site import Site, open_site

SECONDS = 4
HEAVY_CLIENTS = 2
#: Between two small requests, which show how long everybody else waits.
PROBE_SECONDS = 0.01


def say(text: str) -> None:
    """Print a line of a table as soon as it is known."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def background_task(server: Server, heavy: str) -> tuple[float, float, float]:
    """Ask for `heavy` without a pause; return how often that was answered per second, and p50 and p99 of `/` in ms."""
    base = server.url.removesuffix(server.path)
    small, large = Clients(f"{base}/", patience=5), Clients(base + heavy, patience=5)
    loop = asyncio.get_running_loop()
    end = loop.time() + SECONDS

    async def keep_busy() -> None:
        while loop.time() < end:
            await large.ask(loop.time(), counts=True)

    async with asyncio.TaskGroup() as group:
        if heavy != "/":
            for _ in range(HEAVY_CLIENTS):
                group.create_task(keep_busy())
        while loop.time() < end:
            group.create_task(small.ask(loop.time(), counts=True))
            await asyncio.sleep(PROBE_SECONDS)
    if strange := (set(small.seconds) | set(large.seconds)) - {200}:
        raise BenchError(f"{heavy}: answered {strange.pop()}")
    p50, p99 = (percentile(small.seconds[200], share) * 1000 for share in (0.5, 0.99))
    return len(large.seconds[200]) / SECONDS, p50, p99


def cpu_heavy(site: Site) -> None:
    """Print what one piece of CPU work costs everybody else, by the place where it is done."""
    say("\n| the work is done | of it, per second | p50 of `/` | p99 of `/` |\n|---|---|---|---|")
    for name, path in (
        ("not at all", "/"),
        ("in an `async def`", "/in-the-loop"),
        ("in a `def`, so in a thread", "/in-a-thread"),
        ("in a process", "/in-a-process"),
    ):
        server = site.service("/health/live")
        server.command[-1] = "cpu_heavy:app"
        with server:
            asyncio.run(background_task(server, path))  # warm
            rate, p50, p99 = asyncio.run(background_task(server, path))
        say(f"| {name} | {rate:.0f} | {p50:.1f} ms | {p99:.0f} ms |")


def pool_sizes(site: Site) -> None:
    """Print what a worker serves with more or fewer connections to Postgres."""
    path = site.new_payment()
    say("\n| connections of a worker | requests/s | p99 | CPU of the service |\n|---|---|---|---|")
    for size in (1, 2, 3, 7, 15, 31):
        with site.service(path, DATABASE_MAX_CONNECTIONS=str(size + 1)) as server:
            measure(server, 1)
            run = measure(server, SECONDS)
        say(
            f"| {size} | {run.requests_per_second:.0f} | {run.p99_ms:.1f} ms | {run.cpu_us:.0f} us |"
        )


def main() -> None:
    """Measure, and print Markdown; one line and exit code 1 for whatever goes wrong."""
    try:
        require_wrk()
        with prepared() as folder, open_site(folder) as site:
            cpu_heavy(site)
            pool_sizes(site)
    except BenchError as error:
        sys.exit(f"tuning failed: {error}")


if __name__ == "__main__":
    main()
