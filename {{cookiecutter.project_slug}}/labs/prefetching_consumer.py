"""A consumer with a prefetch of 10. It looks fast: ten messages are always here.

It handles them one by one, as every loop over messages does, with `async` or without it.

Usage: `python -m labs.prefetching_consumer`, with DATABASE_URL, WAIT_SECONDS and STEPS. AMQP_URL
reads messages from RabbitMQ, in place of the table.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aio_pika
import asyncpg

from labs.computation import compute

PREFETCH = 10
QUEUE = "lab"
POLL_SECONDS = 0.05
_TAKE = """
    update lab_messages set taken_at = now() where number in (
        select number from lab_messages where taken_at is null
        order by number limit $1 for update skip locked
    ) returning number
"""
_START = """
    update lab_messages set taken_at = to_timestamp($2), started_at = clock_timestamp()
    where number = $1
"""
_END = "update lab_messages set finished_at = clock_timestamp() where number = $1"


class Message(NamedTuple):
    """A message, and when it was taken from the queue."""

    number: int
    taken_at: float


async def main() -> None:
    """Consume until the process is killed."""
    database = await asyncpg.connect(os.environ["DATABASE_URL"])
    amqp_url = os.environ.get("AMQP_URL")
    messages = from_rabbitmq(amqp_url) if amqp_url else from_postgres(database)
    async for message in messages:
        await handle(database, message)


async def handle(database: Any, message: Message) -> None:
    """Wait as for another service, compute, store."""
    await database.execute(_START, message.number, message.taken_at)
    await asyncio.sleep(float(os.environ["WAIT_SECONDS"]))
    compute(int(os.environ["STEPS"]))
    await database.execute(_END, message.number)


async def from_postgres(database: Any) -> AsyncIterator[Message]:
    """Yield messages of the table. Ten are taken at once."""
    while True:
        rows = await database.fetch(_TAKE, PREFETCH)
        taken_at = time.time()
        for number in sorted(row["number"] for row in rows):
            yield Message(number, taken_at)
        if not rows:
            await asyncio.sleep(POLL_SECONDS)


async def from_rabbitmq(url: str) -> AsyncIterator[Message]:
    """Yield messages of the queue. RabbitMQ sends ten ahead of the acknowledgements."""
    waiting: asyncio.Queue[Any] = asyncio.Queue()

    async def receive(message: Any) -> None:
        # A client library has such a buffer inside.
        await waiting.put((message, time.time()))

    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        queue = await channel.declare_queue(QUEUE, durable=True)
        await queue.consume(receive)
        while True:
            message, taken_at = await waiting.get()
            yield Message(int(message.body), taken_at)
            # It was handled, since the loop asks for the next one.
            await message.ack()


if __name__ == "__main__":
    asyncio.run(main())
