"""Transactional outbox: store an event with its change, publish it afterwards.

A relay claims rows, publishes them to Redis streams, deletes them, and commits. After a crash in
between they are published again, with the same `event_id`. There is no watermark ("all after the
last ID"): it would skip rows, since transactions do not commit in the order of their IDs.

Batches are bounded in number, bytes and time, and each response of Redis counts: over a slow link,
or one that breaks again and again, what Redis has accepted is deleted. An event that Redis rejects,
or that breaks the connection, is retried later, and the others pass it.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from prometheus_client import Gauge
from redis.exceptions import RedisError, ResponseError

from app.storage.postgres import Connection, Database
from app.storage.redis import RedisClient, server_code
from app.tasks import StateLog, describe, run_to_completion
from app.telemetry import tracing

#: Events in one transaction, and bytes of their payloads. A larger event is the last of its batch.
BATCH = 200
BATCH_BYTES = 1 << 20
#: A batch sends nothing more after this time. Its database connection waits meanwhile.
BATCH_SECONDS = 1.0
#: Maximum of the bytes for which Redis has not responded yet. A larger event is alone.
WINDOW_BYTES = 1 << 16
#: Time limit for each response: a constant, and the time that a slow link needs for a window.
RESPONSE_SECONDS = 1.0
LINK_BYTES_PER_SECOND = 1 << 16
#: Interval at which a relay looks for events of other processes. It doubles up to the maximum while
#: there are none.
POLL_SECONDS = 1.0
MAX_POLL_SECONDS = 4.0
#: Minimum pause after a batch that was not whole, so that many commits share the next one.
GATHER_SECONDS = 0.05
#: The pause after an error starts at this, and doubles up to the maximum.
MIN_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 5.0
#: An event that fails is passed by the others for a second, then for twice the time, up to this.
MAX_POSTPONED_SECONDS = 60.0
#: Doublings of a pause or a time limit, so that no number overflows.
MAX_DOUBLINGS = 10
#: Failing events and topics that a relay remembers.
MAX_REMEMBERED = 10_000
#: Codes of errors that the other events of the topic get as well.
_TOPIC_CODES = ("WRONGTYPE", "NOPERM", "MOVED")
#: The columns of a new event, for a statement of your own that inserts `Event.values()`.
COLUMNS = "topic, event_id, type, payload, traceparent"
_ADD = f"insert into outbox ({COLUMNS}) values ($1, $2, $3, $4, $5) on conflict do nothing"  # noqa: S608
#: The payloads that would make the batch too large are never read.
_CLAIM = """
    with claimed as materialized (
        select * from outbox where topic <> all($3) and id <> all($4)
        order by id limit $1 for update skip locked
    ), measured as (
        select *, octet_length(payload) as bytes,
            sum(octet_length(payload)) over (order by id) as total
        from claimed
    )
    select id, topic, event_id, type, payload, created_at, traceparent, bytes from measured
    where total - bytes < $2 order by id
"""
_EXISTS = "select exists (select from outbox)"
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


class Event(NamedTuple):
    """An event. `payload` is JSON."""

    topic: str
    event_id: UUID
    kind: str
    payload: str

    def values(self) -> tuple[str, UUID, str, str, str | None]:
        """Return the values of `COLUMNS`: those of the event, and the active trace."""
        return *self, tracing.traceparent()


async def add(connection: Connection, topic: str, event_id: UUID, kind: str, payload: str) -> None:
    """Store an event, with the active trace, unless it is already waiting. `payload` is JSON.

    Raises `RuntimeError` outside a transaction.
    """
    if not connection.is_in_transaction():
        msg = "an event must be added in the transaction of its change"
        raise RuntimeError(msg)
    await connection.execute(_ADD, *Event(topic, event_id, kind, payload).values())


async def relay(
    database: Database, redis: RedisClient, max_length: int, committed: asyncio.Event | None = None
) -> None:
    """Publish events until cancelled. Outages only delay them.

    Set `committed` after each commit of an event in this process: the relay publishes it at once,
    or within `GATHER_SECONDS` of the last batch. Those of other processes wait for up to
    `POLL_SECONDS`, in an idle process for up to `MAX_POLL_SECONDS`. Any number of relays may run.
    Streams keep about `max_length` events.
    """
    state = StateLog(logger, "outbox publishing paused", "outbox publishing resumed")
    backoff_seconds = MIN_PAUSE_SECONDS
    poll_seconds = POLL_SECONDS
    committed = committed or asyncio.Event()
    async with redis.unhurried() as unhurried:
        publisher = Publisher(database, unhurried, max_length)
        while True:
            # Before the outbox is read: an event that is committed meanwhile is not missed.
            committed.clear()
            has_failed = backoff_seconds > MIN_PAUSE_SECONDS
            try:
                if has_failed:
                    # A Redis that is unavailable uses no database connection.
                    await run_to_completion(redis.ping())
                published = await run_to_completion(_publish_waiting(publisher, redis))
            except Exception as error:  # noqa: BLE001 - the relay outlives every error
                state.failed(describe(error))
                await asyncio.sleep(backoff_seconds)
                backoff_seconds = min(2 * backoff_seconds, MAX_PAUSE_SECONDS)
            else:
                state.succeeded()
                backoff_seconds = MIN_PAUSE_SECONDS
                if not publisher.has_more:
                    poll_seconds = await _pause(published, committed, poll_seconds)


async def _publish_waiting(publisher: "Publisher", redis: RedisClient) -> int:
    """Publish a batch if there are events; return their number. Idle relays send one query."""
    async with publisher.database.acquire() as connection:
        if not await connection.fetchval(_EXISTS):
            publisher.has_more = False
            return 0
    # First, so that no database connection waits for a Redis that is unavailable.
    await redis.ping()
    return await publisher.publish()


async def _pause(published: int, committed: asyncio.Event, seconds: float) -> float:
    """Wait for the next commit in this process, at most `seconds`; return the next limit."""
    if published:
        await asyncio.sleep(GATHER_SECONDS)
        seconds = POLL_SECONDS
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await committed.wait()
            return POLL_SECONDS
    return min(2 * seconds, MAX_POLL_SECONDS)


class Publisher:
    """Publishes batches of events, and remembers those that fail."""

    def __init__(self, database: Database, redis: RedisClient, max_length: int) -> None:
        self.database = database
        self.redis = redis
        self.max_length = max_length
        #: Whether the last batch has left events that may be published at once.
        self.has_more = False
        #: Halved when the connection breaks, which then repeats fewer events; doubled when it does
        #: not.
        self.window_bytes = WINDOW_BYTES
        #: By the ID of an event, or by topic: the number of failures, and the time until which the
        #: others pass it, by `time.monotonic()`.
        self.failing: dict[int | str, tuple[int, float]] = {}
        self.state = StateLog(logger, "outbox event rejected", "no outbox event is rejected now")

    async def publish(self) -> int:
        """Publish the oldest events, up to a batch; return how many.

        Raises an error of Redis or of its connection if nothing was published. Events that Redis
        has accepted are deleted, also if it rejects others or if the connection is lost.
        """
        accepted: list[int] = []
        failure: Exception | None = None
        async with self.database.acquire() as connection, connection.transaction():
            events = await self._claim(connection)
            try:
                await self._add_to_streams(events, accepted)
            except (RedisError, OSError) as error:
                # Raised after the block, since `acquire` would take it for the database's.
                failure = error
            await connection.execute("delete from outbox where id = any($1)", accepted)
        is_full = len(events) == BATCH or sum(event["bytes"] for event in events) >= BATCH_BYTES
        self.has_more = is_full or len(accepted) < len(events)
        if failure and not accepted:
            raise failure
        if not self.failing:
            self.state.succeeded()
        return len(accepted)

    async def _claim(self, connection: Connection) -> list[Any]:
        """Lock and return the oldest events, without those that wait for their next attempt."""
        now = time.monotonic()
        waiting = [key for key, (_, retry_at) in self.failing.items() if now < retry_at]
        topics = [key for key in waiting if isinstance(key, str)]
        ids = [key for key in waiting if isinstance(key, int)]
        events: list[Any] = await connection.fetch(_CLAIM, BATCH, BATCH_BYTES, topics, ids)
        return events

    async def _add_to_streams(self, events: list[Any], accepted: list[int]) -> None:
        """Add events to their streams, and the IDs of accepted ones to `accepted`."""
        end = time.monotonic() + BATCH_SECONDS
        remaining = deque(events)
        while remaining and time.monotonic() < end:
            window = self._take_window(remaining)
            try:
                await self._add_window(window, accepted)
            except (RedisError, OSError):
                self.window_bytes //= 2
                raise
            self.window_bytes = min(2 * self.window_bytes + 1, WINDOW_BYTES)

    def _take_window(self, remaining: deque[Any]) -> list[Any]:
        """Remove the first events from `remaining` and return them: one at least."""
        window = [remaining.popleft()]
        size = window[0]["bytes"]
        while remaining and size + remaining[0]["bytes"] <= self.window_bytes:
            size += remaining[0]["bytes"]
            window.append(remaining.popleft())
        return window

    async def _add_window(self, window: list[Any], accepted: list[int]) -> None:
        """Send events at once. Raises an error that is not due to a single one of them."""
        unanswered = deque(window)
        failure: Exception | None = None
        limit_seconds = self._limit_seconds(window)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_seconds) as limit, self.redis.lend() as connection:
                commands = [self._command(event) for event in window]
                await connection.send_packed_command(connection.pack_commands(commands))
                while unanswered:
                    error = await _read_error(connection)
                    event = unanswered.popleft()
                    failure = self._conclude(event, error, accepted) or failure
                    limit.reschedule(loop.time() + limit_seconds)
        except (RedisError, OSError) as error:
            self._blame(unanswered, error)
            raise
        if failure:
            raise failure

    def _limit_seconds(self, window: list[Any]) -> float:
        """Return the time limit of each response. It doubles with each failure of the event."""
        size = sum(event["bytes"] for event in window)
        failures, _ = self.failing.get(window[0]["id"], (0, 0.0))
        patience = 2.0 ** min(failures, MAX_DOUBLINGS)
        return float(RESPONSE_SECONDS + size / LINK_BYTES_PER_SECOND * patience)

    def _command(self, event: Any) -> tuple[Any, ...]:
        stream = self.redis.key(event["topic"])
        event_id = str(event["event_id"])
        traceparent = tracing.record_send("redis", event["topic"], event_id, event)
        fields = (
            *("event_id", event_id),
            *("type", event["type"]),
            *("payload", event["payload"]),
            *(("traceparent", traceparent) if traceparent else ()),
        )
        return ("XADD", stream, "MAXLEN", "~", self.max_length, "*", *fields)

    def _conclude(
        self, event: Any, error: ResponseError | None, accepted: list[int]
    ) -> ResponseError | None:
        """Note the response to an event. Return an error that others would get as well."""
        if error is None:
            accepted.append(event["id"])
            self.failing.pop(event["id"], None)
            self.failing.pop(event["topic"], None)
        elif describe(error).startswith(_TOPIC_CODES):
            self._postpone(event["topic"], event, error)
        elif server_code(error):
            return error
        else:
            self._postpone(event["id"], event, error)
        return None

    def _blame(self, unanswered: Sequence[Any], error: Exception) -> None:
        """Note that a connection was lost while an event waited for its response.

        Redis closes the connection at an event that is too large for it. But any event may lose
        its connection once.
        """
        if unanswered and not server_code(error):
            event = unanswered[0]
            self._postpone(event["id"], event, error, tolerated=1)

    def _postpone(self, key: int | str, event: Any, error: Exception, tolerated: int = 0) -> None:
        """Let the other events pass this one, or those of its topic, for a growing time."""
        if len(self.failing) >= MAX_REMEMBERED:
            self.failing.clear()
        failures = self.failing.get(key, (0, 0.0))[0] + 1
        retry_at = 0.0
        if failures > tolerated:
            doublings = min(failures - tolerated - 1, MAX_DOUBLINGS)
            retry_at = time.monotonic() + min(2.0**doublings, MAX_POSTPONED_SECONDS)
            event_id = str(event["event_id"])
            self.state.failed(describe(error), topic=event["topic"], event_id=event_id)
        self.failing[key] = (failures, retry_at)


async def _read_error(connection: Any) -> ResponseError | None:
    """Read a response; return it if it is an error."""
    try:
        await connection.read_response()
    except ResponseError as error:
        return error
    return None


async def update_metrics(connection: Connection, _: int) -> int:
    """Update the backlog's metrics. A periodic job, which never has more work to do."""
    backlog: Any = await connection.fetchrow(_BACKLOG)
    _EVENTS.labels("outbox").set(backlog["events"])
    _LAG.labels("outbox").set(backlog["lag_seconds"])
    return 0
