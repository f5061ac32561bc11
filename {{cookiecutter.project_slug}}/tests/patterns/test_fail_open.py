"""Optional Redis: an outage delays one caller a second for a bounded time, the others not."""

import asyncio
import time

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
