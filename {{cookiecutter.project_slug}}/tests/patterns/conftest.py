"""Fixtures: the pools that a worker has, on empty tables and an empty Redis."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from redis.asyncio import Redis

from app.settings import Settings
from app.storage import redis
from app.storage.postgres import Database
from app.storage.redis import create_redis

set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # else a folder in the project


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """On a busy machine a dozen connections at once may take more than a second to be made."""
    return settings.model_copy(update={"database_acquire_timeout_seconds": 30.0})


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with Database(settings, 21) as database:
        async with database.acquire() as connection:
            for table in ("idempotency_keys", "outbox", "inbox"):
                if await connection.fetchval(
                    "select to_regclass($1)", table
                ):  # a project may have taken one of them
                    await connection.execute(f"truncate {table}")
        yield database


@pytest.fixture
async def client(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Redis]:
    """One that waits for a busy machine, where an answer may take longer than a worker has for it."""
    with monkeypatch.context() as patch:
        patch.setattr(redis, "TIMEOUT_SECONDS", 10.0)
        patient = create_redis(settings)
    async with patient:
        await patient.flushall()
        yield patient


@pytest.fixture
async def hasty(client: Redis, settings: Settings) -> AsyncIterator[Redis]:
    """One with the timeouts of a worker, on the Redis that `client` has emptied."""
    async with create_redis(settings) as hasty:
        yield hasty


async def eventually(look: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `look` returns true."""
    async with asyncio.timeout(seconds):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def entries(client: Redis, stream: str) -> list[dict[bytes, bytes]]:
    """Return the fields of all entries of a stream."""
    found: Any = await client.xrange(stream)
    return [fields for _, fields in found]
