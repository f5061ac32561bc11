"""A Redis that is away costs one caller in a second a short wait, and the others nothing."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from app.patterns.fail_open import COOL_DOWN_SECONDS, FailOpen
from scripts import dev_services
from tests.service_process import frozen

#: The second is for a Redis that is there, on a busy machine: as long as the fixture's client waits.
BUDGET_SECONDS, PATIENT_SECONDS = 0.2, 10.0


async def test_of_those_who_come_at_once_while_redis_is_away_one_waits(
    client: Redis, redis: dev_services.Redis
) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis runs in this process, and cannot be frozen")
    fail_open = FailOpen(PATIENT_SECONDS)
    assert await fail_open.call_if_available(client.dbsize) == 0
    fail_open.budget_seconds = BUDGET_SECONDS
    with frozen(redis.pid):
        start = time.monotonic()
        assert await fail_open.call_if_available(client.dbsize) is None  # so it is known
        assert time.monotonic() - start < PATIENT_SECONDS / 2
        for _ in range(2):
            await asyncio.sleep(COOL_DOWN_SECONDS)
            asking = [
                asyncio.create_task(fail_open.call_if_available(client.dbsize)) for _ in range(20)
            ]
            await asyncio.sleep(0)
            assert (
                sum(task.done() for task in asking) == 19
            )  # who waits for nothing is done at the first step
            assert await asyncio.gather(*asking) == [None] * 20
    fail_open.budget_seconds = PATIENT_SECONDS
    await asyncio.sleep(COOL_DOWN_SECONDS)
    assert await fail_open.call_if_available(client.dbsize) == 0
    assert (
        await asyncio.gather(*(fail_open.call_if_available(client.dbsize) for _ in range(3)))
        == [0] * 3
    )  # nobody is passed over
