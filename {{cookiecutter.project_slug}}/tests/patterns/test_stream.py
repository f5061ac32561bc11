"""A message is handled by one consumer of its group, again if that one dies or fails, and parked if it is poison."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from redis.asyncio import Redis

from app.patterns import stream_consumer, stream_group
from app.patterns.stream_consumer import StreamConsumer
from app.patterns.stream_group import Message, StreamGroup
from app.patterns.stream_handler import MAX_FAULTS, PoisonError, RetryLaterError, StreamHandler
from scripts import dev_services
from tests.patterns.conftest import entries, eventually
from tests.service_process import frozen

Work = Callable[[Message], Awaitable[None]]


class Handler(StreamHandler):
    """Does what the test says, and remembers what came."""

    def __init__(self, client: Redis, work: Work | None = None) -> None:
        super().__init__(StreamGroup(client, "events", "group"))
        self.work, self.begun, self.given_up = work, 0, 0
        self.seen: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0

    async def handle(self, message: Message) -> None:
        self.seen[message.fields[b"name"].decode()] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await (self.work(message) if self.work else asyncio.sleep(0.01))
        finally:
            self.under_way -= 1

    async def on_group_created(self) -> None:
        self.begun += 1

    async def on_dead_letter(self, message: Message) -> None:
        self.given_up += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stream_group, "RECLAIM_SECONDS", 60.0
    )  # what is slow on a busy machine is not yet dead
    monkeypatch.setattr(stream_group, "SCAN_SECONDS", 0.05)
    monkeypatch.setattr(stream_consumer, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(stream_consumer, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(stream_consumer, "PAUSE_SECONDS", 0.1)


@pytest.fixture
def reclaiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what has failed, or whose consumer is dead."""
    monkeypatch.setattr(stream_group, "RECLAIM_SECONDS", 0.4)


async def send(client: Redis, *names: str) -> None:
    for name in names:
        await client.xadd("events", {"name": name})


async def pending(client: Redis) -> int:
    groups = await client.xinfo_groups("events")
    return int(groups[0]["pending"]) if groups else 0


@contextlib.asynccontextmanager
async def consuming(
    handler: StreamHandler, concurrency: int = 4, grace: float = 5
) -> AsyncIterator[StreamConsumer]:
    """Run a consumer, and end it in order."""
    consumer = StreamConsumer(handler, concurrency)
    running = asyncio.create_task(consumer.run(grace))
    try:
        yield consumer
    finally:
        consumer.is_stopping = True
        await running


async def test_every_message_is_handled_once_and_as_many_at_a_time_as_there_is_room_for(
    client: Redis,
) -> None:
    handler = Handler(client)
    names = [str(number) for number in range(50)]
    await send(client, *names)
    async with consuming(handler):
        await eventually(lambda: len(handler.seen) == 50)
        await asyncio.sleep(0.1)
    assert handler.seen == Counter(names)
    assert handler.most_under_way == 4
    assert await pending(client) == 0


async def test_consumers_of_a_group_share_the_messages(client: Redis) -> None:
    async def together(_: Message) -> None:
        await eventually(lambda: all(handler.seen for handler in handlers))

    handlers = [Handler(client, together), Handler(client, together)]
    names = [str(number) for number in range(50)]
    await send(client, *names)
    async with consuming(handlers[0]), consuming(handlers[1]):
        await eventually(lambda: sum(len(handler.seen) for handler in handlers) == 50)
    assert handlers[0].seen + handlers[1].seen == Counter(names)


@pytest.mark.usefixtures("reclaiming")
async def test_what_a_dead_consumer_left_is_taken_again(client: Redis) -> None:
    group = StreamGroup(client, "events", "group")
    await group.create()
    await send(client, "left")
    assert len(await group.read(1)) == 1  # it dies now
    handler = Handler(client)
    async with consuming(handler):
        await eventually(lambda: handler.seen["left"] == 1)
    assert await pending(client) == 0


async def test_what_takes_long_is_left_to_the_one_that_handles_it(
    client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stream_group, "RECLAIM_SECONDS", 2.0
    )  # 20 beats, of which a busy machine may miss some

    async def long(_: Message) -> None:
        await asyncio.sleep(1.5 * stream_group.RECLAIM_SECONDS)

    handlers = [Handler(client, long), Handler(client, long)]
    await send(client, "long")
    async with consuming(handlers[0]) as first:
        first.sources = [
            first.group.read
        ]  # to find its own message idle would set the idle time back too
        await eventually(lambda: handlers[0].under_way == 1)
        async with consuming(handlers[1]):
            await eventually(lambda: not any(handler.under_way for handler in handlers))
    assert handlers[0].seen + handlers[1].seen == {"long": 1}


async def test_poison_is_parked_with_its_reason_and_holds_nobody_up(client: Redis) -> None:
    async def poisonous(message: Message) -> None:
        if message.fields[b"name"] == b"bad":
            raise PoisonError("it is bad")

    handler = Handler(client, poisonous)
    await send(client, "bad", "good")
    async with consuming(handler, 1):
        await eventually(lambda: handler.seen == {"bad": 1, "good": 1})
    (fields,) = await entries(client, "events.dead")
    assert (fields[b"name"], fields[b"reason"]) == (b"bad", b"it is bad")
    assert handler.given_up == 1
    assert await pending(client) == 0


@pytest.mark.usefixtures("reclaiming")
async def test_what_fails_comes_again_and_is_parked_when_it_fails_too_often(client: Redis) -> None:
    async def failing(message: Message) -> None:
        if message.fields[b"name"] == b"bug" or handler.seen["blip"] == 1:
            raise KeyError

    handler = Handler(client, failing)
    await send(client, "bug", "blip")
    async with consuming(handler):
        await eventually(lambda: handler.seen["bug"] >= MAX_FAULTS and handler.seen["blip"] >= 2)
        await asyncio.sleep(0.2)
    assert handler.given_up == 0  # a fault of ours can be mended
    (fields,) = await entries(client, "events.dead")
    assert fields[b"reason"] == b"failed 5 times, at last with KeyError"
    assert await pending(client) == 0
    assert handler.faults == {}


@pytest.mark.usefixtures("reclaiming")
async def test_an_outage_is_no_fault_of_the_message(client: Redis) -> None:
    async def away(_: Message) -> None:
        raise RetryLaterError

    handler = Handler(client, away)
    await send(client, "innocent")
    async with consuming(handler):
        await eventually(lambda: handler.seen["innocent"] > MAX_FAULTS)
    assert not await client.exists("events.dead")
    assert await pending(client) == 1


async def test_a_redis_that_lost_its_memory_is_noticed(client: Redis) -> None:
    handler = Handler(client)
    async with consuming(handler):
        await eventually(lambda: handler.begun == 1)
        await send(client, "before")
        await eventually(lambda: handler.seen["before"] == 1)
        await client.flushall()
        await eventually(lambda: handler.begun == 2)
        await send(client, "after")
        await eventually(lambda: handler.seen["after"] == 1)


@pytest.mark.usefixtures("reclaiming")
async def test_the_end_waits_for_what_is_under_way_and_leaves_the_rest_to_others(
    client: Redis,
) -> None:
    is_ending = asyncio.Event()

    async def work(message: Message) -> None:
        await is_ending.wait()
        await asyncio.sleep(0.1 if message.fields[b"name"] == b"short" else 60)

    handler = Handler(client, work)
    await send(client, "short", "long")
    async with consuming(handler, 2, grace=2) as consumer:
        await eventually(lambda: handler.under_way == 2)
        await send(client, "later")  # for which there is no room, or it might be taken yet
        consumer.is_stopping = True
        is_ending.set()
    assert handler.seen == {"short": 1, "long": 1}
    assert await pending(client) == 1
    other = Handler(client)
    async with consuming(other):
        await eventually(lambda: other.seen.keys() == {"long", "later"})


@pytest.mark.usefixtures("reclaiming")
async def test_a_frozen_redis_is_told_in_one_line_and_loses_nothing(
    client: Redis, hasty: Redis, redis: dev_services.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis runs in this process, and cannot be frozen")

    def told() -> list[str]:
        return [
            record.message.split(":")[0] for record in caplog.records if record.name == "app.stream"
        ]

    handler = Handler(hasty)
    async with consuming(handler):
        await eventually(lambda: "events had no group group, and has one now" in told())
        await send(client, "before")
        caplog.clear()  # of a Redis that was slow for a moment
        with frozen(redis.pid):
            await eventually(lambda: told() == ["no messages"])
            await asyncio.sleep(1)  # more tries
        await send(client, "after")
        await eventually(lambda: len(handler.seen) == 2)
        await eventually(lambda: told() == ["no messages", "messages are taken again"])


async def test_a_group_that_cannot_be_made_is_told_in_one_line_and_not_tried_all_the_time(
    client: Redis, redis: dev_services.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis has no limit of memory")
    await client.config_set("maxmemory", 1)
    handler = Handler(client)
    try:
        async with consuming(handler):
            start = time.monotonic()
            await asyncio.sleep(1)
            await eventually(lambda: handler.begun > 1)
            assert handler.begun < 5 + 10 * (time.monotonic() - start)
    finally:
        await client.config_set("maxmemory", 0)
    (line,) = [record.message for record in caplog.records if record.name == "app.stream"]
    assert "OutOfMemoryError" in line


@pytest.mark.usefixtures("reclaiming")
async def test_a_dead_letter_that_redis_refuses_is_not_lost(client: Redis) -> None:
    async def refuse(_: Message) -> None:
        raise PoisonError("it is poison")

    await client.set("events.dead", "of another type")
    await send(client, "bad")
    handler = Handler(client, refuse)
    async with consuming(handler):
        await eventually(lambda: handler.given_up > 1)
        await client.delete("events.dead")
        async with asyncio.timeout(30):
            while not await client.exists("events.dead"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert [fields[b"reason"] for fields in await entries(client, "events.dead")] == [
        b"it is poison"
    ]
