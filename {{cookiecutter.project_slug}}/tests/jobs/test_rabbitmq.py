"""RabbitMQ as dispatcher: what it does by contract, and what workers do when it fails.

The contract holds for 3.10 to 4.3; where the versions differ, the test names the difference. Longer
faults are in the attack suite of the template.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from uuid import UUID, uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from pamqp.common import FieldTable
from pydantic import SecretStr

from app.jobs import relay
from app.jobs.rabbitmq_dispatcher import RabbitMQDispatcher
from app.settings import Settings
from app.storage.postgres import Database
from scripts.dev_rabbitmq import RabbitMQ
from tests.jobs.broker_server import Certificate
from tests.jobs.conftest import Environment, all_ended, effects, enqueue, row, until, working
from tests.jobs.work import Seconds
from tests.service_process import frozen

pytestmark = pytest.mark.process

LIMIT = 3
QUORUM: FieldTable = {"x-queue-type": "quorum"}
#: A queue that is younger when RabbitMQ 3.10 is killed has no leader afterwards.
QUEUE_IS_STORED_SECONDS = 2.0


@pytest.fixture
def dispatcher(rabbitmq: RabbitMQ) -> Environment:
    return {"AMQP_URL": rabbitmq.url, "SERVICE_NAME": f"rabbit-{uuid4().hex[:8]}"}


@pytest.fixture
def queue(dispatcher: Environment) -> str:
    return f"{dispatcher['SERVICE_NAME']}.jobs"


@pytest.fixture
async def channel(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(rabbitmq.url) as connection:
        yield await connection.channel()


async def count(channel: AbstractChannel, queue: str) -> int:
    """Return how many messages wait in a queue."""
    declared = (await channel.declare_queue(queue, passive=True)).declaration_result
    return declared.message_count or 0


async def version(url: str) -> tuple[int, ...]:
    async with await aio_pika.connect(url) as connection:
        assert connection.transport
        text = connection.transport.connection.server_properties["version"]
    return tuple(int(part) for part in str(text).split(".")[:2])


async def deliver(url: str, queue: str, how: str, number: int) -> list[float]:
    """Give a message back up to `number` times; return the time of each delivery."""
    times: list[float] = []
    end = time.monotonic() + 1.5
    while len(times) < number and time.monotonic() < end:
        async with await aio_pika.connect(url) as connection:
            source = await (await connection.channel()).get_queue(queue, ensure=False)
            message = await source.get(fail=False)
            if message is None:
                continue
            times.append(time.monotonic())
            end = times[-1] + 1.5
            if how == "nack":
                await message.nack(requeue=True)
            elif how == "reject":
                await message.reject(requeue=True)
    return times


async def declare(channel: AbstractChannel, **arguments: str | int) -> str:
    """Declare a queue with a delivery limit and dead letters, with one message."""
    name = f"contract-{uuid4().hex[:8]}"
    await channel.declare_queue(f"{name}.dead", durable=True, arguments=QUORUM)
    own: FieldTable = {
        "x-delivery-limit": LIMIT,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{name}.dead",
    }
    all_arguments = QUORUM | own | arguments
    await channel.declare_queue(name, durable=True, arguments=all_arguments)
    await channel.default_exchange.publish(aio_pika.Message(b"x"), name)
    return name


@pytest.mark.parametrize("how", ["reject", "close"])
async def test_rejected_messages_and_lost_ones_reach_the_delivery_limit(
    rabbitmq: RabbitMQ, channel: AbstractChannel, how: str
) -> None:
    """RabbitMQ, "Quorum queues", poison message handling: dead-lettered after the limit."""
    name = await declare(channel)
    assert len(await deliver(rabbitmq.url, name, how, LIMIT + 1)) == LIMIT + 1
    await until(lambda: _is(channel, f"{name}.dead", 1))


async def test_nacked_messages_reach_the_limit_before_4_3_only(
    rabbitmq: RabbitMQ, channel: AbstractChannel
) -> None:
    """From 4.3 on `basic.nack` counts no delivery: a hot loop. The service never uses it."""
    name = await declare(channel)
    deliveries = len(await deliver(rabbitmq.url, name, "nack", LIMIT + 3))
    counts = await version(rabbitmq.url) < (4, 3)
    assert deliveries == (LIMIT + 1 if counts else LIMIT + 3)


async def test_delayed_retries_work_from_4_3_on_only(
    rabbitmq: RabbitMQ, channel: AbstractChannel
) -> None:
    """Older versions accept the arguments and ignore them: so retries are rows of the table."""
    arguments: dict[str, str | int] = {"x-delayed-retry-type": "failed", "x-delayed-retry-min": 500}
    name = await declare(channel, **arguments)
    times = await deliver(rabbitmq.url, name, "reject", LIMIT + 1)
    pauses = [after - before for before, after in pairwise(times)]
    is_delayed = await version(rabbitmq.url) >= (4, 3)
    assert (min(pauses) >= 0.5) == is_delayed, pauses


async def _is(channel: AbstractChannel, queue: str, number: int) -> bool:
    return await count(channel, queue) == number


async def test_messages_of_no_job_are_dead_lettered(
    settings: Settings, database: Database, channel: AbstractChannel, queue: str
) -> None:
    """Without an ID, with one that is no UUID, and with one that no job has."""
    async with working(settings):
        job_id = await enqueue(database, "wait", Seconds())
        await all_ended(database)
        await publish_raw(channel, queue, None)
        for message_id in ("7", str(uuid4())):
            await publish_raw(channel, queue, message_id)
        # Of a job that has ended: acknowledged, with no effect.
        await publish_raw(channel, queue, str(job_id))
        await until(lambda: _is(channel, f"{queue}.dead", 3))
        await until(lambda: _is(channel, queue, 0))
    assert await effects(database) == 1


async def publish_raw(channel: AbstractChannel, queue: str, message_id: str | None) -> None:
    """Publish with an ID, or without any: aio-pika would invent one with confirms."""
    if message_id is not None:
        message = aio_pika.Message(b"", message_id=message_id)
        await channel.default_exchange.publish(message, queue)
        return
    connection = channel._connection  # type: ignore[attr-defined]
    async with connection.channel(publisher_confirms=False) as plain:
        underlay = await plain.get_underlay_channel()
        await underlay.basic_publish(b"", routing_key=queue)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


async def test_killed_rabbitmq_delays_jobs_and_loses_none(
    settings: Settings, database: Database, rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGKILL: readiness fails with the reason, which is logged once."""
    async with working(settings) as clients:
        jobs = [await enqueue(database, "wait", Seconds()) for _ in range(20)]
        await all_ended(database)
        await asyncio.sleep(QUEUE_IS_STORED_SECONDS)
        caplog.clear()
        await asyncio.to_thread(rabbitmq.kill)
        try:
            jobs += [await enqueue(database, "wait", Seconds()) for _ in range(20)]
            with pytest.raises(ConnectionError, match="AMQPConnectionError"):
                await clients.checks["rabbitmq"]()
        finally:
            await asyncio.to_thread(rabbitmq.start)
        await all_ended(database)
        await until(lambda: succeeds(clients.checks["rabbitmq"]))
        await until(lambda: is_logged(caplog, "RabbitMQ available again"))
    assert [await effects(database, job_id) for job_id in jobs] == [1] * len(jobs)
    lines = warnings(caplog)
    assert lines[0].startswith("RabbitMQ unavailable: AMQPConnectionError")
    assert len(lines) <= 3, lines
    assert rabbitmq.password not in caplog.text


async def is_logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    """The last of all connections logs the recovery; the check asks two of them."""
    return text in caplog.text


async def has_started(database: Database, job_id: UUID) -> bool:
    return bool((await row(database, job_id))["started_at"])


async def succeeds(check: object) -> bool:
    with contextlib.suppress(Exception):
        await check()  # type: ignore[operator]
        return True
    return False


async def test_frozen_rabbitmq_fails_the_check_and_delays_jobs(
    settings: Settings, database: Database, rabbitmq: RabbitMQ
) -> None:
    """SIGSTOP, as a machine that swaps. Within 33 s the connections stay."""
    async with working(settings) as clients:
        await until(lambda: succeeds(clients.checks["rabbitmq"]))
        with frozen(rabbitmq.pid):
            job_id = await enqueue(database, "wait", Seconds())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await clients.checks["rabbitmq"]()
            assert (await row(database, job_id))["starts"] == 0
        await all_ended(database)
        await until(lambda: succeeds(clients.checks["rabbitmq"]))
    assert await effects(database) == 1


async def test_memory_alarm_blocks_new_jobs_but_no_acknowledgement(
    settings: Settings,
    database: Database,
    rabbitmq: RabbitMQ,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RabbitMQ, "Memory and disk alarms": connections that publish are blocked as a whole."""
    async with working(settings):
        waiting = [await enqueue(database, "wait", Seconds(seconds=0.3)) for _ in range(24)]
        query = "select bool_and(published_at is not null) from jobs"
        await until(lambda: database.pool.fetchval(query))
        monkeypatch.setattr(relay, "PUBLISH_SECONDS", 0.5)
        await asyncio.to_thread(alarm, rabbitmq, "1MB")
        try:
            # RabbitMQ notices a publisher by its first message.
            await enqueue(database, "wait", Seconds())
            await until(lambda: logged(caplog, "short of memory"))
            blocked = await enqueue(database, "wait", Seconds())
            await until(lambda: database.pool.fetchval("select count(*) >= 24 from effects"))
            # All were acknowledged, or RabbitMQ would hand out no more than eight.
            assert [await effects(database, job_id) for job_id in waiting] == [1] * 24
            assert (await row(database, blocked))["published_at"] is None
        finally:
            await asyncio.to_thread(alarm, rabbitmq, "512MB")
        await all_ended(database)
    assert await effects(database) == 26


def alarm(rabbitmq: RabbitMQ, limit: str) -> None:
    rabbitmq.control("set_vm_memory_high_watermark", "absolute", limit)


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def test_purged_messages_are_published_again(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(relay, "RECOVER_SECONDS", 0.2)
    async with working(settings):
        await enqueue(database, "wait", Seconds())
        await all_ended(database)
    # A relay alone, without a consumer.
    async with RabbitMQDispatcher(settings, database):
        for _ in range(5):
            await enqueue(database, "wait", Seconds())
        await until(lambda: _is(channel, queue, 5))
    await (await channel.get_queue(queue)).purge()
    async with working(settings):
        await all_ended(database)
    assert await effects(database) == 6


async def test_deleted_queue_is_declared_and_consumed_again(
    settings: Settings,
    database: Database,
    channel: AbstractChannel,
    queue: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """RabbitMQ cancels the consumer of a queue that is deleted: "Consumer cancel notification"."""
    async with working(settings) as clients:
        await until(lambda: succeeds(clients.checks["rabbitmq"]))
        await channel.queue_delete(queue)
        await enqueue(database, "wait", Seconds())
        await all_ended(database)
    assert "RabbitMQ has cancelled the consumer" in caplog.text
    assert await effects(database) == 1


async def test_job_goes_on_without_its_connection(
    settings: Settings, database: Database, rabbitmq: RabbitMQ
) -> None:
    """Its message comes a second time, and starts nothing."""
    async with working(settings) as clients:
        job_id = await enqueue(database, "wait", Seconds(seconds=3))
        await until(lambda: has_started(database, job_id))
        await asyncio.to_thread(rabbitmq.control, "close_all_connections", "test")
        await until(lambda: succeeds(clients.checks["rabbitmq"]))
        await all_ended(database)
    assert (await row(database, job_id))["starts"] == 1
    assert await effects(database) == 1


@contextlib.asynccontextmanager
async def dispatching(
    settings: Settings, database: Database, url: str
) -> AsyncIterator[RabbitMQDispatcher]:
    """Keep trying to connect with a URL."""
    own = settings.model_copy(update={"amqp_url": SecretStr(url)})
    async with RabbitMQDispatcher(own, database) as dispatcher:
        await dispatcher.start(lambda _: None)
        yield dispatcher


async def reports(dispatcher: RabbitMQDispatcher, problem: str) -> bool:
    """Return whether the readiness check fails with this text."""
    try:
        await dispatcher.check()
    except ConnectionError as error:
        return problem in str(error)
    return False


async def test_wrong_password_is_reported_without_it(
    settings: Settings, database: Database, rabbitmq: RabbitMQ, caplog: pytest.LogCaptureFixture
) -> None:
    url = rabbitmq.url.replace(rabbitmq.password, "hunter2")
    async with dispatching(settings, database, url) as dispatcher:
        await until(lambda: reports(dispatcher, "ACCESS_REFUSED"))
        await asyncio.sleep(2.5)
    lines = [line for line in warnings(caplog) if "ACCESS_REFUSED" in line]
    assert len(lines) == 1, "one line, however often it is tried"
    assert "hunter2" not in caplog.text


@pytest.fixture
def tls_port(amqp_certificate: Certificate) -> int:
    if not amqp_certificate.exists:
        pytest.skip("openssl is missing")
    return amqp_certificate.port


@pytest.mark.parametrize(
    ("host", "is_trusted", "problem"),
    [("127.0.0.1", True, "IP address mismatch"), ("localhost", False, "certificate verify failed")],
)
async def test_certificate_of_another_host_or_issuer_is_rejected(
    settings: Settings,
    database: Database,
    rabbitmq: RabbitMQ,
    amqp_certificate: Certificate,
    tls_port: int,
    host: str,
    is_trusted: bool,
    problem: str,
) -> None:
    query = f"?cafile={amqp_certificate.file}" if is_trusted else ""
    url = f"amqps://app:{rabbitmq.password}@{host}:{tls_port}/{query}"
    async with dispatching(settings, database, url) as dispatcher:
        await until(lambda: reports(dispatcher, problem))


async def test_trusted_certificate_of_the_host_is_accepted(
    settings: Settings,
    database: Database,
    rabbitmq: RabbitMQ,
    amqp_certificate: Certificate,
    tls_port: int,
) -> None:
    """Perhaps at a later attempt: a busy RabbitMQ closes a new connection with INTERNAL_ERROR."""
    url = f"amqps://app:{rabbitmq.password}@localhost:{tls_port}/?cafile={amqp_certificate.file}"
    async with dispatching(settings, database, url) as dispatcher:
        await until(lambda: succeeds(dispatcher.check))
