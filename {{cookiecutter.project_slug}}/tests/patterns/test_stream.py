"""Streams: a message is handled by one consumer, redelivered on failure, or dead-lettered."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.exceptions import ConnectionError as RedisConnectionError

from app.patterns import stream_consumer, stream_group
from app.patterns.stream_consumer import StreamConsumer
from app.patterns.stream_group import Message, StreamGroup
from app.patterns.stream_handler import MAX_FAILURES, PoisonError, RetryLaterError, StreamHandler
from app.storage.redis import RedisClient
from scripts import dev_services
from tests.patience import patience
from tests.patterns.conftest import entries, eventually
from tests.service_process import frozen
from tests.tcp_proxy import TcpProxy

Work = Callable[[Message], Awaitable[None]]


class Handler(StreamHandler):
    """A handler that does the work of a test, and counts its calls."""

    def __init__(self, client: RedisClient, work: Work | None = None) -> None:
        super().__init__(StreamGroup(client, "events", "group"))
        self.work = work
        self.seen: Counter[str] = Counter()
        self.running = 0
        self.max_running = 0
        self.missing_groups = 0
        self.poison_messages = 0

    async def handle(self, message: Message) -> None:
        self.seen[message.fields[b"name"].decode()] += 1
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            await (self.work(message) if self.work else asyncio.sleep(0.01))
        finally:
            self.running -= 1

    async def on_group_missing(self) -> None:
        self.missing_groups += 1

    async def on_poison(self, message: Message) -> None:
        self.poison_messages += 1


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine a slow consumer is not yet dead.
    monkeypatch.setattr(stream_group, "RECLAIM_SECONDS", 60.0)
    monkeypatch.setattr(stream_group, "SCAN_SECONDS", 0.05)
    monkeypatch.setattr(stream_consumer, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(stream_consumer, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(stream_consumer, "PAUSE_SECONDS", 0.1)


@pytest.fixture
def reclaiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redeliver failed messages, and those of dead consumers, after a short time."""
    monkeypatch.setattr(stream_group, "RECLAIM_SECONDS", 0.4)


async def send(client: RedisClient, *names: str) -> None:
    for name in names:
        await client.xadd(client.key("events"), {"name": name})


async def pending(client: RedisClient) -> int:
    groups = await client.xinfo_groups(client.key("events"))
    return int(groups[0]["pending"]) if groups else 0


def handled(outcome: str) -> float:
    """Return the number of messages with this outcome so far."""
    labels = {"stream": "events", "outcome": outcome}
    return REGISTRY.get_sample_value("stream_messages_handled_total", labels) or 0.0


def waiting(state: str) -> float | None:
    """Return the number of waiting messages in the metrics."""
    labels = {"stream": "events", "state": state}
    return REGISTRY.get_sample_value("stream_messages_waiting", labels)


def lag() -> float | None:
    """Return the age of the oldest waiting message in the metrics."""
    return REGISTRY.get_sample_value("stream_lag_seconds", {"stream": "events"})


@contextlib.asynccontextmanager
async def consuming(
    handler: StreamHandler, concurrency: int = 4, grace_seconds: float = 5
) -> AsyncIterator[StreamConsumer]:
    """Run a consumer during the block, then shut it down."""
    consumer = StreamConsumer(handler, concurrency)
    running = asyncio.create_task(consumer.run(grace_seconds))
    try:
        yield consumer
    finally:
        consumer.is_stopping = True
        await running


async def test_messages_are_handled_once_up_to_the_concurrency(client: RedisClient) -> None:
    handler = Handler(client)
    names = [str(number) for number in range(50)]
    done = handled("done")
    await send(client, *names)
    async with consuming(handler):
        await eventually(lambda: len(handler.seen) == 50)
        await asyncio.sleep(0.1)
    assert handler.seen == Counter(names)
    assert handler.max_running == 4
    assert await pending(client) == 0
    assert handled("done") == done + 50


async def test_consumers_of_a_group_share_the_messages(client: RedisClient) -> None:
    async def wait_for_both(_: Message) -> None:
        await eventually(lambda: all(handler.seen for handler in handlers))

    handlers = [Handler(client, wait_for_both), Handler(client, wait_for_both)]
    names = [str(number) for number in range(50)]
    await send(client, *names)
    async with consuming(handlers[0]), consuming(handlers[1]):
        await eventually(lambda: sum(len(handler.seen) for handler in handlers) == 50)
    assert handlers[0].seen + handlers[1].seen == Counter(names)


async def test_consumer_that_is_not_ready_reads_no_message(client: RedisClient) -> None:
    """Another consumer, which is ready, gets them; they would fail here."""
    is_ready = False

    async def check() -> bool:
        return is_ready

    handler = Handler(client)
    await handler.group.create()
    await send(client, "waits")
    consumer = StreamConsumer(handler, 4, check)
    running = asyncio.create_task(consumer.run(5))
    await asyncio.sleep(0.5)
    assert await pending(client) == 0
    assert not handler.seen
    is_ready = True
    await eventually(lambda: handler.seen == Counter(["waits"]))
    consumer.is_stopping = True
    await running


@pytest.mark.usefixtures("reclaiming")
async def test_message_of_a_dead_consumer_is_reclaimed(client: RedisClient) -> None:
    dead_consumer = StreamGroup(client, "events", "group")
    await dead_consumer.create()
    await send(client, "left")
    async with dead_consumer.reader:
        assert len(await dead_consumer.read(1)) == 1
    handler = Handler(client)
    async with consuming(handler):
        await eventually(lambda: handler.seen["left"] == 1)
    assert await pending(client) == 0


@pytest.mark.usefixtures("reclaiming")
async def test_slow_link_delivers_large_messages(
    client: RedisClient, proxied: RedisClient, proxy: TcpProxy
) -> None:
    """Four messages of 80 KiB need 1.6 s here, and one needs 0.4 s. The limit is 0.5 s at first."""
    names = [str(number) for number in range(12)]
    for name in names:
        await client.xadd(client.key("events"), {"name": name, "large": "a" * (80 << 10)})
    proxy.response_bytes_per_second = 200 << 10
    handler = Handler(proxied)
    async with consuming(handler):
        await eventually(lambda: set(handler.seen) == set(names), 60)
        proxy.response_bytes_per_second = 0
    assert await pending(client) == 0


async def test_message_in_progress_is_not_reclaimed(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 20 heartbeats, of which a busy machine may miss some.
    monkeypatch.setattr(stream_group, "RECLAIM_SECONDS", 2.0)

    async def long(_: Message) -> None:
        await asyncio.sleep(1.5 * stream_group.RECLAIM_SECONDS)

    handlers = [Handler(client, long), Handler(client, long)]
    await send(client, "long")
    async with consuming(handlers[0]) as first:
        # To reclaim its own message would reset the idle time as well.
        first.sources = [first.group.read]
        await eventually(lambda: handlers[0].running == 1)
        async with consuming(handlers[1]):
            await eventually(lambda: not any(handler.running for handler in handlers))
    assert handlers[0].seen + handlers[1].seen == {"long": 1}


async def test_poison_message_is_dead_lettered_and_blocks_no_other(client: RedisClient) -> None:
    async def reject_bad(message: Message) -> None:
        if message.fields[b"name"] == b"bad":
            raise PoisonError("it is bad")

    handler = Handler(client, reject_bad)
    dead_lettered = handled("dead_lettered")
    await send(client, "bad", "good")
    async with consuming(handler, 1):
        await eventually(lambda: handler.seen == {"bad": 1, "good": 1})
    (fields,) = await entries(client, "events.dead")
    assert fields[b"name"] == b"bad"
    assert fields[b"reason"] == b"it is bad"
    assert handler.poison_messages == 1
    assert await pending(client) == 0
    assert handled("dead_lettered") == dead_lettered + 1


@pytest.mark.usefixtures("reclaiming")
async def test_message_that_keeps_failing_is_dead_lettered(client: RedisClient) -> None:
    """It is no poison: the bug behind it can be fixed."""

    async def fail(message: Message) -> None:
        if message.fields[b"name"] == b"bug" or handler.seen["blip"] == 1:
            raise KeyError

    handler = Handler(client, fail)
    failed = handled("failed")
    await send(client, "bug", "blip")
    async with consuming(handler):
        await eventually(lambda: handler.seen["bug"] >= MAX_FAILURES and handler.seen["blip"] >= 2)
        await asyncio.sleep(0.2)
    assert handler.poison_messages == 0
    (fields,) = await entries(client, "events.dead")
    assert fields[b"reason"] == b"failed 5 times, most recently with KeyError"
    assert await pending(client) == 0
    assert handler.failures == {}
    # One of "blip", and all but the last of "bug".
    assert handled("failed") == failed + MAX_FAILURES


@pytest.mark.usefixtures("reclaiming")
async def test_outages_do_not_count_as_failures(client: RedisClient) -> None:
    async def unavailable(_: Message) -> None:
        raise RetryLaterError

    handler = Handler(client, unavailable)
    later = handled("later")
    await send(client, "innocent")
    async with consuming(handler):
        await eventually(lambda: handler.seen["innocent"] > MAX_FAILURES)
    assert not await client.exists(client.key("events.dead"))
    assert await pending(client) == 1
    assert handled("later") >= later + MAX_FAILURES


async def test_group_is_created_again_after_redis_lost_its_data(client: RedisClient) -> None:
    handler = Handler(client)
    async with consuming(handler):
        await eventually(lambda: handler.missing_groups == 1)
        await send(client, "before")
        await eventually(lambda: handler.seen["before"] == 1)
        await client.flushall()
        await eventually(lambda: handler.missing_groups == 2)
        await send(client, "after")
        await eventually(lambda: handler.seen["after"] == 1)


@pytest.mark.usefixtures("reclaiming")
async def test_shutdown_finishes_messages_within_the_grace_period(client: RedisClient) -> None:
    """A longer one is left to another consumer, and so is one that was not started."""
    is_stopping = asyncio.Event()

    async def work(message: Message) -> None:
        await is_stopping.wait()
        await asyncio.sleep(0.1 if message.fields[b"name"] == b"short" else 60)

    handler = Handler(client, work)
    await send(client, "short", "long")
    async with consuming(handler, 2, grace_seconds=2) as consumer:
        await eventually(lambda: handler.running == 2)
        # Without room for it, or it could still be started.
        await send(client, "later")
        consumer.is_stopping = True
        is_stopping.set()
    assert handler.seen == {"short": 1, "long": 1}
    assert await pending(client) == 1
    other = Handler(client)
    async with consuming(other):
        await eventually(lambda: other.seen.keys() == {"long", "later"})


async def test_message_that_would_wait_is_left_to_other_consumers(client: RedisClient) -> None:
    """Nothing is read ahead while messages take long: here a place is free only after the other."""
    is_done = asyncio.Event()

    async def wait(_: Message) -> None:
        await is_done.wait()

    busy = Handler(client, wait)
    other = Handler(client)
    await send(client, "1", "2", "3", "4")
    async with consuming(busy, 2):
        await eventually(lambda: busy.running == 2)
        async with consuming(other, 2):
            await eventually(lambda: other.seen == {"3": 1, "4": 1})
        is_done.set()


async def test_messages_that_are_read_ahead_start_without_a_read(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fill each free place at once, in their order."""
    monkeypatch.setattr(stream_consumer, "AHEAD_SECONDS", 60.0)
    reads = 0
    handler = Handler(client)
    await send(client, *map(str, range(40)))
    async with consuming(handler, 4) as consumer:
        read = consumer.group.read

        async def counted(room: int) -> list[Message]:
            nonlocal reads
            messages = await read(room)
            reads += bool(messages)
            return messages

        consumer.sources = [counted]
        await eventually(lambda: len(handler.seen) == 40)
    assert list(handler.seen) == [str(number) for number in range(40)]
    assert handler.max_running == 4
    # The first one reads 8: for 4 places, and 4 ahead. The next ones are due when 2 have started.
    assert reads <= 1 + 32 / 3


def waiting_for(event: asyncio.Event) -> Work:
    """Return the work of messages that end when an event is set."""

    async def wait(_: Message) -> None:
        await event.wait()

    return wait


async def test_shutdown_gives_back_messages_that_have_not_started(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another consumer has them at once, and not after `RECLAIM_SECONDS`."""
    monkeypatch.setattr(stream_consumer, "AHEAD_SECONDS", 60.0)
    is_done = asyncio.Event()
    first = Handler(client, waiting_for(is_done))
    other = Handler(client)
    await send(client, "1", "2", "3", "4")
    async with consuming(first, 2) as consumer:
        await eventually(lambda: len(consumer.waiting) == 2)
        assert await pending(client) == 4
        consumer.is_stopping = True
        async with consuming(other):
            await eventually(lambda: other.seen == {"3": 1, "4": 1})
        is_done.set()
    assert first.seen == {"1": 1, "2": 1}
    assert await pending(client) == 0


async def test_slow_keep_alive_does_not_take_back_what_a_shutdown_gives(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_consumer, "AHEAD_SECONDS", 60.0)
    is_done = asyncio.Event()
    first = Handler(client, waiting_for(is_done))
    other = Handler(client)
    keep_alive = first.group.keep_alive
    is_on_its_way = asyncio.Event()

    async def delayed(kept: list[bytes]) -> None:
        is_on_its_way.set()
        await asyncio.sleep(0.5)
        await keep_alive(kept)

    monkeypatch.setattr(first.group, "keep_alive", delayed)
    await send(client, "1", "2")
    async with consuming(first, 1) as consumer:
        await eventually(lambda: len(consumer.waiting) == 1)
        is_on_its_way.clear()
        await is_on_its_way.wait()
        consumer.is_stopping = True
        await asyncio.sleep(1)
        async with consuming(other):
            await eventually(lambda: other.seen == {"2": 1})
        is_done.set()


@pytest.mark.usefixtures("reclaiming")
async def test_hung_redis_is_logged_once_and_loses_no_message(
    client: RedisClient,
    worker_client: RedisClient,
    real_redis: dev_services.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure = "cannot read stream"
    recovery = "stream reads resumed"

    def logged() -> list[str]:
        records = [record for record in caplog.records if record.name == "app.stream"]
        return [record.message.split(":")[0] for record in records]

    handler = Handler(worker_client)
    async with consuming(handler):
        await eventually(lambda: "consumer group created" in logged())
        await send(client, "before")
        caplog.clear()  # Redis may have been slow for a moment
        with frozen(real_redis.pid):
            await eventually(lambda: logged() == [failure])
            await asyncio.sleep(1)  # for more attempts
        await send(client, "after")
        await eventually(lambda: len(handler.seen) == 2)
        await eventually(lambda: logged() == [failure, recovery])


@pytest.mark.usefixtures("real_redis")
async def test_failing_group_creation_is_logged_once_and_backs_off(
    client: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis rejects the creation for want of memory, of which fakeredis has no limit."""
    await client.config_set("maxmemory", 1)
    handler = Handler(client)
    try:
        async with consuming(handler):
            start = time.monotonic()
            await asyncio.sleep(1)
            await eventually(lambda: handler.missing_groups > 1)
            assert handler.missing_groups < 5 + 10 * (time.monotonic() - start)
    finally:
        await client.config_set("maxmemory", 0)
    (line,) = [record.message for record in caplog.records if record.name == "app.stream"]
    assert "OOM command not allowed" in line


@pytest.mark.usefixtures("reclaiming")
async def test_rejected_dead_letter_is_retried(client: RedisClient) -> None:
    async def reject(_: Message) -> None:
        raise PoisonError("it is poison")

    await client.set(client.key("events.dead"), "of another type")
    await send(client, "bad")
    handler = Handler(client, reject)
    async with consuming(handler):
        await eventually(lambda: handler.poison_messages > 1)
        await client.delete(client.key("events.dead"))
        async with patience(30):
            while not await client.exists(client.key("events.dead")):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    dead_letters = await entries(client, "events.dead")
    assert [fields[b"reason"] for fields in dead_letters] == [b"it is poison"]


async def test_lag_is_the_age_of_the_oldest_waiting_message(client: RedisClient) -> None:
    """Of one that is unread, then of one that is pending; the first part of an ID is its time.

    https://redis.io/docs/latest/develop/data-types/streams/#entry-ids
    """
    group = StreamGroup(client, "events", "group")
    await group.create()
    assert (await group.waiting()).lag_seconds == 0
    entry = f"{int((time.time() - 100) * 1000)}-0"
    await client.xadd(client.key("events"), {"name": "old"}, id=entry)
    await send(client, "new")
    assert 99 < (await group.waiting()).lag_seconds < 160
    (old,) = await group.read(1)
    assert 99 < (await group.waiting()).lag_seconds < 160
    await group.acknowledge(old)
    found = await group.waiting()
    assert found.lag_seconds < 60
    assert found.messages == {"unread": 1, "pending": 0, "dead_lettered": 0}
    await group.reader.aclose()


async def test_dead_letters_are_in_the_metrics(client: RedisClient) -> None:
    async def fail(_: Message) -> None:
        msg = "never"
        raise PoisonError(msg)

    async with consuming(Handler(client, fail)):
        await eventually(lambda: waiting("dead_lettered") == 0)
        await send(client, "poison")
        await eventually(lambda: waiting("dead_lettered") == 1)
        await eventually(lambda: lag() == 0)


class CountedCommands:
    """Counts the commands to Redis with a name, and the entries in them."""

    def __init__(self, client: RedisClient, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.original = getattr(client, name)
        #: Raised by the next command.
        self.error: Exception | None = None
        monkeypatch.setattr(client, name, self.call)

    async def call(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.error:
            error = self.error
            self.error = None
            raise error
        return await self.original(*arguments, **options)


async def test_messages_are_read_and_acknowledged_in_batches(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XACK accepts several entries: https://redis.io/docs/latest/commands/xack/."""

    async def work(_: Message) -> None:
        await asyncio.sleep(0.001 * random.random())

    handler = Handler(client, work)
    acknowledgements = CountedCommands(handler.group.redis, "xack", monkeypatch)
    reads = CountedCommands(handler.group.reader, "xreadgroup", monkeypatch)
    await handler.group.create()
    await send(client, *map(str, range(400)))
    async with consuming(handler, 20):
        await eventually(lambda: len(handler.seen) == 400)
    assert await pending(client) == 0
    assert acknowledgements.calls < 400 / 2
    # Half of the places are ten; the last reads find nothing.
    assert reads.calls < 400 / 4


async def test_free_place_is_used_while_other_messages_take_long(client: RedisClient) -> None:
    """The wait for half of the places is a moment, not the time of the slowest message."""
    is_done = asyncio.Event()

    async def work(message: Message) -> None:
        if message.fields[b"name"].startswith(b"long"):
            await is_done.wait()

    handler = Handler(client, work)
    await send(client, *(f"long {number}" for number in range(7)), *map(str, range(50)))
    async with consuming(handler, 8):
        await eventually(lambda: len(handler.seen) == 57)
        assert handler.running == 7
        is_done.set()


async def test_failed_acknowledgement_is_that_of_each_message_in_it(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them counts as done; each is redelivered, and found done."""
    handler = Handler(client)
    acknowledgements = CountedCommands(handler.group.redis, "xack", monkeypatch)
    acknowledgements.error = RedisConnectionError("lost")
    later = handled("later")
    await handler.group.create()
    await send(client, "a", "b", "c")
    async with consuming(handler):
        await eventually(lambda: len(handler.seen) == 3)
        await eventually(lambda: handled("later") > later)
    failed = int(handled("later") - later)
    assert await pending(client) == failed


async def test_cancelled_acknowledgement_does_not_delay_the_others(client: RedisClient) -> None:
    group = StreamGroup(client, "events", "group")
    await group.create()
    await send(client, "a", "b")
    async with group.reader:
        first, second = await group.read(2)
    cancelled = asyncio.create_task(group.acknowledge(first))
    other = asyncio.create_task(group.acknowledge(second))
    await asyncio.sleep(0)
    cancelled.cancel()
    await other
    assert await pending(client) == 0
    assert group.acknowledging is None or group.acknowledging.done()
