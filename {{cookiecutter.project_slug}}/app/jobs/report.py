"""A scheduled job that reports the jobs of a day: how many of each type ended how, and how fast.

The report is the result of the job, so it is kept as long as its row, and a line of the log.
"""

import logging
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel

from app.jobs.handlers import Run, handlers
from app.jobs.schedules import Tick, schedules
from app.storage.postgres import Connection

TYPE = "jobs.report"
#: Types in the report, the slowest first.
MAX_TYPES = 20
#: The jobs that ended in the time of the report. `seconds` are those of the last start. The two
#: conditions match the two indexes of jobs that have ended.
_TYPES = """
    select type,
        count(*) filter (where status = 'succeeded') as succeeded,
        count(*) filter (where status = 'failed') as failed,
        count(*) filter (where status = 'cancelled') as cancelled,
        coalesce(sum(attempts - 1) filter (where attempts > 1), 0) as retries,
        coalesce(percentile_cont(0.5) within group (order by seconds), 0) as p50_seconds,
        coalesce(percentile_cont(0.95) within group (order by seconds), 0) as p95_seconds
    from (
        select type, status, attempts,
            extract(epoch from finished_at - started_at)::float8 as seconds
        from jobs
        where (status in ('succeeded', 'cancelled') and finished_at >= $1 and finished_at < $2)
            or (status = 'failed' and finished_at >= $1 and finished_at < $2)
    ) as ended
    group by type order by p95_seconds desc, type
"""
_WAITING = """
    select count(*) filter (where run_at <= now()) as due,
        coalesce(extract(epoch from now() - min(run_at))::float8, 0) as oldest_seconds
    from jobs where status = 'queued'
"""
logger = logging.getLogger("app.jobs")


class TypeReport(BaseModel):
    """The jobs of one type that ended in the time of the report."""

    type: str
    succeeded: int
    failed: int
    cancelled: int
    #: Starts after the first.
    retries: int
    #: From the last start to the end.
    p50_seconds: float
    p95_seconds: float


class Report(BaseModel):
    """The jobs of a day, and those that were due when it was written."""

    since: datetime
    until: datetime
    succeeded: int
    failed: int
    cancelled: int
    due: int
    oldest_seconds: float
    types: list[TypeReport]


schedules.add(TYPE, "0 4 * * *")


@handlers.add(TYPE, Tick, attempts=3, timeout_seconds=120)
async def report(run: Run, tick: Tick) -> None:
    """Report the 24 hours before the time of the job, whenever it runs."""
    since = tick.at - timedelta(hours=24)
    async with run.database.acquire() as connection:
        result = await summarize(connection, since, tick.at)
    async with run.done(result):
        pass
    logger.info("jobs of a day", extra={"jobs": result.model_dump(mode="json")})


async def summarize(connection: Connection, since: datetime, until: datetime) -> Report:
    """Return the report of the jobs that ended in a time."""
    rows = await connection.fetch(_TYPES, since, until)
    types = [TypeReport.model_validate(dict(row)) for row in rows]
    waiting: Any = await connection.fetchrow(_WAITING)
    return Report(
        since=since,
        until=until,
        succeeded=sum(each.succeeded for each in types),
        failed=sum(each.failed for each in types),
        cancelled=sum(each.cancelled for each in types),
        due=waiting["due"],
        oldest_seconds=max(0.0, waiting["oldest_seconds"]),
        types=types[:MAX_TYPES],
    )
