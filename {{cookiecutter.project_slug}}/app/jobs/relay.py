"""Publishes the IDs of jobs to RabbitMQ: of jobs that are due, and of those that were lost.

Each worker does so; `skip locked` gives each row to one of them. A crash between the publishing and
the commit publishes a job twice, which does no harm: its row allows one start.
"""

import asyncio
import contextlib
import json
import logging
from typing import Any

import aio_pika
from aio_pika.exceptions import ChannelNotFoundEntity
from prometheus_client import Gauge

from app.jobs.broker import Publisher, dead_letters_of
from app.storage.postgres import Database
from app.tasks import StateLog, describe
from app.telemetry import tracing

POLL_SECONDS = 0.1
#: Pause after a failure.
PAUSE_SECONDS = 1.0
#: How often the relay looks for jobs that were lost.
RECOVER_SECONDS = 5.0
#: Jobs of one transaction.
BATCH = 200
#: Time limit for their confirms, during which their rows are locked.
PUBLISH_SECONDS = 5.0
#: A message that was published this long ago, and waits in no queue, is lost.
LOST_SECONDS = 30.0
_WAITING = Gauge(
    "rabbitmq_queue_messages_ready", "Messages that wait in a queue of RabbitMQ.", ["queue"]
)
_LOCKED = "order by run_at limit $1 for update skip locked"
#: Of the index jobs_unpublished.
_DUE = f"""
    select job_id, type, context from jobs
    where status = 'queued' and published_at is null and run_at <= now() {_LOCKED}
"""  # noqa: S608
#: Jobs whose worker is dead or hangs: each is published once per lease that has expired.
_EXPIRED = f"""
    select job_id, type, context from jobs
    where status = 'running' and lease_until < now()
        and (published_at is null or published_at < lease_until) {_LOCKED}
"""  # noqa: S608
#: Jobs whose message is gone, such as with a queue that was purged. Only while the queue is empty:
#: a long backlog is no loss, and would grow with each message that is published again.
_LOST = f"""
    select job_id, type, context from jobs
    where published_at < now() - make_interval(secs => $2)
        and (status = 'queued' or (status = 'running' and lease_until < now())) {_LOCKED}
"""  # noqa: S608
_MARK = "update jobs set published_at = now() where job_id = any($1)"
logger = logging.getLogger("app.jobs")


class Relay:
    """Publishes the jobs of a table to a queue."""

    def __init__(self, database: Database, publisher: Publisher, queue: str) -> None:
        self.database = database
        self.publisher = publisher
        self.queue = queue
        #: Queues whose messages are counted as well.
        self.other_queues = [dead_letters_of(queue)]

    async def publish_due(self) -> None:
        """Publish jobs that are due, until cancelled. Outages only delay them."""
        state = StateLog(logger, "jobs cannot be published", "jobs are published again")
        while True:
            # An outage of RabbitMQ is logged by the connection.
            await self.publisher.is_open.wait()
            try:
                published = await self.publish(_DUE)
                state.succeeded()
                await asyncio.sleep(0 if published == BATCH else POLL_SECONDS)
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                state.failed(describe(error))
                await asyncio.sleep(PAUSE_SECONDS)

    async def recover(self) -> None:
        """Publish jobs again whose worker or message is gone, until cancelled."""
        state = StateLog(logger, "lost jobs cannot be recovered", "lost jobs are recovered again")
        while True:
            await self.publisher.is_open.wait()
            try:
                await self.recover_once()
                state.succeeded()
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                state.failed(describe(error))
            await asyncio.sleep(RECOVER_SECONDS)

    async def recover_once(self) -> None:
        """Publish lost jobs, and count the messages that wait."""
        expired = await self.publish(_EXPIRED)
        if expired:
            logger.warning("%d jobs are published again: their leases expired", expired)
        if await self._count(self.queue) == 0:
            lost = await self.publish(_LOST, LOST_SECONDS)
            if lost:
                logger.warning("%d jobs are published again: RabbitMQ lost them", lost)
        for name in self.other_queues:
            with contextlib.suppress(ChannelNotFoundEntity):
                await self._count(name)

    async def _count(self, queue: str) -> int:
        """Set the metric of a queue, and return how many messages wait there."""
        number = await self.publisher.count_ready(queue)
        _WAITING.labels(queue).set(number)
        return number

    async def publish(self, query: str, *arguments: float) -> int:
        """Publish the jobs of a query, `BATCH` at most; return how many."""
        # Before a connection to Postgres is taken: an outage of RabbitMQ must not hold one.
        await self.publisher.ready()
        async with self.database.acquire() as connection:
            # Without a transaction, which would cost two more round trips each time.
            if not await connection.fetch(query, 1, *arguments):
                return 0
            async with connection.transaction():
                rows = await connection.fetch(query, BATCH, *arguments)
                await self._send(rows)
                await connection.execute(_MARK, [row["job_id"] for row in rows])
        return len(rows)

    async def _send(self, rows: list[Any]) -> None:
        """Publish messages, and wait for all their confirms. Raises the first error."""
        sends = [self.publisher.publish(self.queue, _create_message(row)) for row in rows]
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                results = await asyncio.gather(*sends, return_exceptions=True)
        except TimeoutError as error:
            # Not as it is: around a connection of Postgres it would look like one of Postgres'.
            msg = f"RabbitMQ has not confirmed {len(rows)} messages in {PUBLISH_SECONDS:g} s"
            raise ConnectionError(msg) from error
        for result in results:
            if isinstance(result, BaseException):
                raise result


def _create_message(row: Any) -> aio_pika.Message:
    """Return the message of a job: its ID, and the IDs of the request that created it."""
    context = json.loads(row["context"])
    headers = {"x-request-id": context.get("request_id", "")}
    headers |= {name: context[name] for name in tracing.CARRIER_KEYS & context.keys()}
    return aio_pika.Message(
        b"",
        message_id=str(row["job_id"]),
        type=row["type"],
        headers=dict(headers),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
    )
