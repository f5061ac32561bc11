"""Messages of other services: each becomes a job once, or a dead letter with the reason."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractChannel
from pydantic import BaseModel

from app.errors import UnavailableError
from app.jobs import consume as consume_module
from app.jobs import table
from app.jobs.consume import REASON, Subscriptions
from app.jobs.handlers import Handlers, Run, handlers
from app.jobs.rabbitmq_dispatcher import RabbitMQDispatcher
from app.settings import Settings
from app.storage.postgres import Database
from scripts.dev_rabbitmq import RabbitMQ
from tests.jobs.conftest import Environment, until
from tests.patience import patience

pytestmark = pytest.mark.process


class Ended(BaseModel):
    """A message of another service."""

    conversation_id: int
    note: str = ""
    reference: str | None = None


@pytest.fixture
def dispatcher(rabbitmq: RabbitMQ) -> Environment:
    return {"AMQP_URL": rabbitmq.url, "SERVICE_NAME": f"consume-{uuid4().hex[:8]}"}


@pytest.fixture
def queue(dispatcher: Environment) -> str:
    return f"{dispatcher['SERVICE_NAME']}.ended"


@pytest.fixture
async def channel(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    """A channel of the other service."""
    async with await aio_pika.connect(rabbitmq.url) as connection:
        yield await connection.channel(on_return_raises=True)


Subscribe = Callable[..., Subscriptions]


@pytest.fixture
def subscribe(monkeypatch: pytest.MonkeyPatch, queue: str) -> Subscribe:
    """Adds the only subscription of a worker."""
    monkeypatch.setattr(consume_module, "HOLD_SECONDS", 0.02)
    own = Subscriptions(Handlers())
    monkeypatch.setattr("app.jobs.rabbitmq_dispatcher.subscriptions", own)

    def subscribe(**options: Any) -> Subscriptions:
        @own.consume(queue, "conversation.ended", Ended, **options)
        async def score(run: Run, ended: Ended) -> None:
            pass

        return own

    return subscribe


@contextlib.asynccontextmanager
async def consuming(settings: Settings, database: Database) -> AsyncIterator[None]:
    """Consume during the block; the jobs themselves are not done."""
    async with RabbitMQDispatcher(settings, database) as dispatcher:
        await dispatcher.start(lambda _: None)
        yield
        await dispatcher.stop()


async def publish(
    channel: AbstractChannel, queue: str, body: object, message_id: str = "", **headers: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = aio_pika.Message(content, message_id=message_id or "m-1", headers=dict(headers))
    # The consumer declares the queue.
    async with patience(10):
        while True:
            with contextlib.suppress(aio_pika.exceptions.DeliveryError):
                await channel.default_exchange.publish(message, queue)
                return
            await asyncio.sleep(0.02)


async def jobs(database: Database) -> list[asyncpg.Record]:
    found: list[asyncpg.Record] = await database.pool.fetch(
        "select * from jobs order by created_at"
    )
    return found


async def dead_letter(channel: AbstractChannel, queue: str) -> aio_pika.abc.AbstractIncomingMessage:
    """Wait for a dead letter, and take it."""
    found: list[aio_pika.abc.AbstractIncomingMessage] = []
    dead = await channel.get_queue(f"{queue}.dead", ensure=False)

    async def arrives() -> bool:
        message = await dead.get(no_ack=True, fail=False)
        if message:
            found.append(message)
        return bool(found)

    await until(arrives)
    return found[0]


async def test_messages_become_jobs_once(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    subscribe: Subscribe,
) -> None:
    """The same key is the same job; its log lines have the request ID of the publisher."""
    subscribe(key="conversation_id")
    async with consuming(settings, database):
        for number in (1, 1, 2):
            headers = {"x-request-id": f"r-{number}"}
            await publish(channel, queue, {"conversation_id": number}, uuid4().hex, **headers)

        async def are_stored() -> bool:
            state = await channel.declare_queue(queue, passive=True)
            return len(await jobs(database)) == 2 and state.declaration_result.message_count == 0

        await until(are_stored)
    found = await jobs(database)
    assert [(job["type"], job["key"]) for job in found] == [
        ("conversation.ended", "1"),
        ("conversation.ended", "2"),
    ]
    assert json.loads(found[0]["payload"]) == {"conversation_id": 1, "note": "", "reference": None}
    assert json.loads(found[0]["context"]) == {"request_id": "r-1"}


async def test_message_id_is_the_key_by_default(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    subscribe: Subscribe,
) -> None:
    subscribe()
    async with consuming(settings, database):
        for message_id in ("m-1", "m-1", "m-2"):
            await publish(channel, queue, {"conversation_id": 7}, message_id)
        await until(lambda: database.pool.fetchval("select count(*) = 2 from jobs"))
    assert {job["key"] for job in await jobs(database)} == {"m-1", "m-2"}


async def test_message_without_a_value_of_its_key_has_that_of_its_id(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    subscribe: Subscribe,
) -> None:
    """Two messages without one are two jobs. A key that no index holds is a dead letter."""
    subscribe(key="reference")
    async with consuming(settings, database):
        for message_id in ("m-1", "m-2"):
            await publish(channel, queue, {"conversation_id": 7}, message_id)
        await publish(channel, queue, {"conversation_id": 7, "reference": "x" * 10_000}, "m-3")
        dead = await dead_letter(channel, queue)
        await until(lambda: database.pool.fetchval("select count(*) = 2 from jobs"))
    assert {job["key"] for job in await jobs(database)} == {"m-1", "m-2"}
    reason = "the key of a job must have 2000 bytes at most, not 10000"
    assert (dead.message_id, dead.headers[REASON]) == ("m-3", reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff not JSON", "body: Invalid JSON"),
        ({"note": "hunter2"}, "conversation_id: Field required"),
        ({"conversation_id": "hunter2"}, "conversation_id: Input should be a valid integer"),
    ],
)
async def test_body_that_does_not_fit_is_dead_lettered_with_the_reason(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    subscribe: Subscribe,
    caplog: pytest.LogCaptureFixture,
    body: object,
    reason: str,
) -> None:
    """The body itself is in no log line."""
    subscribe()
    async with consuming(settings, database):
        await publish(channel, queue, body)
        dead = await dead_letter(channel, queue)
    assert str(dead.headers[REASON]).startswith(reason)
    assert dead.message_id == "m-1"
    assert await jobs(database) == []
    assert "message dead-lettered" in caplog.text
    assert "hunter2" not in caplog.text


async def test_messages_are_held_while_postgres_is_unavailable(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    subscribe: Subscribe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None is put back, which would count as a failed delivery, nor dead-lettered."""
    subscribe()
    attempts = 0
    enqueue = table.enqueue

    async def fail_at_first(*arguments: Any) -> object:
        nonlocal attempts
        attempts += 1
        if attempts <= 5:
            raise UnavailableError("Postgres is unavailable.")
        return await enqueue(*arguments)

    monkeypatch.setattr(table, "enqueue", fail_at_first)
    async with consuming(settings, database):
        await publish(channel, queue, {"conversation_id": 7})
        await until(lambda: database.pool.fetchval("select count(*) = 1 from jobs"))
    assert attempts == 6


async def test_queue_of_another_service_is_used_as_it_is_and_bound(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    subscribe: Subscribe,
) -> None:
    """A classic queue; declared again as a quorum queue, it would be an error 406."""
    exchange = await channel.declare_exchange(f"{queue}.events", "topic", auto_delete=True)
    await channel.declare_queue(queue, durable=True)
    subscribe(exchange=exchange.name, routing_key="conversation.*")
    async with consuming(settings, database):
        message = aio_pika.Message(b'{"conversation_id": 7}', message_id="m-1")

        async def is_stored() -> bool:
            # Until the queue is bound, nothing accepts it.
            with contextlib.suppress(aio_pika.exceptions.DeliveryError):
                await exchange.publish(message, "conversation.ended")
            return bool(await jobs(database))

        await until(is_stored)
    await channel.queue_delete(queue)
    assert len(await jobs(database)) == 1


async def test_missing_exchange_is_reported_and_disturbs_no_job(
    settings: Settings,
    database: Database,
    queue: str,
    subscribe: Subscribe,
    caplog: pytest.LogCaptureFixture,
) -> None:
    subscribe(exchange=f"{queue}.missing")
    async with RabbitMQDispatcher(settings, database) as dispatcher:
        await dispatcher.start(lambda _: None)
        await dispatcher.consumers[1].was_tried.wait()
        await dispatcher.check()
    lines = [line for line in caplog.messages if "RabbitMQ" in line]
    assert len(lines) == 1
    assert f"consumes {queue} declares: ChannelNotFoundEntity" in lines[0]
    assert f"no exchange '{queue}.missing'" in lines[0]


def test_consumer_and_handler_of_a_type_are_one_function() -> None:
    own = Subscriptions(Handlers())

    @own.consume("ended", "conversation.ended", Ended)
    @own.handlers.add("conversation.ended", Ended, attempts=7)
    async def score(run: Run, ended: Ended) -> None:
        pass

    assert own.handlers.by_type["conversation.ended"].attempts == 7
    with pytest.raises(ValueError, match="two handlers for"):

        @own.consume("ended", "conversation.ended", Ended)
        async def other(run: Run, ended: Ended) -> None:
            pass

    with pytest.raises(ValueError, match="Ended has no field id"):
        own.consume("ended", "conversation.ended", Ended, key="id")
    assert consume_module.subscriptions.handlers is handlers
