"""So many requests of each caller in a window; a Redis that is away lets everybody through, at once."""

import asyncio
import time

import pytest
from fastapi import Request
from redis.asyncio import Redis

from app.patterns import fail_open, rate_limit
from app.patterns.rate_limit import BUDGET_SECONDS, RateLimit, TooManyError, caller
from scripts import dev_services
from tests.service_process import frozen

PATIENT_SECONDS = 10.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Redis may take longer than the budget, and its imitation does."""
    monkeypatch.setattr(rate_limit, "BUDGET_SECONDS", PATIENT_SECONDS)


async def test_requests_over_the_limit_are_refused_until_the_window_ends(client: Redis) -> None:
    limit = RateLimit(client, "test", 2, 60)
    for _ in range(2):
        await limit.check("one")
    with pytest.raises(TooManyError) as refused:
        await limit.check("one")
    headers = refused.value.headers or {}
    left = headers["Retry-After"]
    assert 50 < int(left) <= 60
    assert headers == {
        "Retry-After": left,
        "RateLimit-Policy": '"test";q=2;w=60',
        "RateLimit": f'"test";r=0;t={left}',
    }
    await limit.check("other")
    await RateLimit(client, "another", 2).check("one")


async def test_a_new_window_begins_when_the_old_one_has_ended(client: Redis) -> None:
    limit = RateLimit(client, "test", 2, 2)
    for _ in range(2):
        for _ in range(2):
            await limit.check("one")
        with pytest.raises(TooManyError) as refused:
            await limit.check("one")
        await asyncio.sleep(int((refused.value.headers or {})["Retry-After"]))


async def test_a_caller_over_the_limit_stays_so_while_redis_is_away(client: Redis) -> None:
    limit = RateLimit(client, "test", 2)
    for _ in range(2):
        await limit.check("one")
    with pytest.raises(TooManyError):
        await limit.check("one")
    limit.redis.away_until = (
        time.monotonic() + 60
    )  # a flood delays the answers, and must not let itself through
    with pytest.raises(TooManyError):
        await limit.check("one")
    await limit.check("other")


async def test_a_counter_that_lost_its_end_begins_anew(client: Redis) -> None:
    await client.set("rate:test:one", 5)
    await RateLimit(client, "test", 2).check("one")
    assert await client.get("rate:test:one") == b"1"
    assert await client.pttl("rate:test:one") > 0


async def test_a_frozen_redis_lets_everybody_through_and_only_the_first_one_waits(
    client: Redis, redis: dev_services.Redis
) -> None:
    if redis.program == "fakeredis":
        pytest.skip("the imitation of Redis runs in this process, and cannot be frozen")
    limit = RateLimit(client, "test", 1)
    await limit.check("one")
    limit.redis.budget_seconds = BUDGET_SECONDS
    with frozen(redis.pid):
        start = time.monotonic()
        await limit.check("one")
        assert time.monotonic() - start < PATIENT_SECONDS / 2
        others = [asyncio.create_task(limit.check("one")) for _ in range(19)]
        await asyncio.sleep(0)
        assert [task.done() for task in others] == [
            True
        ] * 19  # at the first step: they have waited for nothing
        await asyncio.gather(*others)
    limit.redis.budget_seconds = PATIENT_SECONDS
    await asyncio.sleep(fail_open.COOL_DOWN_SECONDS)
    with pytest.raises(TooManyError):
        await limit.check("one")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("nonsense", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_caller_is_its_address_or_its_network(host: str | None, expected: str) -> None:
    assert caller(Request({"type": "http", "client": (host, 1) if host else None})) == expected


def test_a_caller_who_is_known_has_a_limit_of_its_own() -> None:
    request = Request({"type": "http", "client": ("203.0.113.7", 1)})
    request.state.principal = "alice"
    assert caller(request) == "principal:alice"
