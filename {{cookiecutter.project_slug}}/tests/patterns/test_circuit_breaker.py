"""A breaker lets few calls through to an upstream that is down, and just one that looks whether it is back."""

import asyncio
import contextlib

import pytest

from app.patterns.circuit_breaker import CircuitBreaker, CircuitOpenError

RESET = 3.0


class Clock:
    """The time of a breaker: it goes by when a test says so, not while a busy machine does something else."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("app.patterns.circuit_breaker.time", clock)
    return clock


class Upstream:
    """Something that is called through a breaker; it takes a moment, and counts."""

    def __init__(self, failures: int = 5) -> None:
        self.breaker, self.is_down, self.calls = CircuitBreaker("test", failures, RESET), True, 0

    async def call(self, seconds: float = 0.01) -> str:
        with self.breaker.call():
            self.calls += 1
            await asyncio.sleep(seconds)
            if self.is_down:
                raise ConnectionError
            return "ok"

    async def calls_of(self, number: int) -> list[str | BaseException]:
        return await asyncio.gather(*(self.call() for _ in range(number)), return_exceptions=True)


async def test_a_dead_upstream_is_called_a_few_times_and_then_once_in_each_period(
    clock: Clock,
) -> None:
    upstream = Upstream()
    for _ in range(20):
        with contextlib.suppress(ConnectionError, CircuitOpenError):
            await upstream.call()
    assert upstream.calls == 5
    for probes in range(1, 4):
        clock.seconds += RESET
        answers = await upstream.calls_of(50)
        assert upstream.calls == 5 + probes
        assert sum(isinstance(answer, CircuitOpenError) for answer in answers) == 49


async def test_of_many_calls_at_once_no_more_get_through_than_may_fail() -> None:
    upstream = Upstream()
    with contextlib.suppress(ConnectionError):
        await upstream.call()
    await upstream.calls_of(50)
    assert upstream.calls == 5


async def test_one_success_closes_the_circuit_for_all(clock: Clock) -> None:
    upstream = Upstream(1)
    with pytest.raises(ConnectionError):
        await upstream.call()
    upstream.is_down = False
    with pytest.raises(CircuitOpenError) as error:
        await upstream.call()
    assert 0 < error.value.retry_in <= RESET
    clock.seconds += RESET
    assert await upstream.call() == "ok"
    assert await upstream.calls_of(50) == ["ok"] * 50


async def test_failures_count_in_a_row_only() -> None:
    upstream = Upstream(2)
    for is_down in (True, False, True, False):
        upstream.is_down = is_down
        with contextlib.suppress(ConnectionError):
            await upstream.call()
    assert upstream.calls == 4


async def test_a_probe_that_is_cancelled_says_nothing_and_the_next_one_looks(clock: Clock) -> None:
    upstream = Upstream(1)
    with contextlib.suppress(ConnectionError):
        await upstream.call()
    clock.seconds += RESET
    probe = asyncio.create_task(upstream.call(60))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    upstream.is_down = False
    assert await upstream.call() == "ok"


async def test_a_late_failure_of_before_does_not_keep_the_circuit_open(clock: Clock) -> None:
    upstream = Upstream(1)
    late = asyncio.create_task(upstream.call(0.05))
    await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        await upstream.call(0)
    clock.seconds += RESET * 0.9
    with contextlib.suppress(ConnectionError):
        await late
    clock.seconds += RESET * 0.2
    upstream.is_down = False
    assert await upstream.call() == "ok"
