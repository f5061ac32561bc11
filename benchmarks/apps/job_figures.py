"""Print the figures of jobs as Markdown: `python -m job_figures PART ...`, in the service."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from statistics import median, quantiles
from typing import Any

import job_work
from app.sizing.resources import detect_resources
from job_testbed import (
    INSERT,
    Figures,
    Seed,
    Testbed,
    cpu_seconds,
    measure,
    open_servers,
    open_testbed,
    percentiles,
)
from scripts.dev_services import free_port
from scripts.tune.servers import Process
from scripts.tune.users import Request, Users

#: Rounds, in which the contenders take turns. The table has the median of each figure.
ROUNDS = 3
CPUS = max(1, round(detect_resources().cpus))
WAIT_SECONDS = 0.05
COMPUTE_SECONDS = 0.02
PROBES_PER_SECOND = 50
PROBE_SECONDS = 12


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def steps_for(seconds: float) -> int:
    """Return the size of a computation that takes this long here."""
    sample = 200_000
    best = min(_time(sample) for _ in range(10))
    return round(sample * seconds / best)


def _time(steps: int) -> float:
    start = time.process_time()
    job_work.compute(steps)
    return time.process_time() - start


Contender = Callable[[], Sequence[Process | Seed]]


async def take_turns(
    testbed: Testbed, contenders: dict[str, tuple[Contender, int]]
) -> dict[str, list[Figures]]:
    """Measure each contender in each round; a contender that failed has fewer figures."""
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, (create, number) in contenders.items():
            figures = await measure(testbed, create(), number)
            if figures is None:
                sys.stderr.write(f"{name}: not all jobs were done\n")
            else:
                found[name].append(figures)
                sys.stderr.write(f"{name}: {figures.jobs_per_second:.1f} jobs/s\n")
    return found


def middle(figures: Sequence[Figures]) -> Figures:
    """Return the median of each figure."""
    return Figures(*(median(values) for values in zip(*figures, strict=True)))


async def concurrency(testbed: Testbed) -> None:
    """Compare one worker with a consumer by pika, and with twice as many workers as CPUs."""
    own = {
        "WAIT_SECONDS": str(WAIT_SECONDS),
        "STEPS": str(steps_for(COMPUTE_SECONDS)),
        "LOG_LEVEL": "error",
    }
    testbed.running.variables.update(own)

    def ours(workers: int, at_once: int, place: str, *, by_rabbitmq: bool) -> Contender:
        variables = {
            "JOB_CONCURRENCY": str(at_once),
            "JOB_PROCESSES": str(CPUS if place == "process" else 1),
            "PLACE": place,
        }
        return lambda: [
            testbed.worker(by_rabbitmq=by_rabbitmq, **variables) for _ in range(workers)
        ]

    contenders: dict[str, tuple[Contender, int]] = {
        "pika, prefetch 10, in the callback": (lambda: [Seed(testbed, "callback")], 100),
        "pika, 10 threads, acknowledged there": (lambda: [Seed(testbed, "threads")], 300),
        "pika, 10 threads, threadsafe": (lambda: [Seed(testbed, "threadsafe")], 300),
    }
    for name, by_rabbitmq in (("Postgres", False), ("RabbitMQ", True)):
        twice = ours(2 * CPUS, 10, "loop", by_rabbitmq=by_rabbitmq)
        one = ours(1, 8, "process", by_rabbitmq=by_rabbitmq)
        contenders[f"{name}: {2 * CPUS} workers, 10 at once, in the loop"] = (twice, 300)
        contenders[f"{name}: 1 worker, 8 at once, {CPUS} processes"] = (one, 300)
    found = await take_turns(testbed, contenders)
    say("\n| | jobs/s | start to end p50 / p95 | CPU per job | memory |\n|---|---|---|---|---|")
    for name, all_figures in found.items():
        if not all_figures:
            say(f"| {name} | died in {ROUNDS} of {ROUNDS} runs | | | |")
            continue
        each = middle(all_figures)
        say(
            f"| {name} | {each.jobs_per_second:.1f} | {each.run_p50_ms:.0f} / "
            f"{each.run_p95_ms:.0f} ms | {each.cpu_ms:.0f} ms | {each.memory_mb:.0f} MB |"
        )


async def dispatchers(testbed: Testbed) -> None:
    """Compare Postgres and RabbitMQ as dispatchers: jobs that wait 10 ms and store."""
    testbed.running.variables.update({"WAIT_SECONDS": "0.01", "PLACE": "nowhere"})
    testbed.running.variables.update({"JOB_PROCESSES": "1", "LOG_LEVEL": "error"})
    say(
        "\n| workers | hands out | jobs/s | CPU ms per job: worker, Postgres, RabbitMQ | "
        "wait p50 / p95 at 20 jobs/s | idle CPU: a worker, Postgres |\n|---|---|---|---|---|---|"
    )
    for workers in (1, 4, 16):
        for by_rabbitmq in (False, True):
            say(await _dispatcher(testbed, workers, by_rabbitmq=by_rabbitmq))


async def _dispatcher(testbed: Testbed, workers: int, *, by_rabbitmq: bool) -> str:
    """Return the line of a dispatcher with a number of workers."""
    each_worker = [testbed.worker(by_rabbitmq=by_rabbitmq) for _ in range(workers)]
    figures = await measure(testbed, each_worker, 2000)
    assert figures
    async with contextlib.AsyncExitStack() as stack:
        again = [testbed.worker(by_rabbitmq=by_rabbitmq) for _ in range(workers)]
        for worker in again:
            await stack.enter_async_context(worker)
        wait_p50, wait_p95 = await _trickle(testbed)
        idle = await _idle(testbed, again)
    name = "RabbitMQ" if by_rabbitmq else "Postgres"
    cpu = f"{figures.cpu_ms:.1f}, {figures.postgres_cpu_ms:.1f}, {figures.rabbitmq_cpu_ms:.1f}"
    return (
        f"| {workers} | {name} | {figures.jobs_per_second:.0f} | {cpu} | "
        f"{wait_p50:.0f} / {wait_p95:.0f} ms | {idle[0]:.1f} %, {idle[1]:.1f} % |"
    )


async def _trickle(testbed: Testbed) -> tuple[float, float]:
    """Return p50 and p95 of the time from the commit of a job to its start, at 20 jobs a second."""
    await testbed.database.execute("truncate jobs, effects")
    for _ in range(160):
        await testbed.database.fetch(INSERT, 1, False)
        await asyncio.sleep(0.05)
    await asyncio.sleep(1)
    _, _, p50, p95 = await percentiles(testbed)
    return p50, p95


async def _idle(testbed: Testbed, workers: Sequence[Process]) -> tuple[float, float]:
    """Return the CPU that a worker, and Postgres for all of them, use without jobs, in percent."""
    seconds = 8
    before = sum(worker.cpu_seconds() for worker in workers), cpu_seconds(testbed.postgres.pid)
    await asyncio.sleep(seconds)
    after = sum(worker.cpu_seconds() for worker in workers), cpu_seconds(testbed.postgres.pid)
    worker, postgres = (b - a for a, b in zip(before, after, strict=True))
    return worker / seconds / len(workers) * 100, postgres / seconds * 100


async def latency(testbed: Testbed) -> None:
    """Print p99 of `GET /` alone, and alongside 20 computing jobs a second."""
    testbed.running.variables.update({"WAIT_SECONDS": "0.05", "PLACE": "process"})
    testbed.running.variables.update({"STEPS": str(steps_for(COMPUTE_SECONDS))})
    port = free_port()
    found: dict[str, list[tuple[float, float]]] = {"idle": [], "20 jobs/s": []}
    async with testbed.running.api(port), testbed.worker(by_rabbitmq=False):
        await _probe(port, 200)
        for _ in range(5):
            for name, figures in found.items():
                load = asyncio.create_task(_trickle(testbed)) if name != "idle" else None
                figures.append(await _probe(port))
                if load:
                    await load
    say("\n| alongside | p50 of `GET /` | p99 of `GET /` |\n|---|---|---|")
    for name, figures in found.items():
        p50, p99 = (median(values) for values in zip(*figures, strict=True))
        say(f"| {name} | {p50:.2f} ms | {p99:.2f} ms |")


async def _probe(port: int, number: int = 400) -> tuple[float, float]:
    """Return p50 and p99 of `GET /` in ms, at 50 requests a second."""
    users = Users(port, 1)
    loop = asyncio.get_running_loop()
    start = loop.time()
    tasks = []
    for each in range(number):
        await asyncio.sleep(max(0, start + each / PROBES_PER_SECOND - loop.time()))
        tasks.append(asyncio.create_task(users.send(Request("/", method="GET"))))
    seconds = [(await task).seconds * 1000 for task in tasks]
    users.close()
    marks = quantiles(seconds, n=100)
    return marks[49], marks[98]


PARTS: dict[str, Callable[[Testbed], Coroutine[Any, Any, None]]] = {
    "concurrency": concurrency,
    "dispatchers": dispatchers,
    "latency": latency,
}


async def run(parts: Sequence[str], servers: Any) -> None:
    """Measure the parts, one after another."""
    async with open_testbed(*servers) as testbed:
        for part in parts:
            await PARTS[part](testbed)


def main() -> None:
    """Measure the parts that are named, by default all."""
    parts = sys.argv[1:] or list(PARTS)
    with open_servers() as servers:
        asyncio.run(run(parts, servers))


if __name__ == "__main__":
    main()
