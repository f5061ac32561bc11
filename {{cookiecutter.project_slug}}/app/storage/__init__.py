"""Postgres and Redis: clients that fail fast and survive restarts."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple

from app.settings import Settings
from app.storage.postgres import Database
from app.storage.redis import RedisClient, create_redis


class Storage(NamedTuple):
    """The clients of one process, and a check of each for the readiness probe."""

    database: Database
    redis: RedisClient
    checks: Mapping[str, Callable[[], Awaitable[object]]]


@contextlib.asynccontextmanager
async def open_storage(
    settings: Settings, connections: int, process: str = "api"
) -> AsyncIterator[Storage]:
    """Open the clients, close them in reverse. Nothing connects before first use.

    `connections` is the number of Postgres connections for this process, at least 2. In Postgres
    its `application_name` is the service's with `process`, and `-probe` for the check. The checks
    have connections of their own: a pool that is exhausted does not make a process unready.
    """
    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(Database(settings, connections, process))
        redis = await stack.enter_async_context(create_redis(settings))
        probe = await stack.enter_async_context(create_redis(settings, max_connections=1))
        yield Storage(database, redis, {"postgres": database.check, "redis": probe.check})
