"""Transactional outbox: an event is stored with the change that it reports, and published once that is committed.

A relay takes rows that no other one has, publishes them to Redis streams, deletes them, and commits; after a crash in
between they are published again, with the same `event_id`. There is no watermark ("all after the last id"): it would
pass over rows, since transactions do not commit in the order of their ids.
"""

import asyncio
import logging
from typing import Any
from uuid import UUID

from prometheus_client import Gauge
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.storage.postgres import Connection, Database
from app.tasks import run_to_completion

BATCH, POLL_SECONDS, PUBLISH_SECONDS, MAX_PAUSE_SECONDS = 200, 0.2, 1.0, 5.0
_TAKE = "select id, topic, event_id, type, payload from outbox order by id limit $1 for update skip locked"
_ROWS = Gauge("outbox_backlog_events", "Events that wait.", ["table"], multiprocess_mode="livemax")
_AGE = Gauge(
    "outbox_lag_seconds",
    "Age of the oldest event that waits.",
    ["table"],
    multiprocess_mode="livemax",
)
_BACKLOG = (
    "select count(*), coalesce(extract(epoch from now() - min(created_at)), 0)::float from outbox"
)
logger = logging.getLogger("app.outbox")


async def add(connection: Connection, topic: str, event_id: UUID, kind: str, payload: str) -> None:
    """Store an event, unless it waits already; `payload` is JSON. Raises `RuntimeError` outside of a transaction."""
    if not connection.is_in_transaction():
        raise RuntimeError("an event belongs into the transaction of the change that it reports")
    query = "insert into outbox (topic, event_id, type, payload) values ($1, $2, $3, $4) on conflict do nothing"
    await connection.execute(query, topic, event_id, kind, payload)


async def relay(database: Database, redis: Redis, max_length: int) -> None:
    """Publish until cancelled; any number may run, and outages only delay. Streams keep about `max_length` events."""
    pause = 0.0
    while True:
        try:
            await run_to_completion(
                redis.ping()
            )  # first: no connection to the database waits for a Redis that is away
            found = await run_to_completion(publish(database, redis, max_length))
            if pause:
                logger.info("events are published again")
            pause = 0.0
            await asyncio.sleep(0 if found == BATCH else POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes on when that is mended
            if not pause:
                logger.warning("events wait: %r", error)
            pause = min(2 * pause or POLL_SECONDS, MAX_PAUSE_SECONDS)
            await asyncio.sleep(pause)


async def publish(database: Database, redis: Redis, max_length: int) -> int:
    """Publish the oldest events, up to `BATCH`, and return how many. What fails stays, and raises a `RedisError`."""
    async with database.acquire() as connection, connection.transaction():
        rows = await connection.fetch(_TAKE, BATCH)
        pipeline: Any = redis.pipeline(
            transaction=False
        )  # a transaction of Redis would undo nothing
        for _, topic, event_id, kind, payload in rows:
            pipeline.xadd(
                topic,
                {"event_id": str(event_id), "type": kind, "payload": payload},
                maxlen=max_length,
            )
        try:
            async with asyncio.timeout(
                PUBLISH_SECONDS
            ):  # for which the connection may wait for Redis
                answers = await pipeline.execute(raise_on_error=False)
        except TimeoutError as error:  # which here would be taken for the database's
            raise RedisError(f"no answer in {PUBLISH_SECONDS} s") from error
        refusals = {
            row["id"]: each
            for row, each in zip(rows, answers, strict=True)
            if isinstance(each, Exception)
        }
        sent = [row["id"] for row in rows if row["id"] not in refusals]
        await connection.execute("delete from outbox where id = any($1)", sent)
    for refusal in refusals.values():
        raise refusal
    return len(rows)


async def update_metrics(connection: Connection, _: int) -> int:
    """Tell the metrics what waits: a work for `batches.repeat`, with nothing left to do."""
    row: Any = await connection.fetchrow(_BACKLOG)
    _ROWS.labels("outbox").set(row[0])
    _AGE.labels("outbox").set(row[1])
    return 0
