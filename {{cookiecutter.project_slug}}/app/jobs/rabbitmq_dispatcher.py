"""RabbitMQ hands out the jobs: it pushes their IDs to free workers, and the row decides.

A message that comes a second time starts nothing while the lease of its job holds: after a lost
connection the first start goes on. The relay publishes the job again once its lease has expired.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Self
from uuid import UUID

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue

from app.jobs import job_metrics, starts
from app.jobs.broker import Consumer, Outage, Publisher, dead_letters_of, declare_with_dead_letters
from app.jobs.consume import Inbox, subscriptions
from app.jobs.dispatcher import Receive
from app.jobs.relay import Relay
from app.jobs.starts import Job
from app.settings import Settings
from app.storage.postgres import Connection, Database
from app.tasks import background_task

logger = logging.getLogger("app.jobs")


class RabbitMQDelivery:
    """A message with the ID of a job. Unless it is acknowledged, RabbitMQ delivers it again."""

    def __init__(self, message: AbstractIncomingMessage, job_id: UUID) -> None:
        self.message = message
        self.job_id = job_id
        #: RabbitMQ starts no job.
        self.job: Job | None = None

    async def claim(self, connection: Connection) -> Job | None:
        """Start the job, unless it has ended, or has been started."""
        return await starts.claim(connection, self.job_id)

    async def is_suspect(self, connection: Connection) -> bool:
        """Return whether the lease of the job has expired."""
        return await starts.has_expired(connection, self.job_id)

    async def claim_expired(self, connection: Connection) -> Job | None:
        """Start the job, unless it has ended, or another worker has started it."""
        return await starts.claim_expired(connection, self.job_id)

    async def settle(self) -> None:
        """Acknowledge the message. Without a connection it comes again, and starts nothing."""
        with contextlib.suppress(Exception):
            await self.message.ack()

    async def discard(self) -> None:
        """Dead-letter the message."""
        with contextlib.suppress(Exception):
            await self.message.reject(requeue=False)


class RabbitMQDispatcher:
    """Publishes the jobs that are due, and receives those that RabbitMQ hands out."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings = settings
        self.url = settings.amqp_url.get_secret_value()
        self.queue = f"{settings.service_name}.jobs"
        self.label = f"{settings.service_name}@{socket.gethostname()}"
        self.outage = Outage("RabbitMQ unavailable", "RabbitMQ available again")
        self.publisher = Publisher(self.url, f"{self.label} publishes", self.outage, self._declare)
        self.relay = Relay(database, self.publisher, self.queue)
        self.consumer: Consumer | None = None
        self.inboxes = [Inbox(each, database, self.publisher) for each in subscriptions.all]
        for each in subscriptions.all:
            self.relay.other_queues += [each.queue, dead_letters_of(each.queue)]
        self.consumers: list[Consumer] = []
        self.stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        for work in (self.publisher.run(), self.relay.publish_due(), self.relay.recover()):
            await self.stack.enter_async_context(background_task(work))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    @property
    def checks(self) -> Mapping[str, Callable[[], Awaitable[object]]]:
        """The readiness check of RabbitMQ."""
        return {"rabbitmq": self.check}

    async def check(self) -> None:
        """Ask RabbitMQ for the queue. Raises on any failure."""
        for link in (self.publisher, self.consumer):
            if link is not None:
                await link.check()
        await self.publisher.count_ready(self.queue)

    async def start(self, receive: Receive) -> None:
        """Begin to hand out jobs, in the background."""

        async def receive_message(message: AbstractIncomingMessage) -> None:
            delivery = _parse(message)
            if delivery is None:
                await _discard_unreadable(message)
            else:
                receive(delivery)

        self.consumer = Consumer(
            self.url,
            self.label,
            self.outage,
            self._declare,
            receive_message,
            self.settings.job_concurrency,
        )
        inboxes = [inbox.connect(self.url, self.label, self.outage) for inbox in self.inboxes]
        self.consumers = [self.consumer, *inboxes]
        for consumer in self.consumers:
            await self.stack.enter_async_context(background_task(consumer.run()))

    async def stop(self) -> None:
        """Hand out no more jobs. Those under way keep their messages."""
        await asyncio.gather(*(consumer.stop() for consumer in self.consumers))

    async def _declare(self, _: AbstractConnection, channel: AbstractChannel) -> AbstractQueue:
        return await declare_with_dead_letters(channel, self.queue)


def _parse(message: AbstractIncomingMessage) -> RabbitMQDelivery | None:
    """Return the delivery of a message, or None if its ID is that of no job."""
    try:
        return RabbitMQDelivery(message, UUID(message.message_id or ""))
    except ValueError:
        return None


async def _discard_unreadable(message: AbstractIncomingMessage) -> None:
    """Dead-letter a message that this service has not published."""
    job_metrics.HANDLED.labels("unknown", "unreadable").inc()
    logger.error("message without the ID of a job: it is dead-lettered")
    with contextlib.suppress(Exception):
        await message.reject(requeue=False)
