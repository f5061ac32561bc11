"""A Redis that is away costs one caller in a second a short wait, and the others nothing."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from app.patterns.fail_open import COOL_DOWN_SECONDS, FailOpen
from scripts import services
from tests.process import frozen

BUDGET_SECONDS = 0.2


async def test_of_those_who_come_at_once_while_redis_is_away_one_waits(client: Redis, redis: services.Redis) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis runs in this process, and cannot be frozen")
    fail_open = FailOpen(BUDGET_SECONDS)

    async def ask() -> tuple[int | None, float]:
        start = time.monotonic()
        return await fail_open.ask(client.dbsize), time.monotonic() - start

    assert await fail_open.ask(client.dbsize) == 0
    with frozen(redis.pid):
        assert (await ask())[0] is None  # so it is known
        for _ in range(2):
            await asyncio.sleep(COOL_DOWN_SECONDS)
            waits = [seconds for answer, seconds in await asyncio.gather(*(ask() for _ in range(20))) if answer is None]
            assert len(waits) == 20
            assert sum(seconds > BUDGET_SECONDS / 2 for seconds in waits) == 1
    await asyncio.sleep(COOL_DOWN_SECONDS)
    assert await fail_open.ask(client.dbsize) == 0
    assert {answer for answer, _ in await asyncio.gather(*(ask() for _ in range(3)))} == {0}  # nobody is passed over
