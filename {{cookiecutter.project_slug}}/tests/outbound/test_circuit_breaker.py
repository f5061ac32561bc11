"""The circuit breaker: a failing upstream gets few calls, then one probe per period."""

import asyncio
import contextlib
import logging

import pytest

from app.outbound.circuit_breaker import CircuitBreaker, CircuitOpenError

RESET_SECONDS = 3.0


class Clock:
    """The time of a breaker. It advances only when a test sets it."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("app.outbound.circuit_breaker.time", clock)
    return clock


class Upstream:
    """An upstream behind a breaker, which counts its calls."""

    def __init__(self, max_failures: int = 5) -> None:
        self.breaker = CircuitBreaker("test", max_failures, RESET_SECONDS)
        self.is_down = True
        self.calls = 0

    async def call(self, seconds: float = 0.01) -> str:
        with self.breaker.call():
            self.calls += 1
            await asyncio.sleep(seconds)
            if self.is_down:
                raise ConnectionError
            return "ok"

    async def call_concurrently(self, number: int) -> list[str | BaseException]:
        calls = [self.call() for _ in range(number)]
        return await asyncio.gather(*calls, return_exceptions=True)


async def test_failing_upstream_is_called_a_few_times_then_probed(clock: Clock) -> None:
    upstream = Upstream()
    for _ in range(20):
        with contextlib.suppress(ConnectionError, CircuitOpenError):
            await upstream.call()
    assert upstream.calls == 5
    for probes in range(1, 4):
        clock.seconds += RESET_SECONDS
        results = await upstream.call_concurrently(50)
        assert upstream.calls == 5 + probes
        assert sum(isinstance(result, CircuitOpenError) for result in results) == 49


async def test_concurrent_calls_are_limited_to_the_allowed_failures() -> None:
    upstream = Upstream()
    with contextlib.suppress(ConnectionError):
        await upstream.call()
    await upstream.call_concurrently(50)
    assert upstream.calls == 5


async def test_successful_probe_closes_the_circuit(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = Upstream(1)
    with pytest.raises(ConnectionError):
        await upstream.call()
    upstream.is_down = False
    with pytest.raises(CircuitOpenError) as rejected:
        await upstream.call()
    assert 0 < rejected.value.retry_in <= RESET_SECONDS
    clock.seconds += RESET_SECONDS
    assert await upstream.call() == "ok"
    assert await upstream.call_concurrently(50) == ["ok"] * 50
    assert caplog.record_tuples == [
        ("app.breaker", logging.WARNING, "circuit breaker open: test"),
        ("app.breaker", logging.WARNING, "circuit breaker closed: test"),
    ]


async def test_only_consecutive_failures_count() -> None:
    upstream = Upstream(2)
    for is_down in (True, False, True, False):
        upstream.is_down = is_down
        with contextlib.suppress(ConnectionError):
            await upstream.call()
    assert upstream.calls == 4


async def test_cancelled_probe_is_followed_by_another(clock: Clock) -> None:
    upstream = Upstream(1)
    with contextlib.suppress(ConnectionError):
        await upstream.call()
    clock.seconds += RESET_SECONDS
    probe = asyncio.create_task(upstream.call(60))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    upstream.is_down = False
    assert await upstream.call() == "ok"


async def test_late_failure_does_not_extend_the_open_period(clock: Clock) -> None:
    """A call from before the circuit opened reports nothing new."""
    upstream = Upstream(1)
    late = asyncio.create_task(upstream.call(0.05))
    await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        await upstream.call(0)
    clock.seconds += RESET_SECONDS * 0.9
    with contextlib.suppress(ConnectionError):
        await late
    clock.seconds += RESET_SECONDS * 0.2
    upstream.is_down = False
    assert await upstream.call() == "ok"
