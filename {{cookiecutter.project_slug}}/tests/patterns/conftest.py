"""Fixtures: the pools that a worker has, on empty tables and an empty Redis."""

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from redis.asyncio import Redis

from app import cache
from app.database import Database
from app.settings import Settings

set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # else a folder in the project


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with Database(settings, 21) as database:
        async with database.acquire() as connection:
            for table in ("idempotency_keys", "outbox", "inbox"):
                if await connection.fetchval("select to_regclass($1)", table):  # a project may have taken one of them
                    await connection.execute(f"truncate {table}")
        yield database


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Redis]:
    async with cache.connect(settings) as client:
        await client.flushall()
        yield client


async def entries(client: Redis, stream: str) -> list[dict[bytes, bytes]]:
    """Return the fields of all entries of a stream."""
    found: Any = await client.xrange(stream)
    return [fields for _, fields in found]
