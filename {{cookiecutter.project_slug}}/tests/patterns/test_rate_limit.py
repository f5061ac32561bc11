"""The rate limit: requests per caller and window; without Redis, every request passes."""

import asyncio
import time

import pytest
from fastapi import Request

from app.errors import TooManyRequestsError
from app.patterns import rate_limit
from app.patterns.fail_open import COOL_DOWN_SECONDS
from app.patterns.rate_limit import BUDGET_SECONDS, RateLimit, caller
from app.storage.redis import RedisClient
from scripts import dev_services
from tests.patterns.conftest import PATIENT_SECONDS
from tests.service_process import frozen


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a response of Redis may exceed the budget, and fakeredis always does."""
    monkeypatch.setattr(rate_limit, "BUDGET_SECONDS", PATIENT_SECONDS)


async def test_requests_over_the_limit_are_rejected(client: RedisClient) -> None:
    limit = RateLimit(client, "test", 2, 60)
    for _ in range(2):
        await limit.check("one")
    with pytest.raises(TooManyRequestsError) as rejected:
        await limit.check("one")
    headers = rejected.value.headers or {}
    seconds = headers["Retry-After"]
    assert 50 < int(seconds) <= 60
    assert headers == {
        "Retry-After": seconds,
        "RateLimit-Policy": '"test";q=2;w=60',
        "RateLimit": f'"test";r=0;t={seconds}',
    }
    await limit.check("other")
    await RateLimit(client, "another", 2).check("one")


async def test_new_window_begins_when_the_old_one_has_ended(client: RedisClient) -> None:
    limit = RateLimit(client, "test", 2, 2)
    for _ in range(2):
        for _ in range(2):
            await limit.check("one")
        with pytest.raises(TooManyRequestsError) as rejected:
            await limit.check("one")
        await asyncio.sleep(int((rejected.value.headers or {})["Retry-After"]))


async def test_caller_over_the_limit_is_rejected_without_redis(client: RedisClient) -> None:
    """A flood slows Redis down, and must not let itself through by that."""
    limit = RateLimit(client, "test", 2)
    for _ in range(2):
        await limit.check("one")
    with pytest.raises(TooManyRequestsError):
        await limit.check("one")
    limit.fail_open.unavailable_until = time.monotonic() + 60
    with pytest.raises(TooManyRequestsError):
        await limit.check("one")
    await limit.check("other")


async def test_concurrent_requests_share_calls_and_are_counted_each(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for the first, and one for those that come meanwhile; some leave before it ends."""
    limit = RateLimit(client, "test", 20)
    count = limit.script
    calls: list[list[str]] = []
    is_called = asyncio.Event()

    async def counted(keys: list[str], args: list[int]) -> object:
        calls.append(keys)
        is_called.set()
        return await count(keys=keys, args=args)

    monkeypatch.setattr(limit, "script", counted)
    first = asyncio.create_task(limit.check("one"))
    await is_called.wait()
    callers = ["one"] * 40 + ["other"] * 10
    requests = [asyncio.create_task(limit.check(caller)) for caller in callers]
    await asyncio.sleep(0)
    for leaving in (first, *requests[-5:]):
        leaving.cancel()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [len(keys) for keys in calls] == [1, 50]
    assert results[:19] == [None] * 19
    assert {type(result) for result in results[19:40]} == {TooManyRequestsError}
    assert results[40:45] == [None] * 5
    assert await client.get(client.key("rate:{test}:other")) == b"10"


async def test_error_of_a_call_reaches_each_of_its_requests(
    client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug, for example: no request waits forever, and the next ones are counted."""
    limit = RateLimit(client, "test", 20)
    with monkeypatch.context() as patch:
        patch.setattr(limit, "script", None)
        requests = [limit.check("one") for _ in range(3)]
        results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [TypeError] * 3
    await limit.check("one")
    assert await client.get(client.key("rate:{test}:one")) == b"1"


async def test_counter_without_expiry_is_reset(client: RedisClient) -> None:
    key = client.key("rate:{test}:one")
    await client.set(key, 5)
    await RateLimit(client, "test", 2).check("one")
    assert await client.get(key) == b"1"
    assert await client.pttl(key) > 0


async def test_hung_redis_lets_requests_pass_and_delays_one(
    client: RedisClient, real_redis: dev_services.Redis
) -> None:
    """The other requests are done at their first step, so they have waited for nothing."""
    limit = RateLimit(client, "test", 1)
    await limit.check("one")
    limit.fail_open.budget_seconds = BUDGET_SECONDS
    with frozen(real_redis.pid):
        start = time.monotonic()
        await limit.check("one")
        assert time.monotonic() - start < PATIENT_SECONDS / 2
        others = [asyncio.create_task(limit.check("one")) for _ in range(19)]
        await asyncio.sleep(0)
        assert [task.done() for task in others] == [True] * 19
        await asyncio.gather(*others)
    limit.fail_open.budget_seconds = PATIENT_SECONDS
    await asyncio.sleep(COOL_DOWN_SECONDS)
    with pytest.raises(TooManyRequestsError):
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
def test_anonymous_caller_is_its_address_or_network(host: str | None, expected: str) -> None:
    client = (host, 1) if host else None
    assert caller(Request({"type": "http", "client": client})) == expected


def test_authenticated_caller_is_its_principal() -> None:
    request = Request({"type": "http", "client": ("203.0.113.7", 1)})
    request.state.principal = "alice"
    assert caller(request) == "principal:alice"
