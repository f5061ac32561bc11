"""Creates, finds and cancels jobs: what features use."""

import json
from datetime import datetime
from uuid import UUID

import asyncpg
from pydantic import BaseModel

from app.storage.postgres import Connection
from app.telemetry import tracing
from app.telemetry.context import request_context

#: Bytes of a key. An entry of an index of Postgres has 2704 at most.
MAX_KEY_BYTES = 2000
_INSERT = """
    insert into jobs (type, key, payload, context, run_at)
    values ($1, $2, $3, $4, coalesce($5, now()))
    on conflict (type, key) do nothing
    returning job_id
"""
_FIND_BY_KEY = "select job_id from jobs where type = $1 and key = $2"
_FIND = """
    select job_id, type, status, attempts, created_at, started_at, finished_at, result
    from jobs where job_id = $1
"""
_CANCEL = """
    update jobs set status = 'cancelled', finished_at = now(), lease_until = null
    where job_id = $1 and status in ('queued', 'running')
    returning true
"""


class InvalidKeyError(ValueError):
    """No index can hold this key. The message contains nothing of it."""


async def enqueue(
    connection: Connection,
    kind: str,
    payload: BaseModel,
    key: str | None = None,
    run_at: datetime | None = None,
) -> UUID:
    """Create a job in the transaction of the caller, and return its ID.

    It exists if the transaction is committed, and starts after that, at `run_at` or at once. A job
    of the same type with the same key is the same job: its ID is returned, even if it has ended.
    The log lines of the job have the IDs of the current request.

    Raises `RuntimeError` outside a transaction, `InvalidKeyError` for a key with NUL or of more
    than `MAX_KEY_BYTES`, and `ValueError` for a `run_at` without a time zone.
    """
    if not connection.is_in_transaction():
        msg = "enqueue() belongs in the transaction that wants the job"
        raise RuntimeError(msg)
    _check(key, run_at)
    context = json.dumps({**(request_context.get() or {}), **tracing.carrier()})
    values = (kind, key, payload.model_dump_json(), context, run_at)
    job_id = None
    # Again, if the job with the same key was deleted between the two.
    while job_id is None:
        job_id = await connection.fetchval(_INSERT, *values)
        job_id = job_id or await connection.fetchval(_FIND_BY_KEY, kind, key)
    # asyncpg returns a subclass of its own.
    return UUID(str(job_id))


async def find(connection: Connection, job_id: UUID) -> asyncpg.Record | None:
    """Return what clients may see of a job, or None. The error of a failed job is not included."""
    return await connection.fetchrow(_FIND, job_id)


async def cancel(connection: Connection, job_id: UUID) -> bool:
    """Cancel a job unless it has ended; return whether it did.

    A running job is cancelled too: its handler may continue, and its effect is rolled back.
    """
    return await connection.fetchval(_CANCEL, job_id) is True


def _check(key: str | None, run_at: datetime | None) -> None:
    """Raise `ValueError` for a key that Postgres rejects, and for an ambiguous time."""
    if key is not None and "\x00" in key:
        msg = "the key of a job must not contain NUL"
        raise InvalidKeyError(msg)
    if key is not None and len(key.encode()) > MAX_KEY_BYTES:
        msg = f"the key of a job must have {MAX_KEY_BYTES} bytes at most, not {len(key.encode())}"
        raise InvalidKeyError(msg)
    if run_at is not None and run_at.tzinfo is None:
        # asyncpg would read it in the zone of this machine.
        msg = f"run_at={run_at.isoformat()} must have a time zone, as that of datetime.now(UTC)"
        raise ValueError(msg)
