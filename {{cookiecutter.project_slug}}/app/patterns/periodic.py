"""Periodic jobs, such as the deletion of old rows, in small batches."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from app.storage.postgres import Connection, Database
from app.tasks import StateLog, run_to_completion

#: Maximum number of rows in one transaction.
BATCH = 500
logger = logging.getLogger("app.batches")
#: Handles up to the given number of rows in a transaction on the connection; returns how many.
Job = Callable[[Connection, int], Awaitable[int]]


async def run_periodically(database: Database, seconds: float, *jobs: Job) -> None:
    """Run each job about every `seconds`, until cancelled.

    A failed job is retried the next time. While it keeps failing, nothing more is logged.
    """
    states = {job: _state_log(job) for job in jobs}
    while True:
        # A random time, so that processes take turns.
        await asyncio.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311
        for job, state in states.items():
            try:
                await _run(database, job)
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                state.failed(repr(error))
            else:
                state.succeeded()


def _state_log(job: Job) -> StateLog:
    name = f"{job.__module__.rpartition('.')[2]}.{job.__qualname__}"
    failure = f"periodic job {name} failed, will retry"
    return StateLog(logger, failure, f"periodic job {name} succeeded again")


async def _run(database: Database, job: Job) -> None:
    """Run batches until one is not full."""
    handled = BATCH
    while handled >= BATCH:
        handled = await run_to_completion(_run_batch(database, job))


async def _run_batch(database: Database, job: Job) -> int:
    async with database.acquire() as connection, connection.transaction():
        return await job(connection, BATCH)
