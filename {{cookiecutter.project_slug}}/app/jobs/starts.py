"""Starts of jobs: each has a number, and only the newest start of a job can end it.

Each statement that ends a start requires that the job is still `running`, and that no newer start
has begun. So a job takes effect once, however often it is handed out, and not at all once it is
cancelled. `starts` counts all starts, and is that number. `attempts` counts those that count
against the limit of the handler: a start that its worker gave back does not.

A running job has a lease, which its worker renews. An expired lease means that the worker is dead
or hangs. The lease is in the row, since locks of a session do not work through PgBouncer.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel

from app.storage.postgres import Connection

#: For how long a start needs no renewal, and how often its worker renews it.
LEASE_SECONDS = 30.0
RENEW_SECONDS = 10.0
#: Characters of an error that are stored.
MAX_ERROR = 2000

_START = """
    update jobs set status = 'running', attempts = attempts + 1, starts = starts + 1,
        started_at = now(), lease_until = now() + make_interval(secs => $1)
"""
# The commit of a start does not wait for the disk. A crash of Postgres may undo it: then the job is
# queued again, and of two starts with the same number one can still end it, since that is durable.
_RETURNING = """
    returning job_id, type, payload, context, attempts, starts,
        extract(epoch from now() - run_at)::float8 as waited_seconds,
        set_config('synchronous_commit', 'off', true) as commit
"""
_CLAIM_DUE = f"""
    {_START} where job_id = any(array(
        select job_id from jobs where status = 'queued' and run_at <= now()
        order by run_at limit $2 for update skip locked
    )) and status = 'queued' {_RETURNING}
"""  # noqa: S608
_CLAIM = f"""
    {_START} where job_id = $2 and status = 'queued' and run_at <= now() {_RETURNING}
"""
_HAS_EXPIRED = "select status = 'running' and lease_until < now() from jobs where job_id = $1"
_FIND_EXPIRED = """
    select job_id from jobs where status = 'running' and lease_until < now()
    order by started_at limit 1
"""
_CLAIM_EXPIRED = f"""
    {_START} where job_id = $2 and status = 'running' and lease_until < now() {_RETURNING}
"""
_FENCE = "where job_id = $1 and starts = $2 and status = 'running'"
_SUCCEED = f"""
    update jobs set status = 'succeeded', finished_at = now(), lease_until = null,
        result = $3, error = null
    {_FENCE} returning true
"""  # noqa: S608
_FAIL = f"""
    update jobs set status = 'failed', finished_at = now(), lease_until = null,
        attempts = attempts - $3, error = $4
    {_FENCE} returning true
"""  # noqa: S608
_RETRY = f"""
    update jobs set status = 'queued', lease_until = null, published_at = null,
        run_at = now() + make_interval(secs => $3), attempts = attempts - $4, error = $5
    {_FENCE} returning true
"""  # noqa: S608
_RELEASE = f"""
    update jobs set status = 'queued', lease_until = null, attempts = attempts - 1
    {_FENCE} returning true
"""  # noqa: S608
_RENEW = """
    update jobs set lease_until = now() + make_interval(secs => $1)
    from unnest($2::uuid[], $3::integer[]) as mine (job_id, starts)
    where jobs.job_id = mine.job_id and jobs.starts = mine.starts and jobs.status = 'running'
"""


class Job(NamedTuple):
    """A job that has been started. `starts` is the number of this start."""

    job_id: UUID
    type: str
    payload: str
    #: The IDs of the request that created it: `request_id`, and those of the trace if any.
    context: dict[str, str]
    #: Starts that count, with this one.
    attempts: int
    starts: int
    #: From the time at which it was due to this start.
    waited_seconds: float


class SupersededError(Exception):
    """The job was cancelled, or a newer start of it has begun: this one must have no effect."""


async def claim_due(connection: Connection, limit: int) -> list[Job]:
    """Start up to `limit` jobs that are due. Each goes to one of the workers that ask."""
    rows = await connection.fetch(_CLAIM_DUE, LEASE_SECONDS, limit)
    return [_job(row) for row in rows]


async def claim(connection: Connection, job_id: UUID) -> Job | None:
    """Start a job that RabbitMQ has handed out, if it is queued, else return None.

    A message that was delivered again starts nothing while the lease of the job holds: its worker
    has lost the connection, and goes on.
    """
    row = await connection.fetchrow(_CLAIM, LEASE_SECONDS, job_id)
    return _job(row) if row else None


async def find_expired(connection: Connection) -> UUID | None:
    """Return a running job whose lease has expired: it may have killed its worker."""
    job_id = await connection.fetchval(_FIND_EXPIRED)
    return UUID(str(job_id)) if job_id else None


async def claim_expired(connection: Connection, job_id: UUID) -> Job | None:
    """Start a job whose lease has expired; None if another worker has, or the job has ended."""
    row = await connection.fetchrow(_CLAIM_EXPIRED, LEASE_SECONDS, job_id)
    return _job(row) if row else None


async def succeed(connection: Connection, job: Job, result: BaseModel | None = None) -> None:
    """End the job in the transaction of its effect. Raises `SupersededError`."""
    content = result.model_dump_json() if result is not None else None
    if not await connection.fetchval(_SUCCEED, job.job_id, job.starts, content):
        raise SupersededError


async def fail(connection: Connection, job: Job, error: str, *, is_counted: bool = True) -> None:
    """End the job as failed. `make parked AGAIN=ID` queues it again."""
    uncounted = 0 if is_counted else 1
    await connection.fetchval(_FAIL, job.job_id, job.starts, uncounted, error[:MAX_ERROR])


async def retry(
    connection: Connection, job: Job, delay_seconds: float, error: str, *, is_counted: bool
) -> None:
    """Queue the job again, due after the delay. `is_counted` is whether this start counts."""
    uncounted = 0 if is_counted else 1
    values = (job.job_id, job.starts, delay_seconds, uncounted, error[:MAX_ERROR])
    await connection.fetchval(_RETRY, *values)


async def release(connection: Connection, job: Job) -> None:
    """Give the job back, due at once: its worker shuts down. This start does not count."""
    await connection.fetchval(_RELEASE, job.job_id, job.starts)


async def renew(connection: Connection, jobs: Sequence[Job]) -> None:
    """Renew the leases of starts that have not ended."""
    job_ids = [job.job_id for job in jobs]
    numbers = [job.starts for job in jobs]
    await connection.execute(_RENEW, LEASE_SECONDS, job_ids, numbers)


async def has_expired(connection: Connection, job_id: UUID) -> bool:
    """Return whether the lease of a start has expired: the job may have killed its worker."""
    return await connection.fetchval(_HAS_EXPIRED, job_id) is True


async def exists(connection: Connection, job_id: UUID) -> bool:
    """Return whether there is such a job, ended or not."""
    query = "select true from jobs where job_id = $1"
    return await connection.fetchval(query, job_id) is True


def _job(row: Any) -> Job:
    values = dict(row)
    del values["commit"]
    values["job_id"] = UUID(str(row["job_id"]))
    values["context"] = json.loads(row["context"])
    return Job(**values)
