"""What a process holds while it serves: opened in order, closed in reverse, also when opening fails half-way."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypedDict

from redis.asyncio import Redis

from app import cache, machine, master
from app.background import Background
from app.database import Database
from app.health import Check, Health
from app.metrics import WorkerMetrics
from app.payments.service import Payments  # example
from app.plan import make_plan
from app.settings import Settings


class State(TypedDict):
    """What requests find in `request.state`."""

    settings: Settings
    database: Database
    cache: Redis
    background: Background
    health: Health
    payments: Payments  # example


#: Initialisation of the process itself, such as loading a model. Blocking work belongs in `asyncio.to_thread`.
WarmUp = Callable[[State], Awaitable[None]]
MEASURE_SECONDS = 1.0
logger = logging.getLogger("app.lifespan")


@contextlib.asynccontextmanager
async def open_state(
    settings: Settings, warm_ups: Sequence[WarmUp] = (), seconds_left: Callable[[], float] = lambda: 1.0
) -> AsyncIterator[State]:
    """Yield the state. No connection is made here: a process starts, and is live, while a dependency is away.

    `seconds_left` says, at the end, how long work in the background may still take.
    """
    async with contextlib.AsyncExitStack() as stack:
        share = make_plan(settings, machine.detect()).connections_per_worker
        database = await stack.enter_async_context(Database(settings, share))
        redis = await stack.enter_async_context(cache.connect(settings))
        probe = await stack.enter_async_context(cache.connect(settings, max_connections=1))  # readiness' own
        background = await stack.enter_async_context(Background(seconds_left))
        checks: dict[str, Check] = {"postgres": database.check, "redis": probe.ping}
        metrics = WorkerMetrics()
        health = Health(settings, checks, master.is_draining, metrics.up)
        state: State = {
            "settings": settings,
            "database": database,
            "cache": redis,
            "background": background,
            "health": health,
            "payments": Payments(settings, database, redis),  # example
        }
        await stack.enter_async_context(beside(health.watch()))
        await stack.enter_async_context(beside(_measure(metrics, state)))
        await stack.enter_async_context(beside(_warm_up(state, warm_ups)))
        for work in state["payments"].work():  # example
            await stack.enter_async_context(beside(work))  # example
        yield state


async def _measure(metrics: WorkerMetrics, state: State) -> None:
    """Keep the metrics of this process up to date."""
    while True:
        metrics.update(state["database"].pool, state["cache"].connection_pool)
        await asyncio.sleep(MEASURE_SECONDS)


async def _warm_up(state: State, warm_ups: Sequence[WarmUp]) -> None:
    """Run the warm-ups while liveness already answers. A failed one leaves the process `starting`, with a line."""
    try:
        for warm_up in warm_ups:
            await warm_up(state)
        state["health"].started = True
    except Exception:
        logger.exception("a warm-up failed, so this process stays in `starting`")


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something beside the requests; cancel it at the end."""
    task = asyncio.create_task(work)
    task.add_done_callback(_report)
    try:
        yield
    finally:
        while not task.done():  # Python 3.11's wait_for, which redis-py uses, can lose a cancellation
            task.cancel()
            await asyncio.wait([task], timeout=1)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("what ran beside the requests has failed", exc_info=error)
