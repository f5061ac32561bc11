"""The cache: never stale after a change, one load for concurrent readers, optional Redis."""

import asyncio
import time

import pytest
from prometheus_client import REGISTRY

from app.patterns import cache_aside
from app.patterns.cache_aside import BUDGET_SECONDS, Cache
from app.patterns.fail_open import COOL_DOWN_SECONDS
from app.storage.redis import RedisClient
from scripts import dev_services
from tests.patience import patience
from tests.patterns.conftest import PATIENT_SECONDS, eventually
from tests.service_process import frozen


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a response of Redis may exceed the budget, and nothing is cached."""
    monkeypatch.setattr(cache_aside, "BUDGET_SECONDS", PATIENT_SECONDS)


class Source:
    """A value whose loading can be held up."""

    def __init__(self, value: bytes = b"old") -> None:
        self.value: bytes | None = value
        self.seconds = 30.0
        self.loads = 0
        self.go = asyncio.Event()
        self.go.set()

    async def load(self) -> tuple[bytes, float] | None:
        self.loads += 1
        value = self.value
        await self.go.wait()
        return None if value is None else (value, self.seconds)


@pytest.fixture
def source() -> Source:
    return Source()


async def test_second_read_is_served_from_the_cache(client: RedisClient, source: Source) -> None:
    cache = Cache(client, "test")
    assert [await cache.get("a", source.load) for _ in range(3)] == [b"old"] * 3
    assert source.loads == 1
    source.value = b"new"
    assert await cache.delete("a")
    assert await cache.get("a", source.load) == b"new"


async def test_value_read_before_a_change_is_not_stored_after_it(
    client: RedisClient, source: Source
) -> None:
    """Neither without a fence, in the first round, nor with an earlier one, in the second."""
    cache = Cache(client, "test")
    changed = Source(b"new")
    for _ in range(2):
        source.loads = 0
        source.go.clear()
        slow = asyncio.create_task(cache.get("a", source.load))
        await eventually(lambda: source.loads == 1)
        another_process = Cache(client, "test")
        await another_process.delete("a")
        # A new reader does not wait for the load of the slow one.
        async with patience(30):
            assert await cache.get("a", changed.load) == b"new"
        source.go.set()
        assert await slow == b"old"
        assert await cache.get("a", changed.load) == b"new"
        assert changed.loads == 1
        changed.loads = 0
        await cache.delete("a")


async def test_concurrent_readers_share_one_load(client: RedisClient, source: Source) -> None:
    """A cancelled reader does not cancel the load of the others."""
    cache = Cache(client, "many")
    misses = {"cache": "many", "result": "miss"}
    source.go.clear()
    readers = [asyncio.create_task(cache.get("a", source.load)) for _ in range(20)]
    await eventually(lambda: REGISTRY.get_sample_value("cache_reads_total", misses) == 20)
    readers[0].cancel()
    await asyncio.sleep(0)
    source.go.set()
    assert await asyncio.gather(*readers[1:]) == [b"old"] * 19
    assert source.loads == 1
    assert cache.loads == {}


async def test_missing_values_and_errors_are_not_cached(
    client: RedisClient, source: Source
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


async def test_values_expire(client: RedisClient, source: Source) -> None:
    source.seconds = 20
    await Cache(client, "test").get("a", source.load)
    assert 10_000 < await client.pttl(client.key("cache:{test:a}")) <= 20_000


async def test_hung_redis_delays_one_read_by_its_budget(
    client: RedisClient, source: Source, real_redis: dev_services.Redis
) -> None:
    """The other reads are done at their first step, so they have waited for nothing."""
    cache = Cache(client, "test")
    await cache.get("a", source.load)
    cache.fail_open.budget_seconds = BUDGET_SECONDS
    with frozen(real_redis.pid):
        start = time.monotonic()
        assert await cache.get("a", source.load) == b"old"
        assert time.monotonic() - start < PATIENT_SECONDS / 2
        others = [asyncio.create_task(cache.get("a", source.load)) for _ in range(4)]
        await asyncio.sleep(0)
        assert [task.done() for task in others] == [True] * 4
        assert [task.result() for task in others] == [b"old"] * 4
        assert not await cache.delete("a")
    cache.fail_open.budget_seconds = PATIENT_SECONDS
    source.value = b"new"
    await asyncio.sleep(COOL_DOWN_SECONDS)
    assert await cache.delete("a")
    assert await cache.get("a", source.load) == b"new"
