"""Job that is done now and then, such as the deletion of old rows: in small batches, so that none takes long."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from app.storage.postgres import Connection, Database
from app.tasks import run_to_completion

BATCH = 500
logger = logging.getLogger("app.batches")
#: Takes a connection, inside a transaction, and the most rows to take; returns how many it took.
Job = Callable[[Connection, int], Awaitable[int]]


async def run_periodically(database: Database, seconds: float, *works: Job) -> None:
    """Do each work about every so many seconds until cancelled, and again as long as it finds whole batches.

    What fails is done later, and costs one line in the log until then.
    """
    failing = set[Job]()
    while True:
        await asyncio.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311 - so that processes take turns
        for work in works:
            try:
                while await run_to_completion(_batch(database, work)) >= BATCH:
                    pass
                failing.discard(work)
            except Exception as error:  # noqa: BLE001 - whatever it is, it goes on when that is mended
                if work not in failing:
                    logger.warning("%s is done later: %r", work.__name__, error)
                failing.add(work)


async def _batch(database: Database, work: Job) -> int:
    async with database.acquire() as connection, connection.transaction():
        return await work(connection, BATCH)
