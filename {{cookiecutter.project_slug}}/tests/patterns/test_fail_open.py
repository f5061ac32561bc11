"""Optional Redis: an outage delays one caller a second for a bounded time, the others not."""

import asyncio
import logging
import time
from typing import Any

import pytest

from app.patterns.fail_open import COOL_DOWN_SECONDS, FailOpen
from app.storage.redis import RedisClient
from scripts import dev_services
from tests.patterns.conftest import PATIENT_SECONDS
from tests.service_process import frozen

BUDGET_SECONDS = 0.2


async def test_one_of_concurrent_callers_waits_for_a_hung_redis(
    client: RedisClient, real_redis: dev_services.Redis
) -> None:
    """Callers that wait for nothing are done at their first step."""
    fail_open = FailOpen(PATIENT_SECONDS)
    assert await fail_open.call_if_available(client.dbsize) == 0
    fail_open.budget_seconds = BUDGET_SECONDS
    with frozen(real_redis.pid):
        start = time.monotonic()
        assert await fail_open.call_if_available(client.dbsize) is None
        assert time.monotonic() - start < PATIENT_SECONDS / 2
        for _ in range(2):
            await asyncio.sleep(COOL_DOWN_SECONDS)
            callers = [
                asyncio.create_task(fail_open.call_if_available(client.dbsize)) for _ in range(20)
            ]
            await asyncio.sleep(0)
            assert sum(task.done() for task in callers) == 19
            assert await asyncio.gather(*callers) == [None] * 20
    fail_open.budget_seconds = PATIENT_SECONDS
    await asyncio.sleep(COOL_DOWN_SECONDS)
    assert await fail_open.call_if_available(client.dbsize) == 0
    # Once Redis responds again, every caller gets its result.
    calls = [fail_open.call_if_available(client.dbsize) for _ in range(3)]
    assert await asyncio.gather(*calls) == [0] * 3


@pytest.mark.usefixtures("real_redis")
async def test_rejection_is_logged_once_per_cause_without_arguments(
    client: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis rejects writes over `maxmemory` with OOM (redis.conf)."""
    caplog.set_level(logging.INFO, "app.redis")
    fail_open = FailOpen(PATIENT_SECONDS, "cache test")
    await client.set("key", "text")

    async def set_secret() -> Any:
        commands: Any = client.pipeline(transaction=False)
        return await commands.set("key", "secret").execute()

    await client.config_set("maxmemory", 1)
    try:
        for _ in range(3):
            assert await fail_open.call(set_secret) is None
            assert await fail_open.call(lambda: client.incr("key")) is None
    finally:
        await client.config_set("maxmemory", 0)
    assert await fail_open.call(lambda: client.lpush("key", 1)) is None
    assert await fail_open.call(set_secret) == [True]
    assert caplog.messages == [
        "redis rejects cache test: OOM command not allowed when used memory > 'maxmemory'.",
        "redis rejects cache test: WRONGTYPE Operation against a key holding the wrong kind of "
        "value",
        "redis accepts cache test again",
    ]
