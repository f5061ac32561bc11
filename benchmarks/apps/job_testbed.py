"""Servers, workers and rows for the figures of jobs. It runs in the service's environment."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import aio_pika
import asyncpg
import psutil
from scripts.dev_rabbitmq import RabbitMQ, rabbitmq
from scripts.dev_services import Postgres, free_port
from scripts.tune import servers
from scripts.tune.servers import Process, Servers

APPS = Path(__file__).parent
#: A contender that has not finished by then has failed.
LIMIT_SECONDS = 120
INSERT = """
    insert into jobs (type, payload, published_at)
    select 'figure', '{}', case when $2 then now() end from generate_series(1, $1)
    returning job_id
"""
TIMES = """
    select extract(epoch from finished_at - started_at)::float8 * 1000 as run_ms,
        extract(epoch from started_at - created_at)::float8 * 1000 as wait_ms
    from jobs where status = 'succeeded'
"""
SPAN = "select extract(epoch from max(finished_at) - min(created_at))::float8 from jobs"
COUNT = "select count(*) from jobs where status = 'succeeded'"


class Testbed(NamedTuple):
    """Temporary servers, and a connection to the table of jobs."""

    running: Servers
    postgres: Postgres
    broker: RabbitMQ
    database: asyncpg.Connection

    def variables(self, *, by_rabbitmq: bool, **own: str) -> dict[str, str]:
        """Return the variables of a worker."""
        amqp = {"AMQP_URL": self.broker.url} if by_rabbitmq else {}
        path = {"PYTHONPATH": str(APPS)}
        return self.running.variables | path | amqp | own

    def worker(self, *, by_rabbitmq: bool, **own: str) -> Process:
        """Return a worker of `job_handler.py`."""
        port = free_port()
        own["METRICS_BIND"] = f"127.0.0.1:{port}"
        return Process("job_handler", port, self.variables(by_rabbitmq=by_rabbitmq, **own))

    def servers_cpu(self) -> tuple[float, float]:
        """Return the CPU seconds of Postgres and RabbitMQ so far."""
        return cpu_seconds(self.postgres.pid), cpu_seconds(self.broker.process.pid)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children so far."""
    process = psutil.Process(pid)
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


@contextlib.contextmanager
def open_servers() -> Iterator[tuple[Servers, Postgres, RabbitMQ]]:
    """Run Postgres, Redis and RabbitMQ during the block."""
    with servers.servers() as running, rabbitmq() as broker:
        yield running, running.postgres, broker


@contextlib.asynccontextmanager
async def open_testbed(
    running: Servers, postgres: Postgres, broker: RabbitMQ
) -> AsyncIterator[Testbed]:
    """Connect to Postgres, and create the table of effects."""
    database = await asyncpg.connect(running.database_url)
    try:
        await database.execute("create table if not exists effects (job_id uuid not null)")
        yield Testbed(running, postgres, broker, database)
    finally:
        await database.close()


class Seed:
    """The usual consumer, in the environment that has pika, during the block."""

    def __init__(self, testbed: Testbed, mode: str) -> None:
        """`mode` is one of those of `seed_consumer.py`."""
        self.testbed = testbed
        self.mode = mode

    async def __aenter__(self) -> "Seed":
        """Start it, and wait until it consumes."""
        await reset_queue(self.testbed.broker.url)
        command = [os.environ["SEED_PYTHON"], str(APPS / "seed_consumer.py"), self.mode]
        self.process = subprocess.Popen(
            command,
            env=self.testbed.variables(by_rabbitmq=True),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.process.stdout
        first_line = await asyncio.to_thread(self.process.stdout.readline)
        if not first_line.startswith(b"ready"):
            sys.exit(f"the consumer with pika did not start: {first_line.decode()}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Kill it: it cannot end otherwise."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def cpu_seconds(self) -> float:
        """Return its CPU time so far."""
        return cpu_seconds(self.process.pid) if self.process.poll() is None else 0.0

    def memory_mb(self) -> float:
        """Return its memory."""
        if self.process.poll() is not None:
            return 0.0
        return float(psutil.Process(self.process.pid).memory_full_info().pss) / 1e6


async def reset_queue(url: str) -> None:
    """Create the queue of the usual consumer, and empty it."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("seed", durable=True)
        await queue.purge()


async def publish(url: str, job_ids: Sequence[Any]) -> None:
    """Publish the IDs of jobs to the queue of the usual consumer."""
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        for job_id in job_ids:
            message = aio_pika.Message(str(job_id).encode(), delivery_mode=2)
            await channel.default_exchange.publish(message, "seed")


class Figures(NamedTuple):
    """The figures of a contender."""

    jobs_per_second: float
    run_p50_ms: float
    run_p95_ms: float
    wait_p50_ms: float
    wait_p95_ms: float
    cpu_ms: float
    postgres_cpu_ms: float
    rabbitmq_cpu_ms: float
    memory_mb: float


async def run_jobs(testbed: Testbed, number: int, seed: Seed | None) -> bool:
    """Write down jobs at once and wait for them. Return whether all were done."""
    database = testbed.database
    await database.execute("truncate jobs, effects")
    rows = await database.fetch(INSERT, number, seed is not None)
    if seed is not None:
        await publish(testbed.broker.url, [row["job_id"] for row in rows])
    end = time.monotonic() + LIMIT_SECONDS
    while await database.fetchval(COUNT) < number:
        has_died = seed is not None and seed.process.poll() is not None
        if has_died or time.monotonic() > end:
            return False
        await asyncio.sleep(0.05)
    return True


async def measure(
    testbed: Testbed, contender: Sequence[Process | Seed], number: int
) -> Figures | None:
    """Measure a number of jobs after a warm-up. None if not all were done."""
    seed = next((each for each in contender if isinstance(each, Seed)), None)
    async with contextlib.AsyncExitStack() as stack:
        for each in contender:
            await stack.enter_async_context(each)
        if not await run_jobs(testbed, max(20, number // 10), seed):
            return None
        before = [sum(each.cpu_seconds() for each in contender), *testbed.servers_cpu()]
        if not await run_jobs(testbed, number, seed):
            return None
        after = [sum(each.cpu_seconds() for each in contender), *testbed.servers_cpu()]
        memory_mb = sum(each.memory_mb() for each in contender)
    cpu_ms = [(b - a) * 1000 / number for a, b in zip(before, after, strict=True)]
    rate = number / await testbed.database.fetchval(SPAN)
    return Figures(rate, *await percentiles(testbed), *cpu_ms, memory_mb)


async def percentiles(testbed: Testbed) -> list[float]:
    """Return p50 and p95 of the time that jobs ran, and of the time that they waited, in ms."""
    rows = await testbed.database.fetch(TIMES)
    found = []
    for name in ("run_ms", "wait_ms"):
        marks = quantiles([row[name] for row in rows], n=20)
        found += [marks[9], marks[18]]
    return found
