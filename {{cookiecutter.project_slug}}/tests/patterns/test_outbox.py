"""The outbox: an event is published if and only if its change is committed, at least once."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client import generate_latest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from app.patterns import outbox
from app.storage.postgres import Connection, Database
from scripts import dev_services
from tests.patterns.conftest import entries, eventually
from tests.service_process import frozen

MAX_LENGTH = 1000
PAUSED = "outbox publishing paused"
RESUMED = "outbox publishing resumed"


async def add_events(connection: Connection, number: int = 1) -> list[UUID]:
    """Add events in a transaction; return their IDs."""
    ids = [uuid4() for _ in range(number)]
    async with connection.transaction():
        for event_id in ids:
            await outbox.add(connection, "events", event_id, "happened", '{"a": 1}')
    return ids


async def published_ids(client: Redis) -> list[str]:
    return [fields[b"event_id"].decode() for fields in await entries(client, "events")]


async def test_event_is_published_with_id_type_and_payload(
    database: Database, client: Redis
) -> None:
    async with database.acquire() as connection:
        (event_id,) = await add_events(connection)
    assert await outbox.publish(database, client, MAX_LENGTH) == 1
    (fields,) = await entries(client, "events")
    assert fields == {
        b"event_id": str(event_id).encode(),
        b"type": b"happened",
        b"payload": b'{"a": 1}',
    }
    assert await outbox.publish(database, client, MAX_LENGTH) == 0


async def test_event_is_rolled_back_with_its_transaction(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        with contextlib.suppress(KeyError):
            async with connection.transaction():
                await outbox.add(connection, "events", uuid4(), "happened", "{}")
                raise KeyError
    assert await outbox.publish(database, client, MAX_LENGTH) == 0


async def test_event_outside_a_transaction_is_rejected(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        with pytest.raises(RuntimeError, match="transaction"):
            await outbox.add(connection, "events", uuid4(), "happened", "{}")
    assert await outbox.publish(database, client, MAX_LENGTH) == 0


async def test_concurrent_relays_publish_each_event_once(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        ids = await add_events(connection, 5 * outbox.BATCH)
    relays = [outbox.publish(database, client, 10_000) for _ in range(5)]
    assert sum(await asyncio.gather(*relays)) == len(ids)
    assert Counter(await published_ids(client)) == Counter(map(str, ids))


async def test_single_relay_keeps_the_order(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        ids = await add_events(connection, outbox.BATCH + 10)
    for expected in (outbox.BATCH, 10, 0):
        assert await outbox.publish(database, client, MAX_LENGTH) == expected
    assert await published_ids(client) == [str(event_id) for event_id in ids]


async def test_lost_response_publishes_the_event_again(
    database: Database, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event has the same ID, by which a consumer recognizes it."""
    async with database.acquire() as connection:
        (event_id,) = await add_events(connection)
    execute: Any = Pipeline.execute

    async def lose_response(self: Pipeline, **options: bool) -> None:
        await execute(self, **options)
        raise RedisConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "execute", lose_response)
        with pytest.raises(RedisConnectionError):
            await outbox.publish(database, client, MAX_LENGTH)
    assert await outbox.publish(database, client, MAX_LENGTH) == 1
    assert await published_ids(client) == 2 * [str(event_id)]


async def test_rejected_event_waits_and_the_others_are_published_once(
    database: Database, client: Redis
) -> None:
    await client.set("no stream", 1)
    async with database.acquire() as connection, connection.transaction():
        await outbox.add(connection, "no stream", uuid4(), "happened", "{}")
        ids = await add_events(connection, 3)
    for _ in range(3):
        with pytest.raises(RedisError, match="WRONGTYPE"):
            await outbox.publish(database, client, MAX_LENGTH)
    assert await published_ids(client) == [str(event_id) for event_id in ids]
    await client.delete("no stream")
    assert await outbox.publish(database, client, MAX_LENGTH) == 1


async def test_metrics_report_the_backlog_and_its_age(database: Database) -> None:
    async with database.acquire() as connection:
        await add_events(connection, 3)
        await connection.execute("update outbox set created_at = now() - interval '1 hour'")
        assert await outbox.update_metrics(connection, 0) == 0
    metrics = generate_latest().decode()
    assert 'outbox_backlog_events{table="outbox"} 3.0' in metrics
    assert 'outbox_lag_seconds{table="outbox"} 36' in metrics


async def test_stream_is_trimmed(database: Database, client: Redis) -> None:
    """Redis trims whole nodes, so the length is approximate."""
    async with database.acquire() as connection:
        for _ in range(3):
            await add_events(connection, outbox.BATCH)
            await outbox.publish(database, client, 100)
    assert await client.xlen("events") < 100 + outbox.BATCH


@contextlib.asynccontextmanager
async def relaying(database: Database, client: Redis) -> AsyncIterator[None]:
    relay = asyncio.create_task(outbox.relay(database, client, MAX_LENGTH))
    try:
        yield
    finally:
        relay.cancel()
        await asyncio.wait([relay])


async def until_published(client: Redis, ids: list[UUID]) -> None:
    expected = {str(event_id) for event_id in ids}
    async with asyncio.timeout(15):
        while True:
            with contextlib.suppress(RedisError):
                if set(await published_ids(client)) >= expected:
                    return
            await asyncio.sleep(0.05)


async def test_hung_redis_delays_events_and_holds_no_connection(
    database: Database,
    client: Redis,
    worker_client: Redis,
    real_redis: dev_services.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def logged() -> list[str]:
        records = [record for record in caplog.records if record.name == "app.outbox"]
        return [record.message.split(":")[0] for record in records]

    async with relaying(database, worker_client):
        async with database.acquire() as connection:
            await until_published(client, await add_events(connection))
            caplog.clear()  # Redis may have been slow for a moment
            with frozen(real_redis.pid):
                ids = await add_events(connection, 3)
                # A batch in progress may have waited for Redis until then.
                await eventually(lambda: logged() == [PAUSED])
                used = []
                for _ in range(40):
                    await asyncio.sleep(0.05)
                    busy = database.pool.get_size() - database.pool.get_idle_size()
                    used.append(busy - 1)  # without the connection of this test
        assert used == [0] * 40
        await until_published(client, ids)
        # It is logged after the commit.
        await eventually(lambda: logged() == [PAUSED, RESUMED])


async def test_relay_survives_a_postgres_restart(
    database: Database,
    client: Redis,
    postgres: dev_services.Postgres,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with relaying(database, client):
        await asyncio.sleep(0.1)
        postgres.stop()
        time.sleep(0.1)  # noqa: ASYNC251 - nothing can happen while the server is down
        postgres.start()
        await asyncio.sleep(0.5)
        async with database.acquire() as connection:
            ids = await add_events(connection)
        await until_published(client, ids)
    assert all(record.levelname in {"WARNING", "INFO"} for record in caplog.records)
