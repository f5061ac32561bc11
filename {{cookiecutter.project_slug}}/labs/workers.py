"""Lab 4: 17 workers on 2 CPUs. Is more always faster?"""

import asyncio
import contextlib
import time
from statistics import quantiles
from typing import NamedTuple

import asyncpg
import psutil

from app.sizing.plan import DEFAULT_CONNECTIONS
from labs.picture import BAD, GOOD, Picture, bars
from labs.stage import Instance, Ports, Stage

NUMBER = 4
TITLE = "17 workers on 2 CPUs: is more always faster?"
FEW = 2
MANY = 17
CLIENTS = 64
WARM_UP_SECONDS = 4.0
MEASURED_SECONDS = 5.0
#: The connections are counted so often, at this interval.
COUNTS = 5
COUNT_SECONDS = 0.3
#: Many workers need at least this number of times the memory and the connections of few.
LEAST_RATIO = 1.5
#: Enough for two workers, the master, and the process of the metrics.
FEW_MEMORY_MB = 300
REQUEST = b"GET /payments?limit=1 HTTP/1.1\r\nHost: lab\r\n\r\n"
_CONNECTIONS = """
    select count(*) from pg_stat_activity
    where datname = current_database() and application_name like '%-api%'
"""


class Figures(NamedTuple):
    """The figures of a number of workers."""

    workers: int
    memory_mb: float
    connections: int
    requests_per_second: float
    p99_ms: float


def run(stage: Stage) -> None:
    """Measure few workers, then many, with the same clients."""
    stage.say(f"{CLIENTS} clients read from the database, as fast as they get responses.")
    stage.say(f"This machine has {psutil.cpu_count()} CPUs.\n")
    stage.say("workers  memory  connections  requests/s     p99")
    ports = stage.watch()
    few = measure(stage, ports, FEW)
    many = measure(stage, ports, MANY)
    stage.picture = draw(few, many)
    compare(stage, few, many)


def compare(stage: Stage, few: Figures, many: Figures) -> None:
    """Claim what few workers save. Throughput and p99 depend on the other programs: no claims."""
    memory = many.memory_mb / few.memory_mb
    connections = many.connections / few.connections
    throughput = many.requests_per_second / few.requests_per_second
    stage.claims.claim(
        f"{few.workers} workers need {few.memory_mb:.0f} MB and {few.connections} connections",
        few.memory_mb < FEW_MEMORY_MB and few.connections <= DEFAULT_CONNECTIONS * few.workers,
    )
    stage.claims.control(
        f"{many.workers} workers need {memory:.1f} times the memory and {connections:.1f} times "
        f"the connections, for {throughput:.2f} times the throughput",
        min(memory, connections) > LEAST_RATIO,
    )


def measure(stage: Stage, ports: Ports, workers: int) -> Figures:
    """Start the service with a number of workers, and measure it under load."""
    service = stage.serve(ports=ports, WEB_CONCURRENCY=str(workers))
    service.wait_until_ready()
    figures = asyncio.run(under_load(stage.postgres.url, service, workers))
    service.kill()
    stage.say(
        f"{workers:7}  {figures.memory_mb:3.0f} MB  {figures.connections:11}"
        f"  {figures.requests_per_second:10.0f}  {figures.p99_ms:3.0f} ms"
    )
    return figures


async def under_load(database_url: str, service: Instance, workers: int) -> Figures:
    """Send requests from all clients, and measure after a warm-up."""
    times: list[tuple[float, float]] = []
    clients = [asyncio.create_task(send(service.port, times)) for _ in range(CLIENTS)]
    await asyncio.sleep(WARM_UP_SECONDS)
    start = time.monotonic()
    await asyncio.sleep(MEASURED_SECONDS)
    end = time.monotonic()
    memory_mb = await asyncio.to_thread(memory, service)
    connections = await count_connections(database_url)
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    seconds = [duration for at, duration in times if start < at < end]
    return Figures(
        workers,
        memory_mb,
        connections,
        len(seconds) / (end - start),
        quantiles(seconds, n=100)[-1] * 1000,
    )


async def send(port: int, times: list[tuple[float, float]]) -> None:
    """Send one request after the other; add the end and the duration of each."""
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                while True:
                    start = time.monotonic()
                    writer.write(REQUEST)
                    await read_response(reader)
                    end = time.monotonic()
                    times.append((end, end - start))


async def read_response(reader: asyncio.StreamReader) -> None:
    """Read a response to its end. Raises `IncompleteReadError` if there is none."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].split(maxsplit=1)[0]
    await reader.readexactly(int(length))


def memory(service: Instance) -> float:
    """Return the memory of all processes, in MB; memory that they share counts once."""
    total = 0
    for process in service.family():
        with contextlib.suppress(psutil.Error):
            figures = process.memory_full_info()
            # Not every system has the proportional set size.
            total += getattr(figures, "pss", figures.uss)
    return total / 1e6


async def count_connections(database_url: str) -> int:
    """Return the number of connections of the service to Postgres.

    The lowest of several counts: on a busy machine Postgres still ends some that were given up.
    """
    connection = await asyncpg.connect(database_url)
    try:
        counts = []
        for _ in range(COUNTS):
            counts.append(int(await connection.fetchval(_CONNECTIONS)))
            await asyncio.sleep(COUNT_SECONDS)
        return min(counts)
    finally:
        await connection.close()


def draw(few: Figures, many: Figures) -> Picture:
    """Draw a pair of bars for each figure."""
    picture = Picture(900, 520, f"{MANY} workers on {psutil.cpu_count()} CPUs")
    picture.legend(16, 56, [(GOOD, f"{FEW} workers"), (BAD, f"{MANY} workers")])
    units = {
        "memory": ("memory_mb", "MB"),
        "connections": ("connections", ""),
        "throughput": ("requests_per_second", "requests/s"),
        "p99": ("p99_ms", "ms"),
    }
    for number, (label, (name, unit)) in enumerate(units.items()):
        rows = []
        for color, figures in ((GOOD, few), (BAD, many)):
            value = getattr(figures, name)
            rows.append((label if figures is few else "", value, color, f"{value:,.0f} {unit}"))
        bars(picture, (130, 80 + 105 * number, 610, 80), rows)
    return picture
