"""Transactional outbox: store an event with its change, publish it afterwards.

A relay claims rows, publishes them to Redis streams, deletes them, and commits. After a crash in
between they are published again, with the same `event_id`. There is no watermark ("all after the
last ID"): it would skip rows, since transactions do not commit in the order of their IDs.
"""

import asyncio
import logging
from typing import Any
from uuid import UUID

from prometheus_client import Gauge
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.storage.postgres import Connection, Database
from app.tasks import StateLog, run_to_completion

#: Events in one transaction.
BATCH = 200
#: Pause of a relay that has found less than a whole batch.
POLL_SECONDS = 0.2
#: Time limit for a batch to be published, during which its database connection waits.
PUBLISH_TIMEOUT_SECONDS = 1.0
#: The pause after an error starts at `POLL_SECONDS` and doubles up to this.
MAX_PAUSE_SECONDS = 5.0
_ADD = """
    insert into outbox (topic, event_id, type, payload) values ($1, $2, $3, $4)
    on conflict do nothing
"""
_CLAIM = """
    select id, topic, event_id, type, payload from outbox
    order by id limit $1 for update skip locked
"""
_BACKLOG = """
    select count(*) as events,
        coalesce(extract(epoch from now() - min(created_at)), 0)::float as lag_seconds
    from outbox
"""
_EVENTS = Gauge(
    "outbox_backlog_events", "Unpublished events.", ["table"], multiprocess_mode="livemax"
)
_LAG = Gauge(
    "outbox_lag_seconds",
    "Age of the oldest unpublished event.",
    ["table"],
    multiprocess_mode="livemax",
)
logger = logging.getLogger("app.outbox")


async def add(connection: Connection, topic: str, event_id: UUID, kind: str, payload: str) -> None:
    """Store an event, unless it is already waiting. `payload` is JSON.

    Raises `RuntimeError` outside a transaction.
    """
    if not connection.is_in_transaction():
        msg = "an event must be added in the transaction of its change"
        raise RuntimeError(msg)
    await connection.execute(_ADD, topic, event_id, kind, payload)


async def relay(database: Database, redis: Redis, max_length: int) -> None:
    """Publish events until cancelled. Outages only delay them.

    Any number of relays may run. Streams keep about `max_length` events.
    """
    state = StateLog(logger, "outbox publishing paused", "outbox publishing resumed")
    backoff_seconds = POLL_SECONDS
    while True:
        try:
            # First, so that no database connection waits for a Redis that is unavailable.
            await run_to_completion(redis.ping())
            published = await run_to_completion(publish(database, redis, max_length))
        except Exception as error:  # noqa: BLE001 - the relay outlives every error
            state.failed(repr(error))
            pause_seconds = backoff_seconds
            backoff_seconds = min(2 * backoff_seconds, MAX_PAUSE_SECONDS)
        else:
            state.succeeded()
            pause_seconds = 0 if published == BATCH else POLL_SECONDS
            backoff_seconds = POLL_SECONDS
        await asyncio.sleep(pause_seconds)


async def publish(database: Database, redis: Redis, max_length: int) -> int:
    """Publish the oldest events, up to `BATCH`; return how many.

    Raises `RedisError` if Redis does not respond in time, or has rejected an event. Rejected events
    stay in the outbox; the others are deleted from it.
    """
    async with database.acquire() as connection, connection.transaction():
        events = await connection.fetch(_CLAIM, BATCH)
        errors = await _add_to_streams(redis, events, max_length)
        published = [event["id"] for event in events if event["id"] not in errors]
        await connection.execute("delete from outbox where id = any($1)", published)
    for error in errors.values():
        raise error
    return len(events)


async def _add_to_streams(redis: Redis, events: list[Any], max_length: int) -> dict[int, Exception]:
    """Add events to their streams; return the errors of rejected ones by row ID."""
    # Not a transaction: Redis would not roll it back.
    pipeline: Any = redis.pipeline(transaction=False)
    for event in events:
        fields = {
            "event_id": str(event["event_id"]),
            "type": event["type"],
            "payload": event["payload"],
        }
        pipeline.xadd(event["topic"], fields, maxlen=max_length)
    try:
        async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
            results = await pipeline.execute(raise_on_error=False)
    except TimeoutError as error:
        # Translated here, since `acquire` would take a TimeoutError for the database's.
        msg = f"no response in {PUBLISH_TIMEOUT_SECONDS} s"
        raise RedisError(msg) from error
    return {
        event["id"]: result
        for event, result in zip(events, results, strict=True)
        if isinstance(result, Exception)
    }


async def update_metrics(connection: Connection, _: int) -> int:
    """Update the backlog's metrics. A periodic job, which never has more work to do."""
    backlog: Any = await connection.fetchrow(_BACKLOG)
    _EVENTS.labels("outbox").set(backlog["events"])
    _LAG.labels("outbox").set(backlog["lag_seconds"])
    return 0
