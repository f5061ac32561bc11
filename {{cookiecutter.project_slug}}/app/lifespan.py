"""What a process holds while it serves: opened in order, closed in reverse, also when opening fails half-way."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypedDict

from redis.asyncio import Redis

from app.lifecycle import Lifecycle
from app.payments.service import Payments  # example
from app.settings import Settings
from app.sizing.plan import plan_workers
from app.sizing.resources import detect_resources
from app.storage.postgres import Database
from app.storage.redis import create_redis
from app.tasks import Background, background_task
from app.telemetry.process_metrics import WorkerMetrics
from app.web.health import Check, Health


class State(TypedDict):
    """What requests find in `request.state`."""

    settings: Settings
    database: Database
    redis: Redis
    background: Background
    health: Health
    payments: Payments  # example


#: Initialisation of the process itself, such as loading a model. Blocking work belongs in `asyncio.to_thread`.
WarmUp = Callable[[State], Awaitable[None]]
MEASURE_SECONDS = 1.0
logger = logging.getLogger("app.lifespan")


@contextlib.asynccontextmanager
async def open_state(
    settings: Settings, warm_ups: Sequence[WarmUp] = (), lifecycle: Lifecycle | None = None
) -> AsyncIterator[State]:
    """Yield the state. No connection is made here: a process starts, and is live, while a dependency is away.

    `lifecycle` says whether the pod drains, and how long work in the background may still take.
    """
    lifecycle = lifecycle or Lifecycle()
    async with contextlib.AsyncExitStack() as stack:
        share = plan_workers(settings, detect_resources()).connections_per_worker
        database = await stack.enter_async_context(Database(settings, share))
        redis = await stack.enter_async_context(create_redis(settings))
        probe = await stack.enter_async_context(
            create_redis(settings, max_connections=1)
        )  # readiness' own
        background = await stack.enter_async_context(Background(lifecycle.seconds_left))
        checks: dict[str, Check] = {"postgres": database.check, "redis": probe.ping}
        metrics = WorkerMetrics()
        health = Health(settings, checks, lambda: lifecycle.is_draining(), metrics.up)
        state: State = {
            "settings": settings,
            "database": database,
            "redis": redis,
            "background": background,
            "health": health,
            "payments": Payments(settings, database, redis),  # example
        }
        await stack.enter_async_context(background_task(health.watch()))
        await stack.enter_async_context(background_task(_measure(metrics, state)))
        await stack.enter_async_context(background_task(_warm_up(state, warm_ups)))
        for work in state["payments"].work():  # example
            await stack.enter_async_context(background_task(work))  # example
        yield state


async def _measure(metrics: WorkerMetrics, state: State) -> None:
    """Keep the metrics of this process up to date."""
    while True:
        metrics.update(state["database"].pool, state["redis"].connection_pool)
        await asyncio.sleep(MEASURE_SECONDS)


async def _warm_up(state: State, warm_ups: Sequence[WarmUp]) -> None:
    """Run the warm-ups while liveness already answers. A failed one leaves the process `starting`, with a line."""
    try:
        for warm_up in warm_ups:
            await warm_up(state)
        state["health"].started = True
    except Exception:
        logger.exception("a warm-up failed, so this process stays in `starting`")
