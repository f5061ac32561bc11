"""One point of the grid: a worker with some processes and jobs at once, under load."""

import asyncio
import time
from collections.abc import Sequence
from statistics import quantiles
from typing import Any, NamedTuple

import asyncpg

from scripts.tune.servers import Process, Servers, TuneError
from scripts.tune.users import Request, RequestError, Users

SAMPLE_SECONDS = 0.1
#: A point that takes longer is ended, and has the figures of the jobs that were done.
LIMIT_SECONDS = 60
_STATE = """
    select
        (select count(*) from jobs where status = 'queued') as queued,
        (select count(*) from jobs where status = 'succeeded') as succeeded,
        (select max(error) from jobs where status <> 'succeeded') as error,
        (select count(*) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()
            and application_name not like '%-api' and application_name not like '%-api-probe')
            as connections
"""
_TIMES = """
    select extract(epoch from finished_at - started_at)::float8 as start_to_end,
        extract(epoch from finished_at - created_at)::float8 as request_to_end
    from jobs where status = 'succeeded'
"""
_SPAN = """
    select extract(epoch from max(finished_at) - min(created_at))::float8
    from jobs where status = 'succeeded'
"""


class Point(NamedTuple):
    """The figures of one point."""

    processes: int
    concurrency: int
    jobs_per_second: float
    #: From the start of a job to its end.
    p50_ms: float
    p95_ms: float
    #: From the request to the end of its job.
    request_p95_seconds: float
    #: Of all CPUs together: 2.0 is two CPUs.
    cpus_used: float
    cpu_ms_per_job: float
    #: The most jobs that were queued.
    queue: int
    #: The most connections of the worker to Postgres.
    connections: int
    memory_mb: float
    is_complete: bool


class _Peaks:
    """The highest figures that were seen."""

    def __init__(self) -> None:
        self.queue = 0
        self.connections = 0
        self.succeeded = 0

    def note(self, state: Any) -> None:
        """Note a sample. Raises `TuneError` if a job has failed or is retried."""
        if state["error"]:
            msg = f"jobs fail, so there is nothing to measure: {state['error'][:200]}"
            raise TuneError(msg)
        self.queue = max(self.queue, state["queued"])
        self.connections = max(self.connections, state["connections"])
        self.succeeded = state["succeeded"]


async def measure(
    servers: Servers, users: Users, requests: Sequence[Request], processes: int, concurrency: int
) -> Point:
    """Start a worker, warm it up, and measure it while the users send the requests.

    Raises `TuneError` if the worker exits, or if a request or a job fails.
    """
    database = await asyncpg.connect(servers.database_url)
    try:
        async with servers.worker(processes, concurrency) as worker:
            warm_up = requests[: max(2 * concurrency, 4 * processes)]
            await _run(database, worker, users, warm_up)
            cpu_seconds = worker.cpu_seconds()
            start = time.monotonic()
            peaks = await _run(database, worker, users, requests)
            seconds = time.monotonic() - start
            cpu_seconds = worker.cpu_seconds() - cpu_seconds
            memory_mb = worker.memory_mb()
        return await _figures(
            database,
            processes=processes,
            concurrency=concurrency,
            cpus_used=cpu_seconds / seconds,
            cpu_ms_per_job=cpu_seconds / max(1, peaks.succeeded) * 1000,
            queue=peaks.queue,
            connections=peaks.connections,
            memory_mb=memory_mb,
            is_complete=peaks.succeeded == len(requests),
        )
    finally:
        await database.close()


async def _run(
    database: asyncpg.Connection, worker: Process, users: Users, requests: Sequence[Request]
) -> _Peaks:
    """Empty the table, send the requests, and wait for the jobs or for the time limit."""
    await database.execute("truncate jobs")
    peaks = _Peaks()
    load = asyncio.create_task(users.send_all(requests))
    end = time.monotonic() + LIMIT_SECONDS
    try:
        while peaks.succeeded < len(requests) and time.monotonic() < end:
            await asyncio.sleep(SAMPLE_SECONDS)
            worker.check()
            peaks.note(await database.fetchrow(_STATE))
            if load.done():
                load.result()
    except RequestError as error:
        msg = f"{error}; scripts/tune/recipe.py has the requests"
        raise TuneError(msg) from error
    finally:
        load.cancel()
    return peaks


async def _figures(database: asyncpg.Connection, **figures: Any) -> Point:
    """Add to the figures those that the table has."""
    rows = await database.fetch(_TIMES)
    if len(rows) < 2:
        msg = f"fewer than two jobs were done within {LIMIT_SECONDS} s"
        raise TuneError(msg)
    start_to_end = quantiles([row["start_to_end"] * 1000 for row in rows], n=20)
    request_to_end = quantiles([row["request_to_end"] for row in rows], n=20)
    return Point(
        jobs_per_second=len(rows) / await database.fetchval(_SPAN),
        p50_ms=start_to_end[9],
        p95_ms=start_to_end[18],
        request_p95_seconds=request_to_end[18],
        **figures,
    )
