"""The outbox: an event is published if and only if its change is committed, at least once."""

import asyncio
import contextlib
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client import generate_latest
from redis.exceptions import RedisError

from app.patterns import outbox
from app.patterns.outbox import Publisher
from app.storage.postgres import Connection, Database
from app.storage.redis import RedisClient
from scripts import dev_services
from tests.patience import patience
from tests.patterns.conftest import entries, eventually
from tests.service_process import frozen
from tests.tcp_proxy import TcpProxy

MAX_LENGTH = 1000
PAUSED = "outbox publishing paused"
RESUMED = "outbox publishing resumed"


async def add_events(
    connection: Connection, number: int = 1, payload: str = '{"a": 1}'
) -> list[UUID]:
    """Add events in a transaction; return their IDs."""
    ids = [uuid4() for _ in range(number)]
    async with connection.transaction():
        for event_id in ids:
            await outbox.add(connection, "events", event_id, "happened", payload)
    return ids


async def published_ids(client: RedisClient) -> list[str]:
    return [fields[b"event_id"].decode() for fields in await entries(client, "events")]


async def test_event_is_published_with_id_type_and_payload(
    database: Database, client: RedisClient
) -> None:
    async with database.acquire() as connection:
        (event_id,) = await add_events(connection)
    assert await Publisher(database, client, MAX_LENGTH).publish() == 1
    (fields,) = await entries(client, "events")
    assert fields == {
        b"event_id": str(event_id).encode(),
        b"type": b"happened",
        b"payload": b'{"a": 1}',
    }
    assert await Publisher(database, client, MAX_LENGTH).publish() == 0


async def test_event_is_rolled_back_with_its_transaction(
    database: Database, client: RedisClient
) -> None:
    async with database.acquire() as connection:
        with contextlib.suppress(KeyError):
            async with connection.transaction():
                await outbox.add(connection, "events", uuid4(), "happened", "{}")
                raise KeyError
    assert await Publisher(database, client, MAX_LENGTH).publish() == 0


async def test_event_outside_a_transaction_is_rejected(
    database: Database, client: RedisClient
) -> None:
    async with database.acquire() as connection:
        with pytest.raises(RuntimeError, match="transaction"):
            await outbox.add(connection, "events", uuid4(), "happened", "{}")
    assert await Publisher(database, client, MAX_LENGTH).publish() == 0


async def test_concurrent_relays_publish_each_event_once(
    database: Database, client: RedisClient
) -> None:
    async with database.acquire() as connection:
        ids = await add_events(connection, 5 * outbox.BATCH)
    relays = [Publisher(database, client, 10_000).publish() for _ in range(5)]
    assert sum(await asyncio.gather(*relays)) == len(ids)
    assert Counter(await published_ids(client)) == Counter(map(str, ids))


async def test_single_relay_keeps_the_order(database: Database, client: RedisClient) -> None:
    async with database.acquire() as connection:
        ids = await add_events(connection, outbox.BATCH + 10)
    for expected in (outbox.BATCH, 10, 0):
        assert await Publisher(database, client, MAX_LENGTH).publish() == expected
    assert await published_ids(client) == [str(event_id) for event_id in ids]


async def test_lost_response_publishes_the_event_again(
    database: Database, client: RedisClient, proxied: RedisClient, proxy: TcpProxy
) -> None:
    """The event has the same ID, by which a consumer recognizes it."""
    async with database.acquire() as connection:
        (event_id,) = await add_events(connection)
    await proxied.ping()
    proxy.drops_responses = True
    async with proxied.unhurried() as unhurried:
        with pytest.raises(RedisError):
            await Publisher(database, unhurried, MAX_LENGTH).publish()
        proxy.drops_responses = False
        published = await published_ids(client)
        assert await Publisher(database, unhurried, MAX_LENGTH).publish() == 1
    assert await published_ids(client) == [*published, str(event_id)]


async def test_rejected_event_waits_and_the_others_are_published_once(
    database: Database, client: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    """An event of another type's key is rejected with WRONGTYPE."""
    await client.set(client.key("no stream"), 1)
    async with database.acquire() as connection, connection.transaction():
        # More than a batch, in front of all others.
        for _ in range(outbox.BATCH + 1):
            await outbox.add(connection, "no stream", uuid4(), "happened", "{}")
        ids = await add_events(connection, 3)
    publisher = Publisher(database, client, MAX_LENGTH)
    assert await publisher.publish() == 0
    assert publisher.has_more
    assert await publisher.publish() == 3
    assert await publisher.publish() == 0
    assert not publisher.has_more
    assert await published_ids(client) == [str(event_id) for event_id in ids]
    (record,) = [record for record in caplog.records if record.name == "app.outbox"]
    assert record.message.startswith("outbox event rejected: WRONGTYPE Operation against a key")
    await client.delete(client.key("no stream"))
    assert await Publisher(database, client, MAX_LENGTH).publish() == outbox.BATCH


async def test_slow_link_drains_large_events_once_each_in_bounded_memory(
    database: Database, client: RedisClient, proxied: RedisClient, proxy: TcpProxy
) -> None:
    """60 events of 80 KiB over 2 MiB/s: a batch takes longer than any time limit of a response."""
    proxy.bytes_per_second = 2 << 20
    payload = "a" * (80 << 10)
    async with database.acquire() as connection:
        ids = await add_events(connection, 60, payload)
    tracemalloc.start()
    try:
        async with relaying(database, proxied):
            await until_published(client, ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The relay may have been stopped between the response and the commit of the last batch.
    assert await Publisher(database, client, MAX_LENGTH).publish() <= 1
    assert Counter(await published_ids(client)) == Counter(map(str, ids))
    # The client that reads all of the stream uses three times its size.
    assert proxy.sent < 60 * len(payload) * 1.1
    assert peak < 30 << 20


async def test_slower_link_than_expected_still_makes_progress(
    database: Database,
    client: RedisClient,
    proxied: RedisClient,
    proxy: TcpProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each failure of an event doubles its time limit."""
    monkeypatch.setattr(outbox, "RESPONSE_SECONDS", 0.3)
    monkeypatch.setattr(outbox, "LINK_BYTES_PER_SECOND", 1 << 20)
    proxy.bytes_per_second = 64 << 10
    async with database.acquire() as connection:
        large = await add_events(connection, 1, "a" * (80 << 10))
        small = await add_events(connection, 3)
    async with relaying(database, proxied):
        await until_published(client, small)
        await until_published(client, large)


async def test_link_that_breaks_again_and_again_makes_progress(
    database: Database, client: RedisClient, proxied: RedisClient, proxy: TcpProxy
) -> None:
    """It breaks within each window: the events with a response are not published again."""
    proxy.cut_after_bytes = 20_000
    async with database.acquire() as connection:
        ids = await add_events(connection, 100, "a" * 1000)
    async with relaying(database, proxied):
        await until_published(client, ids)
    assert proxy.connections > 5
    repeated = Counter(await published_ids(client)).total() - len(ids)
    assert repeated < 100


async def test_event_too_large_for_redis_waits_and_the_others_are_published_once(
    database: Database,
    client: RedisClient,
    worker_client: RedisClient,
    real_redis: dev_services.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Redis closes the connection at a string over `proto-max-bulk-len` (redis.conf)."""
    await client.config_set("proto-max-bulk-len", 1 << 20)
    try:
        async with database.acquire() as connection:
            first = await add_events(connection, 3)
            large = await add_events(connection, 2, "a" * (2 << 20))
            last = await add_events(connection, outbox.BATCH)
        async with relaying(database, worker_client):
            await until_published(client, [*first, *last])
            await client.config_set("proto-max-bulk-len", 512 << 20)
            await until_published(client, large)
    finally:
        await client.config_set("proto-max-bulk-len", 512 << 20)
    assert Counter(await published_ids(client)) == Counter(map(str, [*first, *large, *last]))
    assert "outbox event rejected" in caplog.text


async def test_batch_is_bounded_in_bytes(database: Database, client: RedisClient) -> None:
    async with database.acquire() as connection:
        await add_events(connection, 5, "a" * (outbox.BATCH_BYTES // 2))
        await add_events(connection, 1, "a" * (2 * outbox.BATCH_BYTES))
        await add_events(connection, 1)
    publisher = Publisher(database, client, MAX_LENGTH)
    batches = [(await publisher.publish(), publisher.has_more) for _ in range(5)]
    assert batches == [(2, True), (2, True), (2, True), (1, False), (0, False)]


async def test_metrics_report_the_backlog_and_its_age(database: Database) -> None:
    async with database.acquire() as connection:
        await add_events(connection, 3)
        await connection.execute("update outbox set created_at = now() - interval '1 hour'")
        assert await outbox.update_metrics(connection, 0) == 0
    metrics = generate_latest().decode()
    assert 'outbox_backlog_events{table="outbox"} 3.0' in metrics
    assert 'outbox_lag_seconds{table="outbox"} 36' in metrics


async def test_stream_is_trimmed(database: Database, client: RedisClient) -> None:
    """Redis trims whole nodes, so the length is approximate."""
    async with database.acquire() as connection:
        for _ in range(3):
            await add_events(connection, outbox.BATCH)
            await Publisher(database, client, 100).publish()
    assert await client.xlen(client.key("events")) < 100 + outbox.BATCH


@contextlib.asynccontextmanager
async def relaying(
    database: Database, client: RedisClient, committed: asyncio.Event | None = None
) -> AsyncIterator[None]:
    relay = asyncio.create_task(outbox.relay(database, client, MAX_LENGTH, committed))
    try:
        yield
    finally:
        relay.cancel()
        await asyncio.wait([relay])


async def until_published(client: RedisClient, ids: list[UUID]) -> None:
    expected = {str(event_id) for event_id in ids}
    async with patience(60):
        while True:
            with contextlib.suppress(RedisError):
                if set(await published_ids(client)) >= expected:
                    return
            await asyncio.sleep(0.05)


async def test_hung_redis_delays_events_and_holds_no_connection(
    database: Database,
    client: RedisClient,
    worker_client: RedisClient,
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
    client: RedisClient,
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


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that relays publish during the test."""
    sizes: list[int] = []
    publish = Publisher.publish

    async def counted(publisher: Publisher) -> int:
        sizes.append(await publish(publisher))
        return sizes[-1]

    monkeypatch.setattr(Publisher, "publish", counted)
    return sizes


async def test_commit_in_the_same_process_is_published_at_once(
    database: Database, client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the event, the relay would look after a minute."""
    monkeypatch.setattr(outbox, "POLL_SECONDS", 60.0)
    committed = asyncio.Event()
    async with relaying(database, client, committed), database.acquire() as connection:
        for _ in range(3):
            ids = await add_events(connection)
            committed.set()
            await until_published(client, ids)


async def test_idle_relay_asks_only_whether_there_are_events(
    database: Database, client: RedisClient, published: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of other processes are found all the same."""
    monkeypatch.setattr(outbox, "POLL_SECONDS", 0.01)
    async with relaying(database, client):
        await asyncio.sleep(0.2)
        assert published == []
        async with database.acquire() as connection:
            ids = await add_events(connection)
        await until_published(client, ids)
    assert sum(published) == 1


async def test_relay_looks_less_often_while_there_are_no_events(
    database: Database, client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look wakes an idle process. A commit in this process makes the pauses short again."""
    looks = 0
    publish_waiting = outbox._publish_waiting

    async def counted(*arguments: Any) -> int:
        nonlocal looks
        looks += 1
        return await publish_waiting(*arguments)

    monkeypatch.setattr(outbox, "_publish_waiting", counted)
    monkeypatch.setattr(outbox, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "MAX_POLL_SECONDS", 60.0)
    committed = asyncio.Event()
    async with relaying(database, client, committed), database.acquire() as connection:
        await asyncio.sleep(0.5)
        # 0.01 s, 0.02 s, 0.04 s and so on
        assert 2 < looks < 8
        ids = await add_events(connection)
        committed.set()
        await until_published(client, ids)
        before = looks
        await eventually(lambda: looks >= before + 3)


async def test_many_commits_share_batches(
    database: Database, client: RedisClient, published: list[int]
) -> None:
    """A batch for each would cost a worker more than the requests themselves."""
    committed = asyncio.Event()
    ids: list[UUID] = []
    async with relaying(database, client, committed), database.acquire() as connection:
        start = time.monotonic()
        while len(ids) < 200:
            ids += await add_events(connection)
            committed.set()
            await asyncio.sleep(0.001)
        await until_published(client, ids)
        seconds = time.monotonic() - start
    assert sum(published) == 200
    assert len(published) <= 2 + seconds / outbox.GATHER_SECONDS
    assert len(published) < 100
