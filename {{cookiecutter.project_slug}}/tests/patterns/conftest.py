"""Fixtures: the pools of a worker, on empty tables and an empty Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from app.settings import Settings
from app.storage import redis as redis_storage
from app.storage.postgres import Database
from app.storage.redis import RedisClient, create_redis
from scripts import dev_services
from tests.patience import patience
from tests.tcp_proxy import TcpProxy, proxying

#: Time limit of a Redis command on a busy machine.
PATIENT_SECONDS = 10.0
TABLES = ("idempotency_keys", "outbox", "inbox")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """On a busy machine a dozen concurrent connects may take more than a second."""
    return settings.model_copy(update={"database_acquire_timeout_seconds": 30.0})


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with Database(settings, 21) as database:
        async with database.acquire() as connection:
            for table in TABLES:
                # A project may have copied only one of the patterns.
                if await connection.fetchval("select to_regclass($1)", table):
                    await connection.execute(f"truncate {table}")
        yield database


@pytest.fixture
async def client(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RedisClient]:
    """A client with long timeouts: on a busy machine a response may be later than a worker's."""
    with monkeypatch.context() as patch:
        patch.setattr(redis_storage, "TIMEOUT_SECONDS", PATIENT_SECONDS)
        patient = create_redis(settings)
    async with patient:
        await patient.flushall()
        yield patient


@pytest.fixture
async def worker_client(client: RedisClient, settings: Settings) -> AsyncIterator[RedisClient]:
    """A client with the timeouts of a worker, on the Redis that `client` has emptied."""
    async with create_redis(settings) as worker_client:
        yield worker_client


@pytest.fixture
def real_redis(redis: dev_services.Redis) -> dev_services.Redis:
    """A Redis server that can be suspended and configured, unlike fakeredis."""
    if redis.program == "fakeredis":
        pytest.skip("fakeredis runs in this process")
    return redis


@pytest.fixture
def proxy(redis: dev_services.Redis) -> Iterator[TcpProxy]:
    with proxying(redis.port) as proxy:
        yield proxy


@pytest.fixture
async def proxied(
    client: RedisClient, settings: Settings, proxy: TcpProxy
) -> AsyncIterator[RedisClient]:
    """A client with the timeouts of a worker, which connects through the proxy."""
    changed = settings.model_copy(update={"redis_url": SecretStr(proxy.url)})
    async with create_redis(changed) as proxied:
        yield proxied


async def eventually(look: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until `look` returns true."""
    async with patience(seconds):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def entries(client: RedisClient, stream: str) -> list[dict[bytes, bytes]]:
    """Return the fields of all entries of a stream of the service."""
    found: Any = await client.xrange(client.key(stream))
    return [fields for _, fields in found]
