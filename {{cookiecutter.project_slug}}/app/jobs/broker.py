"""RabbitMQ: connections that are opened again, quorum queues, and publishing with confirms.

A publisher has a connection of its own. While RabbitMQ is short of memory or disk, it reads nothing
from a connection that publishes, not even acknowledgements.

Each connection belongs to a loop that opens it again, with its channel, queues and consumer. The
robust connections of aio-pika do that too, but they log the cause, with a traceback, and do not
return it: no readiness check could report it.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import AMQPChannelError
from pamqp.commands import Basic
from pamqp.common import FieldTable
from yarl import URL

from app.tasks import StateLog, describe

#: RabbitMQ is unavailable if it sends nothing for three times as long. So is a worker to RabbitMQ
#: if its event loop is blocked for twice as long.
HEARTBEAT_SECONDS = 10
#: The shortest pause between two attempts to connect; the longest is twice as long.
RECONNECT_SECONDS = 1.0
#: Time limit for a connect, with its channel, queues and consumer.
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 1.0
#: How long a publisher may wait until RabbitMQ accepts messages again.
READY_SECONDS = 1.0
#: The table counts the starts of a job. The limit of the queue, by default 20 from RabbitMQ 4.0 on,
#: ends only messages that never get that far.
DELIVERY_LIMIT = 1000
QUORUM: FieldTable = {"x-queue-type": "quorum"}

Receive = Callable[[AbstractIncomingMessage], Awaitable[None]]
logger = logging.getLogger("app.jobs")
# They log each attempt to connect, with tracebacks. This module logs each change.
for name in ("aio_pika", "aiormq"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


class Outage:
    """The log of the connections that fail together: one line when it begins, one when it ends."""

    def __init__(self, failure: str, recovery: str) -> None:
        self.log = StateLog(logger, failure, recovery)
        self.failing: set[Link] = set()

    def failed(self, link: "Link", reason: str) -> None:
        """Log that a connection has failed, unless another has for the same cause."""
        self.failing.add(link)
        self.log.failed(reason)

    def succeeded(self, link: "Link") -> None:
        """Log the recovery when the last connection is open again."""
        self.failing.discard(link)
        if not self.failing:
            self.log.succeeded()


class Link:
    """One connection with one channel. Both are opened again when either ends."""

    def __init__(self, url: str, label: str, outage: Outage, declare: "Declare") -> None:
        """`label`: the name of the connection in RabbitMQ's own tools."""
        self.declare = declare
        given = URL(url)
        self.url = given if "heartbeat" in given.query else given % {"heartbeat": HEARTBEAT_SECONDS}
        self.label = label
        self.outage = outage
        subject = f"what {label} declares"
        self.rejection = StateLog(
            logger, f"RabbitMQ rejects {subject}", f"RabbitMQ accepts {subject} again"
        )
        self.connection: AbstractConnection | None = None
        self.channel: AbstractChannel | None = None
        self.is_open = asyncio.Event()
        #: Set after the first attempt to connect.
        self.was_tried = asyncio.Event()
        self.reason = "not connected"

    async def run(self) -> None:
        """Keep the connection open until cancelled."""
        while True:
            try:
                await self._serve()
            except AMQPChannelError as error:
                # The connection works. An exchange is missing, a queue has other arguments, or the
                # user lacks a permission.
                self.reason = describe(error)
                self.outage.succeeded(self)
                self.rejection.failed(self.reason)
                self.was_tried.set()
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                self.reason = describe(error)
                self.outage.failed(self, self.reason)
                self.was_tried.set()
            # Random, or all workers would come back at once.
            await asyncio.sleep(RECONNECT_SECONDS * random.uniform(1, 2))  # noqa: S311

    def require_channel(self) -> AbstractChannel:
        """Return the channel. Raises `ConnectionError` with the reason if there is none."""
        if self.channel is None:
            raise ConnectionError(self.reason)
        return self.channel

    async def check(self) -> None:
        """Raise `ConnectionError` with the reason if there is no connection."""
        await self.was_tried.wait()
        self.require_channel()

    async def prepare(self, connection: AbstractConnection, channel: AbstractChannel) -> None:
        """Declare the queue on a new channel."""
        await self.declare(connection, channel)

    async def _serve(self) -> None:
        """Open the connection, and wait for its end. Raises what has ended it."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as stack:
            async with asyncio.timeout(CONNECT_SECONDS):
                properties: FieldTable = {"connection_name": self.label}
                connection = await aio_pika.connect(self.url, client_properties=properties)
                stack.push_async_callback(_close, connection)
                channel = await connection.channel(on_return_raises=True)
                await _watch(channel, ended)
                await self.prepare(connection, channel)
            self.connection = connection
            self.channel = channel
            self.is_open.set()
            self.was_tried.set()
            stack.callback(self._forget)
            self.outage.succeeded(self)
            self.rejection.succeeded()
            await ended

    def _forget(self) -> None:
        self.is_open.clear()
        self.connection = None
        self.channel = None


async def _watch(channel: AbstractChannel, ended: "asyncio.Future[None]") -> None:
    """End the future with an exception when the channel, or a consumer of it, has ended."""

    def fail(error: BaseException) -> None:
        if not ended.done():
            ended.set_exception(error)
            # It may come during the connect, when nothing waits for it. asyncio would log that.
            ended.exception()

    def on_close(_: AbstractChannel | None, error: BaseException | None) -> None:
        # A cancellation would look like that of the loop.
        fail(error if isinstance(error, Exception) else ConnectionError("connection closed"))

    def on_cancel(_: Basic.Cancel) -> None:
        # Its queue was deleted, or a message was held too long.
        fail(ConnectionError("RabbitMQ has cancelled the consumer"))

    channel.close_callbacks.add(on_close)
    underlay = await channel.get_underlay_channel()
    underlay.on_consumer_cancel_callbacks.add(on_cancel)


async def _close(connection: AbstractConnection) -> None:
    """Close a connection, whatever its state is, within a second."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_SECONDS):
            await connection.close()


class Publisher(Link):
    """Publishes messages; each is confirmed when a majority of the queue's replicas has it."""

    def __init__(self, url: str, label: str, outage: Outage, declare: "Declare") -> None:
        super().__init__(url, label, outage, declare)
        #: The channel on which messages are counted, by one caller at a time.
        self.counting: AbstractChannel | None = None
        self.is_counting = asyncio.Lock()

    async def ready(self) -> None:
        """Return while RabbitMQ accepts messages.

        Raises `ConnectionError` if there is no connection, or if RabbitMQ blocks publishers, since
        it is short of memory or disk.
        """
        self.require_channel()
        transport = self.connection.transport if self.connection else None
        if transport is None:
            raise ConnectionError(self.reason)
        try:
            async with asyncio.timeout(READY_SECONDS):
                await transport.ready()
        except TimeoutError as error:
            msg = "RabbitMQ blocks publishers: it is short of memory or disk"
            raise ConnectionError(msg) from error

    async def publish(self, queue: str, message: aio_pika.Message) -> None:
        """Return when RabbitMQ has confirmed a message. Raises an error if no queue accepts it."""
        channel = self.require_channel()
        # Mandatory: without the queue the message comes back, and is no silent loss.
        await channel.default_exchange.publish(message, queue, mandatory=True)

    async def count_ready(self, queue: str) -> int:
        """Return how many messages wait in a queue. Raises an error if there is no such queue."""
        async with self.is_counting:
            if self.connection is None:
                raise ConnectionError(self.reason)
            # On a channel of its own: an error, and a timeout as well, closes the channel.
            channel = self.counting or await self.connection.channel(publisher_confirms=False)
            self.counting = None
            underlay = await channel.get_underlay_channel()
            declared = await underlay.queue_declare(queue, passive=True)
            # It stays open. With one per count, a busy machine has seen RabbitMQ end the connection
            # of the publisher: 504, "expected 'channel.open'".
            self.counting = channel
        return int(declared.message_count or 0)

    def _forget(self) -> None:
        super()._forget()
        self.counting = None


class Consumer(Link):
    """Receives the messages of a queue, `prefetch` at most until they are acknowledged."""

    def __init__(
        self,
        url: str,
        label: str,
        outage: Outage,
        declare: "Declare",
        receive: Receive,
        prefetch: int,
    ) -> None:
        super().__init__(url, label, outage, declare)
        self.receive = receive
        self.prefetch = prefetch
        self.is_stopping = False
        self.consuming: tuple[AbstractQueue, str] | None = None

    async def prepare(self, connection: AbstractConnection, channel: AbstractChannel) -> None:
        """Declare the queue and consume from it, unless this process shuts down."""
        await channel.set_qos(prefetch_count=self.prefetch)
        queue = await self.declare(connection, channel)
        if not self.is_stopping:
            self.consuming = (queue, await queue.consume(self.receive))

    async def stop(self) -> None:
        """Receive no more messages. Those that were received can still be acknowledged."""
        self.is_stopping = True
        if self.channel is None or self.consuming is None:
            return
        queue, tag = self.consuming
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_SECONDS):
                await queue.cancel(tag)


#: Declares what a connection needs, and returns its queue.
Declare = Callable[[AbstractConnection, AbstractChannel], Awaitable[AbstractQueue]]


async def declare_with_dead_letters(channel: AbstractChannel, name: str) -> AbstractQueue:
    """Declare a queue, and `NAME.dead` for the messages that are rejected.

    RabbitMQ refuses to declare a queue again with other arguments: change the name with them.
    """
    dead = dead_letters_of(name)
    await channel.declare_queue(dead, durable=True, arguments=QUORUM)
    arguments: FieldTable = {
        "x-overflow": "reject-publish",
        # Requires reject-publish. A message leaves the queue once the other one has it.
        "x-dead-letter-strategy": "at-least-once",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
        "x-delivery-limit": DELIVERY_LIMIT,
    }
    return await channel.declare_queue(name, durable=True, arguments=QUORUM | arguments)


def dead_letters_of(queue: str) -> str:
    """Return the name of the queue of its dead letters."""
    return f"{queue}.dead"
