"""A scheduled job that deletes old rows of jobs, in small batches.

The row of a job is also what makes its key unique. So the same key may be used again after
`KEEP_DAYS`. Failed jobs stay until an operator has decided: `make parked`.
"""

import time

from pydantic import BaseModel

from app.jobs.handlers import Run, handlers
from app.jobs.schedules import Tick, schedules
from app.storage.postgres import Connection, Database

TYPE = "jobs.purge"
#: How long a job stays after it has succeeded or was cancelled.
KEEP_DAYS = 7
#: Rows of one transaction: its locks and its write-ahead log stay small.
BATCH = 1000
#: After this the rest is left to the next run, 10 minutes later. Less than the timeout of the job.
WORK_SECONDS = 40
_OLD = """
    select ctid from jobs
    where status in ('succeeded', 'cancelled') and finished_at < now() - make_interval(days => $1)
    limit $2 for update skip locked
"""
_DELETE = f"delete from jobs where ctid = any(array({_OLD}))"  # noqa: S608 - a constant


class Purged(BaseModel):
    """The result of a run."""

    deleted: int


schedules.add(TYPE, "*/10 * * * *", missed="skip")


@handlers.add(TYPE, Tick, attempts=2, timeout_seconds=60)
async def purge(run: Run, _: Tick) -> None:
    """Delete the jobs that ended more than `KEEP_DAYS` ago."""
    deleted = await delete_old(run.database)
    async with run.done(Purged(deleted=deleted)):
        pass


async def delete_old(database: Database) -> int:
    """Delete batches until one is not full, or until `WORK_SECONDS` have passed; return how many.

    Any number of workers may do so at once.
    """
    end = time.monotonic() + WORK_SECONDS
    deleted = 0
    while True:
        batch = await database.retry(delete_batch)
        deleted += batch
        if batch < BATCH or time.monotonic() > end:
            return deleted


async def delete_batch(connection: Connection) -> int:
    """Delete up to `BATCH` old jobs; return how many."""
    status = await connection.execute(_DELETE, KEEP_DAYS, BATCH)
    return int(status.removeprefix("DELETE "))
