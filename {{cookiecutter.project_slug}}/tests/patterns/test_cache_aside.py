"""A cache that never serves what was read before a change, asks once for many, and is not needed."""

import asyncio
import time

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from app.patterns import cache_aside as cache_fence
from app.patterns.cache_aside import BUDGET_SECONDS, Cache
from app.patterns.fail_open import COOL_DOWN_SECONDS
from scripts import dev_services
from tests.patterns.conftest import eventually
from tests.service_process import frozen

PATIENT_SECONDS = 10.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Redis may take longer than the budget, and then nothing is kept."""
    monkeypatch.setattr(cache_fence, "BUDGET_SECONDS", PATIENT_SECONDS)


class Source:
    """A value that takes a moment to load."""

    def __init__(self) -> None:
        self.value: bytes | None = b"old"
        self.seconds = 30.0
        self.loads, self.go = 0, asyncio.Event()
        self.go.set()

    async def load(self) -> tuple[bytes, float] | None:
        self.loads += 1
        value = self.value
        await self.go.wait()
        return None if value is None else (value, self.seconds)


@pytest.fixture
def source() -> Source:
    return Source()


async def test_what_was_loaded_once_comes_from_the_cache(client: Redis, source: Source) -> None:
    cache = Cache(client, "test")
    assert [await cache.get("a", source.load) for _ in range(3)] == [b"old"] * 3
    assert source.loads == 1
    source.value = b"new"
    assert await cache.delete("a")
    assert await cache.get("a", source.load) == b"new"


async def test_a_reader_that_looked_before_a_change_does_not_store_what_it_read(
    client: Redis, source: Source
) -> None:
    cache, changed = Cache(client, "test"), Source()
    changed.value = b"new"
    for _ in range(2):  # without a fence, and with an earlier one
        source.loads = 0
        source.go.clear()
        slow = asyncio.create_task(cache.get("a", source.load))
        await eventually(lambda: source.loads == 1)
        await Cache(client, "test").delete("a")  # from another process
        async with asyncio.timeout(30):  # nobody who comes now waits for what the slow one reads
            assert await cache.get("a", changed.load) == b"new"
        source.go.set()
        assert await slow == b"old"
        assert await cache.get("a", changed.load) == b"new"
        assert changed.loads == 1
        changed.loads = 0
        await cache.delete("a")


async def test_many_readers_cost_one_load_and_one_that_leaves_takes_nobody_along(
    client: Redis, source: Source
) -> None:
    cache, misses = Cache(client, "many"), {"cache": "many", "result": "miss"}
    source.go.clear()
    readers = [asyncio.create_task(cache.get("a", source.load)) for _ in range(20)]
    await eventually(lambda: REGISTRY.get_sample_value("cache_reads_total", misses) == 20)
    readers[0].cancel()
    await asyncio.sleep(0)
    source.go.set()
    assert await asyncio.gather(*readers[1:]) == [b"old"] * 19
    assert source.loads == 1
    assert cache.loads == {}


async def test_what_does_not_exist_and_what_fails_is_not_kept(
    client: Redis, source: Source
) -> None:
    cache = Cache(client, "test")
    source.value = None
    assert await cache.get("a", source.load) is None

    async def fail() -> tuple[bytes, float]:
        raise KeyError

    with pytest.raises(KeyError):
        await cache.get("a", fail)
    source.value = b"new"
    assert await cache.get("a", source.load) == b"new"


async def test_a_value_ends_by_itself(client: Redis, source: Source) -> None:
    source.seconds = 20
    await Cache(client, "test").get("a", source.load)
    assert 10_000 < await client.pttl("cache:{test:a}") <= 20_000


async def test_a_frozen_redis_costs_one_read_its_budget_and_the_others_nothing(
    client: Redis, source: Source, redis: dev_services.Redis
) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis runs in this process, and cannot be frozen")
    cache = Cache(client, "test")
    await cache.get("a", source.load)
    cache.fail_open.budget_seconds = BUDGET_SECONDS
    with frozen(redis.pid):
        start = time.monotonic()
        assert await cache.get("a", source.load) == b"old"
        assert time.monotonic() - start < PATIENT_SECONDS / 2
        others = [asyncio.create_task(cache.get("a", source.load)) for _ in range(4)]
        await asyncio.sleep(0)
        assert [task.done() for task in others] == [
            True
        ] * 4  # at the first step: they have waited for nothing
        assert [task.result() for task in others] == [b"old"] * 4
        assert not await cache.delete("a")
    cache.fail_open.budget_seconds = PATIENT_SECONDS
    source.value = b"new"
    await asyncio.sleep(COOL_DOWN_SECONDS)
    assert await cache.delete("a")
    assert await cache.get("a", source.load) == b"new"
