"""Messages of other services: each becomes a job, once.

@consume("conversation-ended", "conversation.ended", Ended, key="conversation_id")
async def score(run: Run, ended: Ended) -> None:
    ...

The worker stores a message as a job, and acknowledges it after the commit: the job is then done and
retried like any other. A message whose body does not fit is dead-lettered, with the reason.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import aio_pika
import asyncpg
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import ChannelNotFoundEntity
from pydantic import BaseModel, ValidationError

from app.jobs import table
from app.jobs.broker import (
    QUORUM,
    Consumer,
    Outage,
    Publisher,
    dead_letters_of,
    declare_with_dead_letters,
)
from app.jobs.handlers import Function, Handlers, Payload, handlers
from app.storage.postgres import Database
from app.tasks import StateLog, describe
from app.telemetry.context import request_context

#: Messages at once, of each queue. Storing one takes milliseconds.
PREFETCH = 8
#: Pause between two attempts to store a message, or to dead-letter it.
HOLD_SECONDS = 0.5
#: The header of a dead-lettered message, and the length of its text.
REASON = "x-reason"
MAX_REASON = 500
logger = logging.getLogger("app.jobs")


class Subscription(NamedTuple):
    """A queue of other services' messages, and the job that each becomes."""

    queue: str
    kind: str
    payload: type[BaseModel]
    #: The field of the payload that identifies the job; without one, the ID of the message does.
    key: str | None
    #: The exchange and the routing key that the queue is bound to, if any.
    exchange: str | None
    routing_key: str


class Subscriptions:
    """The subscriptions of a worker."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.all: list[Subscription] = []

    def consume(
        self,
        queue: str,
        kind: str,
        payload: type[Payload],
        *,
        key: str | None = None,
        exchange: str | None = None,
        routing_key: str = "",
        attempts: int = 5,
        timeout_seconds: float = 60,
    ) -> Callable[[Function[Payload]], Function[Payload]]:
        """Have the decorated function do a job for each message of a queue.

        The queue is declared if it does not exist. With `exchange` it is bound to that one, by
        `routing_key`; the exchange belongs to the service that publishes. `key` names the field of
        the payload that identifies the job: messages with the same value are one job. `kind`,
        `attempts` and `timeout_seconds` are those of `handlers.add`, which may be below.

        Raises `ValueError` if the payload has no such field.
        """
        if key is not None and key not in payload.model_fields:
            msg = f"{payload.__name__} has no field {key}"
            raise ValueError(msg)
        subscription = Subscription(queue, kind, payload, key, exchange, routing_key)

        def add(function: Function[Payload]) -> Function[Payload]:
            existing = self.handlers.by_type.get(kind)
            if existing is None or existing.function is not function:
                options = {"attempts": attempts, "timeout_seconds": timeout_seconds}
                self.handlers.add(kind, payload, **options)(function)  # type: ignore[arg-type]
            self.all.append(subscription)
            return function

        return add


#: The subscriptions of the features, which add theirs when they are imported.
subscriptions = Subscriptions(handlers)
consume = subscriptions.consume


def _describe(problem: Any) -> str:
    """Return one problem of pydantic's as `field: what it must be`."""
    place = ".".join(map(str, problem["loc"]))
    return f"{place or 'body'}: {problem['msg']}"


class MisfitError(Exception):
    """A message that can never become a job. Its text contains nothing of the body."""


class Inbox:
    """Stores the messages of a subscription as jobs."""

    def __init__(
        self, subscription: Subscription, database: Database, publisher: Publisher
    ) -> None:
        self.subscription = subscription
        self.database = database
        self.publisher = publisher
        subject = f"messages of {subscription.queue}"
        self.state = StateLog(logger, f"{subject} cannot be stored", f"{subject} are stored again")

    def connect(self, url: str, label: str, outage: Outage) -> Consumer:
        """Return a consumer with a connection of its own: its errors end no other."""
        name = f"{label} consumes {self.subscription.queue}"
        return Consumer(url, name, outage, self.declare, self.receive, PREFETCH)

    async def declare(
        self, connection: AbstractConnection, channel: AbstractChannel
    ) -> AbstractQueue:
        """Declare the queue unless it exists, and bind it. Its dead letters have one of their own.

        An existing queue may have other arguments: it can belong to another service.
        """
        name = self.subscription.queue
        try:
            # On a channel of its own, which the error closes.
            async with connection.channel() as probe:
                await probe.declare_queue(name, passive=True)
        except ChannelNotFoundEntity:
            queue = await declare_with_dead_letters(channel, name)
        else:
            dead = dead_letters_of(name)
            await channel.declare_queue(dead, durable=True, arguments=QUORUM)
            queue = await channel.get_queue(name)
        if self.subscription.exchange is not None:
            await queue.bind(self.subscription.exchange, self.subscription.routing_key)
        return queue

    async def receive(self, message: AbstractIncomingMessage) -> None:
        """Store a message and acknowledge it, or dead-letter it. Hold it during an outage."""
        try:
            await self._store(message)
        except MisfitError as error:
            await self._dead_letter(message, str(error))
        # Without the connection it comes again: its key makes it the same job.
        with contextlib.suppress(Exception):
            await message.ack()

    async def _store(self, message: AbstractIncomingMessage) -> None:
        """Create the job, as soon as Postgres responds. Raises `MisfitError`."""
        payload = self._parse(message.body)
        key = self._key(message, payload)
        request_id = (message.headers or {}).get("x-request-id") or message.message_id
        request_context.set({"request_id": str(request_id or "")})
        while True:
            try:
                async with self.database.acquire() as connection, connection.transaction():
                    await table.enqueue(connection, self.subscription.kind, payload, key)
            except asyncpg.DataError as error:
                msg = f"Postgres cannot store it: {type(error).__name__}"
                raise MisfitError(msg) from None
            except table.InvalidKeyError as error:
                raise MisfitError(str(error)) from None
            except Exception as error:  # noqa: BLE001 - no error loses the message
                self.state.failed(describe(error))
                # Put back, it would come again at once, and count as a failed delivery.
                await asyncio.sleep(HOLD_SECONDS)
            else:
                self.state.succeeded()
                return

    def _parse(self, body: bytes) -> BaseModel:
        try:
            return self.subscription.payload.model_validate_json(body)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False, include_context=False)
            raise MisfitError("; ".join(map(_describe, problems))[:MAX_REASON]) from None

    def _key(self, message: AbstractIncomingMessage, payload: BaseModel) -> str:
        """Return what identifies the job, or one message delivered twice would be two jobs."""
        value = getattr(payload, self.subscription.key) if self.subscription.key else None
        if value is not None:
            return str(value)
        if message.message_id:
            return message.message_id
        msg = "without a message_id, and without a key"
        raise MisfitError(msg)

    async def _dead_letter(self, message: AbstractIncomingMessage, reason: str) -> None:
        """Publish a copy with the reason to the dead letters, as soon as RabbitMQ accepts it."""
        queue = self.subscription.queue
        logger.error("message dead-lettered: %s", reason, extra={"queue": queue})
        copy = aio_pika.Message(
            message.body,
            headers={**message.headers, REASON: reason},
            message_id=message.message_id,
            type=message.type,
            content_type=message.content_type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        while True:
            try:
                await self.publisher.publish(dead_letters_of(queue), copy)
            except Exception:  # noqa: BLE001 - such as an outage, which the connection logs
                await asyncio.sleep(HOLD_SECONDS)
            else:
                return
