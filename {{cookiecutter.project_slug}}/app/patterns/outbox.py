"""Transactional outbox: an event is stored with the change that it reports, and published once that is committed.

A relay deletes rows that no other one has taken, publishes them to Redis streams, and commits; after a crash in between
they are published again, with the same `event_id`. There is no watermark ("all after the last id"): it would pass over
rows, since transactions do not commit in the order of their ids.
"""

import asyncio
import logging
import time
from typing import Any
from uuid import UUID

from prometheus_client import Gauge
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.database import Connection, Database
from app.patterns.unbroken import unbroken

BATCH, POLL_SECONDS, PUBLISH_SECONDS, MAX_PAUSE_SECONDS, MEASURE_SECONDS = 200, 0.2, 1.0, 5.0, 5.0
_TAKE = """
    delete from outbox where id = any(array(select id from outbox order by id limit $1 for update skip locked))
    returning id, topic, event_id, type, payload"""
_ROWS = Gauge("outbox_backlog_events", "Events that wait.", ["table"], multiprocess_mode="livemax")
_AGE = Gauge("outbox_lag_seconds", "Age of the oldest event that waits.", ["table"], multiprocess_mode="livemax")
_BACKLOG = "select count(*), coalesce(extract(epoch from now() - min(created_at)), 0)::float from outbox"
logger = logging.getLogger("app.outbox")


async def write(connection: Connection, topic: str, event_id: UUID, kind: str, payload: str) -> None:
    """Store an event; `payload` is JSON. Raises `RuntimeError` outside of a transaction, where it might be alone."""
    if not connection.is_in_transaction():
        raise RuntimeError("an event belongs into the transaction of the change that it reports")
    query = "insert into outbox (topic, event_id, type, payload) values ($1, $2, $3, $4)"
    await connection.execute(query, topic, event_id, kind, payload)


async def relay(database: Database, redis: Redis, max_length: int) -> None:
    """Publish until cancelled; any number may run, and outages only delay. Streams keep about `max_length` events."""
    pause, measured_at = 0.0, float("-inf")
    while True:
        try:
            if time.monotonic() - measured_at > MEASURE_SECONDS:
                measured_at = time.monotonic()
                await unbroken(_measure(database))
            await unbroken(redis.ping())  # first: no connection to the database waits for a Redis that is away
            busy = await unbroken(publish(database, redis, max_length)) == BATCH
            if pause:
                logger.info("events are published again")
            pause = 0.0
            await asyncio.sleep(0 if busy else POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes on when that is mended
            if not pause:
                logger.warning("events wait: %r", error)
            pause = min(2 * pause or POLL_SECONDS, MAX_PAUSE_SECONDS)
            await asyncio.sleep(pause)


async def publish(database: Database, redis: Redis, max_length: int) -> int:
    """Publish the oldest events, up to `BATCH`, and return how many. If that fails, they stay."""
    async with database.acquire() as connection, connection.transaction():
        rows = sorted(map(tuple, await connection.fetch(_TAKE, BATCH)))  # by id
        pipeline = redis.pipeline()
        for _, topic, event_id, kind, payload in rows:
            event: Any = {"event_id": str(event_id), "type": kind, "payload": payload}
            pipeline.xadd(topic, event, maxlen=max_length)
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):  # for which the connection may wait for Redis
                await pipeline.execute()
        except TimeoutError as error:  # which here would be taken for the database's
            raise RedisError(f"no answer in {PUBLISH_SECONDS} s") from error
    return len(rows)


async def _measure(database: Database) -> None:
    row: Any = await database.retry(lambda connection: connection.fetchrow(_BACKLOG))
    _ROWS.labels("outbox").set(row[0])
    _AGE.labels("outbox").set(row[1])
