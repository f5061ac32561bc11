"""Work that is done now and then, such as the deletion of old rows: in small batches, so that none takes long."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from app.database import Connection, Database
from app.errors import UnavailableError

BATCH = 500


async def repeat(database: Database, seconds: float, *works: Callable[[Connection, int], Awaitable[int]]) -> None:
    """Do each work about every so many seconds until cancelled, and again as long as it finds whole batches.

    A work takes a connection, inside a transaction, and the most rows to take; it returns how many it took.
    """
    while True:
        await asyncio.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311 - so that processes take turns
        for work in works:
            try:
                number = BATCH
                while number >= BATCH:
                    async with database.acquire() as connection, connection.transaction():
                        number = await work(connection, BATCH)
            except UnavailableError:
                logging.getLogger("app.batches").info("the database is away, so this is done later")
