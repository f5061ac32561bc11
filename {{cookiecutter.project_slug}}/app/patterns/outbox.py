"""Transactional outbox: an event is stored with the change that it reports, and published once that is committed.

A relay deletes rows that no other one has taken, publishes them to Redis streams, and commits. A crash between the two
publishes them again: consumers tell events apart by `event_id`. There is no watermark ("all after the last id"), which
would pass over rows, since transactions do not commit in the order of their ids.
"""

import asyncio
import logging
import time
from typing import Any
from uuid import UUID

from prometheus_client import Counter, Gauge
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.database import Connection, Database
from app.errors import UnavailableError

BATCH, POLL_SECONDS, MAX_PAUSE_SECONDS, MEASURE_SECONDS = 200, 0.2, 5.0, 5.0
PUBLISH_SECONDS = 0.25  # for which a connection to the database may wait for Redis
_WRITE = "insert into outbox (topic, event_id, type, payload) values ($1, $2, $3, $4)"
_OLDEST = "select id from outbox order by id limit $1 for update skip locked"
_TAKE = f"delete from outbox where id = any(array({_OLDEST})) returning id, topic, event_id, type, payload"  # noqa: S608
_BACKLOG = "select count(*), coalesce(extract(epoch from now() - min(created_at)), 0)::float from outbox"
_PUBLISHED = Counter("outbox_published_events", "Events published, each at least once.")
_ROWS = Gauge("outbox_backlog_events", "Events that wait.", multiprocess_mode="livemax")
_LAG = Gauge("outbox_lag_seconds", "Age of the oldest event that waits.", multiprocess_mode="livemax")
_AWAY = (RedisError, OSError, UnavailableError)  # which readiness tells
logger = logging.getLogger("app.outbox")


async def write(connection: Connection, topic: str, event_id: UUID, kind: str, payload: str) -> None:
    """Store an event; `payload` is JSON. Raises `RuntimeError` outside of a transaction, where it might be alone."""
    if not connection.is_in_transaction():
        msg = "an event belongs into the transaction of the change that it reports"
        raise RuntimeError(msg)
    await connection.execute(_WRITE, topic, event_id, kind, payload)


async def relay(database: Database, redis: Redis, max_length: int) -> None:
    """Publish until cancelled; any number may run, in any number of processes. An outage delays, and costs one line.

    A stream is trimmed to about `max_length`: its oldest events go first, read or not.
    """
    pause, measured_at = 0.0, float("-inf")
    while True:
        try:
            if time.monotonic() - measured_at > MEASURE_SECONDS:
                measured_at = time.monotonic()
                backlog: Any = await database.retry(lambda connection: connection.fetchrow(_BACKLOG))
                _ROWS.set(backlog[0])
                _LAG.set(backlog[1])
            await redis.ping()  # first, so that no connection to the database waits for a Redis that is away
            busy = await publish(database, redis, max_length) == BATCH
            if pause:
                logger.info("events are published again")
                pause = 0.0
            await asyncio.sleep(0 if busy else POLL_SECONDS)
        except Exception as error:
            if not pause:
                logger.warning("events wait", exc_info=None if isinstance(error, _AWAY) else error)
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
        async with asyncio.timeout(PUBLISH_SECONDS):
            await pipeline.execute()
    _PUBLISHED.inc(len(rows))
    return len(rows)
