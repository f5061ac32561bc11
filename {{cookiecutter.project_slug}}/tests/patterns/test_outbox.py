"""An event is published if and only if its change is committed, at least once, and whatever is away only delays it."""

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
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import RedisError

from app.patterns import outbox
from app.storage.postgres import Connection, Database
from scripts import dev_services
from tests.patterns.conftest import entries, eventually
from tests.service_process import frozen

MAX_LENGTH = 1000


async def write(connection: Connection, number: int = 1) -> list[UUID]:
    ids = [uuid4() for _ in range(number)]
    async with connection.transaction():
        for event_id in ids:
            await outbox.add(connection, "events", event_id, "happened", '{"a": 1}')
    return ids


async def published(client: Redis) -> list[str]:
    return [fields[b"event_id"].decode() for fields in await entries(client, "events")]


async def test_an_event_is_published_with_its_id_its_type_and_its_payload(
    database: Database, client: Redis
) -> None:
    async with database.acquire() as connection:
        (event_id,) = await write(connection)
    assert await outbox.publish(database, client, MAX_LENGTH) == 1
    (fields,) = await entries(client, "events")
    assert fields == {
        b"event_id": str(event_id).encode(),
        b"type": b"happened",
        b"payload": b'{"a": 1}',
    }
    assert await outbox.publish(database, client, MAX_LENGTH) == 0


async def test_an_event_goes_with_its_transaction(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        with contextlib.suppress(KeyError):
            async with connection.transaction():
                await outbox.add(connection, "events", uuid4(), "happened", "{}")
                raise KeyError
        with pytest.raises(RuntimeError, match="transaction"):
            await outbox.add(connection, "events", uuid4(), "happened", "{}")
    assert await outbox.publish(database, client, MAX_LENGTH) == 0


async def test_relays_side_by_side_publish_each_event_once(
    database: Database, client: Redis
) -> None:
    async with database.acquire() as connection:
        ids = await write(connection, 5 * outbox.BATCH)
    assert sum(
        await asyncio.gather(*(outbox.publish(database, client, 10_000) for _ in range(5)))
    ) == len(ids)
    found = await published(client)
    assert Counter(found) == Counter(map(str, ids))


async def test_a_relay_alone_keeps_the_order(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        ids = await write(connection, outbox.BATCH + 10)
    for expected in (outbox.BATCH, 10, 0):
        assert await outbox.publish(database, client, MAX_LENGTH) == expected
    assert await published(client) == [str(event_id) for event_id in ids]


async def test_an_event_that_was_published_in_a_transaction_that_failed_comes_again(
    database: Database, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with database.acquire() as connection:
        (event_id,) = await write(connection)
    execute: Any = Pipeline.execute

    async def loses_the_answer(self: Pipeline, **options: bool) -> None:
        await execute(self, **options)
        raise LostError

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "execute", loses_the_answer)
        with pytest.raises(LostError):
            await outbox.publish(database, client, MAX_LENGTH)
    assert await outbox.publish(database, client, MAX_LENGTH) == 1
    assert await published(client) == 2 * [str(event_id)]  # which is how a consumer tells


async def test_an_event_that_redis_refuses_waits_and_the_others_are_published_once(
    database: Database, client: Redis
) -> None:
    await client.set("no stream", 1)
    async with database.acquire() as connection, connection.transaction():
        await outbox.add(connection, "no stream", uuid4(), "happened", "{}")
        ids = await write(connection, 3)
    for _ in range(3):
        with pytest.raises(RedisError, match="WRONGTYPE"):
            await outbox.publish(database, client, MAX_LENGTH)
    assert await published(client) == [str(event_id) for event_id in ids]
    await client.delete("no stream")
    assert await outbox.publish(database, client, MAX_LENGTH) == 1


async def test_metrics_tell_how_many_events_wait_and_how_long(database: Database) -> None:
    async with database.acquire() as connection:
        await write(connection, 3)
        await connection.execute("update outbox set created_at = now() - interval '1 hour'")
        assert await outbox.update_metrics(connection, 0) == 0
    told = generate_latest().decode()
    assert 'outbox_backlog_events{table="outbox"} 3.0' in told
    assert 'outbox_lag_seconds{table="outbox"} 36' in told


async def test_a_stream_does_not_grow_for_ever(database: Database, client: Redis) -> None:
    async with database.acquire() as connection:
        for _ in range(3):
            await write(connection, outbox.BATCH)
            await outbox.publish(database, client, 100)
    assert await client.xlen("events") < 100 + outbox.BATCH  # it is trimmed by whole nodes


@contextlib.asynccontextmanager
async def relaying(database: Database, client: Redis) -> AsyncIterator[None]:
    relay = asyncio.create_task(outbox.relay(database, client, MAX_LENGTH))
    try:
        yield
    finally:
        relay.cancel()
        await asyncio.wait([relay])


async def until_published(client: Redis, ids: list[UUID]) -> None:
    async with asyncio.timeout(15):
        while True:
            with contextlib.suppress(RedisError):
                if set(await published(client)) >= set(map(str, ids)):
                    return
            await asyncio.sleep(0.05)


async def test_a_redis_that_freezes_delays_events_and_holds_no_connection(
    database: Database,
    client: Redis,
    hasty: Redis,
    redis: dev_services.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis runs in this process, and cannot be frozen")

    def told() -> list[str]:
        return [
            record.message.split(":")[0] for record in caplog.records if record.name == "app.outbox"
        ]

    async with relaying(database, hasty):
        async with database.acquire() as connection:
            await until_published(client, await write(connection))
            caplog.clear()  # of a Redis that was slow for a moment
            with frozen(redis.pid):
                ids = await write(connection, 3)
                await eventually(
                    lambda: told() == ["events wait"]
                )  # what it was about to publish may have waited
                used = []
                for _ in range(40):
                    await asyncio.sleep(0.05)
                    used.append(database.pool.get_size() - database.pool.get_idle_size() - 1)
        assert used == [0] * 40
        await until_published(client, ids)
        await eventually(
            lambda: told() == ["events wait", "events are published again"]
        )  # after the commit


async def test_a_relay_outlives_the_database(
    database: Database,
    client: Redis,
    postgres: dev_services.Postgres,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with relaying(database, client):
        await asyncio.sleep(0.1)
        postgres.stop()
        time.sleep(0.1)  # noqa: ASYNC251 - the server is away anyhow
        postgres.start()
        await asyncio.sleep(0.5)
        async with database.acquire() as connection:
            ids = await write(connection)
        await until_published(client, ids)
    assert all(record.levelname in {"WARNING", "INFO"} for record in caplog.records)
