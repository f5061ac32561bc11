"""Background tasks: their shutdown and their failures; steps are never cut off."""

import asyncio
import contextlib
import gc
import logging
import time

import asyncpg
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from app import tasks
from app.errors import UnavailableError
from app.tasks import Background, StateLog, background_task, describe, run_to_completion

LONG_SECONDS = 20.0


async def fail() -> None:
    raise RuntimeError("boom")


async def sleep_long() -> None:
    """Run until cancelled; a test that waits for its end fails."""
    await asyncio.sleep(LONG_SECONDS)


def in_a_minute() -> float:
    """The seconds left until a deadline that no test reaches."""
    return 3 * LONG_SECONDS


def assert_one_failure(caplog: pytest.LogCaptureFixture, logger: str) -> None:
    """Assert that the failure of `fail` is one log line."""
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert record.name == logger
    assert record.message == "background task failed"
    assert vars(record)["task"] == "fail"
    assert record.exc_info
    assert str(record.exc_info[1]) == "boom"


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# Background: tasks of requests


async def test_background_failure_is_one_line_with_the_task_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Background(in_a_minute) as background:
        background.start(fail())
    assert_one_failure(caplog, "app.background")


async def test_shutdown_waits_for_background_tasks(caplog: pytest.LogCaptureFixture) -> None:
    finished = []

    async def work() -> None:
        await asyncio.sleep(0.2)
        finished.append("work")

    async with Background(in_a_minute) as background:
        background.start(work())
        assert finished == []
    assert finished == ["work"]
    await asyncio.sleep(0)  # callbacks of a task run after its end
    assert background.tasks == set()
    assert caplog.messages == [
        "waiting for 1 background tasks",
        "1 background tasks finished, 0 cancelled",
    ]
    assert caplog.records[-1].levelname == "INFO"


async def test_tasks_running_at_the_deadline_are_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cancelled = []

    async def work() -> None:
        try:
            await sleep_long()
        except asyncio.CancelledError:
            cancelled.append("work")
            raise

    deadline = time.monotonic() + 0.3
    async with Background(lambda: deadline - time.monotonic()) as background:
        background.start(asyncio.sleep(0))
        background.start(work())
    assert time.monotonic() >= deadline
    assert cancelled == ["work"]
    assert caplog.messages == [
        "waiting for 2 background tasks",
        "1 background tasks finished, 1 cancelled",
    ]
    assert caplog.records[-1].levelname == "WARNING"


async def test_earlier_deadline_takes_effect_during_shutdown() -> None:
    """A second signal turns a graceful shutdown into a quick one."""
    seconds_left = [LONG_SECONDS, LONG_SECONDS, 0.0]
    start = time.monotonic()
    async with Background(lambda: seconds_left.pop(0)) as background:
        background.start(sleep_long())
    assert time.monotonic() - start < LONG_SECONDS
    assert seconds_left == []


async def test_shutdown_does_not_wait_for_uncancellable_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 0.1)
    is_over = asyncio.Event()

    async def work() -> None:
        while not is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await is_over.wait()

    try:
        async with asyncio.timeout(LONG_SECONDS), Background(lambda: 0.0) as background:
            background.start(work())
            await asyncio.sleep(0)
        (task,) = background.tasks
        assert not task.done()
    finally:
        is_over.set()
    await task


async def test_shutdown_without_background_tasks_logs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Background(in_a_minute):
        pass
    assert caplog.messages == []


# background_task: tasks of the process


async def test_background_task_is_cancelled_at_the_end_of_its_block() -> None:
    events = []

    async def work() -> None:
        events.append("started")
        try:
            await sleep_long()
        finally:
            events.append("cancelled")

    async with background_task(work()):
        await asyncio.sleep(0)
        events.append("block")
    assert events == ["started", "block", "cancelled"]


async def test_background_task_failure_is_logged_and_not_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with background_task(fail()):
        await asyncio.sleep(0.01)
    assert_one_failure(caplog, "app.lifespan")


async def test_background_task_that_loses_a_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python 3.11's `wait_for` can lose one."""
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 0.1)
    cancellations = 0

    async def work() -> None:
        nonlocal cancellations
        while cancellations < 2:
            try:
                await sleep_long()
            except asyncio.CancelledError:
                cancellations += 1

    async with background_task(work()):
        await asyncio.sleep(0)
    assert cancellations == 2


# run_to_completion


async def test_step_returns_its_result() -> None:
    assert await run_to_completion(asyncio.sleep(0, "result")) == "result"


async def test_step_raises_its_error() -> None:
    with pytest.raises(RuntimeError, match="boom"):
        await run_to_completion(fail())


async def test_cancellation_takes_effect_after_the_step() -> None:
    events = []

    async def step() -> None:
        await asyncio.sleep(0.1)
        events.append("committed")

    task = asyncio.create_task(run_to_completion(step()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["committed"]


async def test_error_of_a_cancelled_step_is_not_logged_as_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio logs an error that nothing retrieves."""

    async def step() -> None:
        await asyncio.sleep(0.01)
        raise RuntimeError("boom")

    task = asyncio.create_task(run_to_completion(step()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    assert caplog.messages == []


async def test_second_cancellation_takes_effect_at_once() -> None:
    is_over = asyncio.Event()
    step = asyncio.ensure_future(is_over.wait())
    task = asyncio.create_task(run_to_completion(step))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not step.done()
    is_over.set()
    await step


# StateLog


def test_state_log_logs_each_cause_and_the_recovery_once(caplog: pytest.LogCaptureFixture) -> None:
    log = StateLog(logging.getLogger("app.tests"), "redis unavailable", "redis available again")
    log.succeeded()
    assert caplog.messages == []
    log.failed("timeout", dependency="redis")
    log.failed("timeout after 2 s", dependency="redis")
    log.failed("reset", dependency="redis")
    assert log.is_failing
    log.succeeded(dependency="redis")
    log.succeeded(dependency="redis")
    assert not log.is_failing
    log.failed("timeout")
    lines = [(record.levelname, record.name, record.message) for record in caplog.records]
    assert lines == [
        ("WARNING", "app.tests", "redis unavailable: timeout"),
        ("WARNING", "app.tests", "redis unavailable: reset"),
        ("INFO", "app.tests", "redis available again"),
        ("WARNING", "app.tests", "redis unavailable: timeout"),
    ]
    extras = [vars(record).get("dependency") for record in caplog.records]
    assert extras == ["redis", "redis", "redis", None]


# Descriptions of errors

UNKNOWN = "unknown command 'XADD', with args beginning with: 'orders' 'secret'"
IN_PIPELINE = f"Command # 1 (SET key secret) of pipeline caused error: {('full',)}"
OF_A_ROW = "duplicate key value\nDETAIL:  Key (email)=(secret) already exists."


@pytest.mark.parametrize(
    ("error", "description"),
    [
        (ResponseError(UNKNOWN, status_code="ERR"), "ERR unknown command 'XADD'"),
        (ResponseError(IN_PIPELINE, status_code="OOM"), "OOM full"),
        (ResponseError("WRONGTYPE Operation against a key"), "WRONGTYPE Operation against a key"),
        (ReadOnlyError("not on a replica", status_code="READONLY"), "READONLY not on a replica"),
        (RedisConnectionError("Error 111"), "ConnectionError: Error 111"),
        (asyncpg.UniqueViolationError(OF_A_ROW), "UniqueViolationError: duplicate key value"),
        (UnavailableError("It is down."), "UnavailableError: 503: It is down."),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_description_has_the_cause_without_arguments(error: Exception, description: str) -> None:
    assert describe(error) == description


def test_description_is_bounded() -> None:
    assert len(describe(ResponseError("a" * 10_000))) == tasks.MAX_MESSAGE
