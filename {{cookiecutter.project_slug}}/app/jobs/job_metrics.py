"""The metrics of jobs: those that wait, those that run, and their outcomes."""

import asyncio
import logging

from prometheus_client import Counter, Gauge, Histogram

from app.storage.postgres import Connection, Database
from app.tasks import StateLog, describe

UPDATE_SECONDS = 5.0
#: Of waiting times: a worker is quick, and a backlog may last for hours.
WAIT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200)
STATUSES = ("queued", "running", "failed")

JOBS = Gauge("jobs", "Jobs by status.", ["status"])
OLDEST = Gauge("jobs_oldest_seconds", "How long the oldest queued job has been due.")
HANDLED = Counter("jobs_handled", "Starts by type of job and outcome.", ["type", "outcome"])
WAIT = Histogram(
    "job_wait_seconds", "Time from when a job was due to its start.", ["type"], buckets=WAIT_BUCKETS
)
DURATION = Histogram(
    "job_duration_seconds", "Duration of a start.", ["type"], buckets=DURATION_BUCKETS
)
UNDER_WAY = Gauge("jobs_under_way", "Starts that have not ended.")

# Each status has a partial index. Those of finished jobs are many, and not counted.
_COUNT = """
    select 'queued' as status, count(*) as number from jobs where status = 'queued'
    union all select 'running', count(*) from jobs where status = 'running'
    union all select 'failed', count(*) from jobs where status = 'failed'
"""
_OLDEST = """
    select coalesce(extract(epoch from now() - min(run_at)), 0)::float8
    from jobs where status = 'queued' and run_at <= now()
"""
logger = logging.getLogger("app.jobs")


async def update_periodically(database: Database) -> None:
    """Update the gauges of the table until cancelled. During an outage they keep their values."""
    state = StateLog(logger, "jobs cannot be counted", "jobs are counted again")
    while True:
        try:
            async with database.acquire() as connection:
                await update(connection)
            state.succeeded()
        except Exception as error:  # noqa: BLE001 - no error ends the loop
            state.failed(describe(error))
        await asyncio.sleep(UPDATE_SECONDS)


async def update(connection: Connection) -> None:
    """Count the jobs, and find the oldest one that waits."""
    for row in await connection.fetch(_COUNT):
        JOBS.labels(row["status"]).set(row["number"])
    OLDEST.set(await connection.fetchval(_OLDEST))
