"""The resources of the API process while it serves: opened in order, closed in reverse.

They are closed in reverse also when opening fails half-way.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypedDict

from app.auth import open_authenticator
from app.auth.authenticator import Authenticator
from app.lifecycle import Lifecycle
from app.payments.service import Payments, open_payments  # example
from app.settings import Settings
from app.sizing.plan import plan_workers
from app.sizing.resources import detect_resources
from app.storage import Storage, open_storage
from app.storage.postgres import Database
from app.storage.redis import RedisClient
from app.storage.replica import Source, open_replica
from app.tasks import Background, background_task
from app.telemetry.process_metrics import WorkerMetrics
from app.telemetry.trace_setup import open_tracing
from app.web.health import Health


class State(TypedDict):
    """The content of `request.state`."""

    settings: Settings
    database: Database
    replica: Source
    redis: RedisClient
    background: Background
    health: Health
    authenticator: Authenticator | None
    payments: Payments  # example


#: Initialization of the process, such as loading a model. Blocking work: `asyncio.to_thread`.
WarmUp = Callable[[State], Awaitable[None]]
logger = logging.getLogger("app.lifespan")


@contextlib.asynccontextmanager
async def open_state(
    settings: Settings, warm_ups: Sequence[WarmUp] = (), lifecycle: Lifecycle | None = None
) -> AsyncIterator[State]:
    """Yield the state.

    Nothing connects here: a process starts, and is live, while a dependency is unavailable.
    """
    lifecycle = lifecycle or Lifecycle()
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        # Traces first, which are then closed last; Postgres and Redis
        await enter(open_tracing(settings))
        storage, replica = await enter(_open_clients(settings))
        # Background tasks of requests, for which shutdown waits; authentication, None if it is off
        background = await enter(Background(lifecycle.seconds_left))
        authenticator = await enter(open_authenticator(settings))

        # Metrics of this process, and its probes
        health = await enter(_open_health(settings, storage, replica, lifecycle))

        # Features
        payments = await enter(open_payments(settings, storage))  # example
        state: State = {
            "settings": settings,
            "database": storage.database,
            "replica": replica,
            "redis": storage.redis,
            "background": background,
            "health": health,
            "authenticator": authenticator,
            "payments": payments,  # example
        }
        await enter(background_task(_warm_up(state, warm_ups)))
        yield state


@contextlib.asynccontextmanager
async def _open_clients(settings: Settings) -> AsyncIterator[tuple[Storage, Source]]:
    plan = plan_workers(settings, detect_resources())
    async with (
        open_storage(settings, plan.primary_connections) as storage,
        open_replica(settings, storage.database, plan.replica_connections) as replica,
    ):
        yield storage, replica


@contextlib.asynccontextmanager
async def _open_health(
    settings: Settings, storage: Storage, replica: Source, lifecycle: Lifecycle
) -> AsyncIterator[Health]:
    """Yield the state of the probes; keep it, and the gauges of this process, up to date."""
    metrics = WorkerMetrics(settings.readiness_required)
    health = Health(settings, {**storage.checks, **replica.checks}, lifecycle, metrics.up)
    update = metrics.update_periodically(
        storage.database, storage.redis.connection_pool, replica.database
    )
    async with background_task(update), background_task(health.watch()):
        yield health


async def _warm_up(state: State, warm_ups: Sequence[WarmUp]) -> None:
    """Run the warm-ups while the liveness probe already responds.

    A failed one leaves the process `starting`, with a log line.
    """
    try:
        for warm_up in warm_ups:
            await warm_up(state)
        state["health"].started = True
    except Exception:
        logger.exception("warm-up failed, this process stays in `starting`")
