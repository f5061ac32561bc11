"""What a process holds while it serves: opened in order, closed in reverse, also when opening fails half-way."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypedDict

from redis.asyncio import Redis

from app import cache, machine, server, sizing
from app.database import Database
from app.health import Check, Health
from app.settings import Settings


class State(TypedDict):
    """What requests find in `request.state`."""

    settings: Settings
    database: Database
    cache: Redis
    health: Health


#: Initialisation of the process itself, such as loading a model. Blocking work belongs in `asyncio.to_thread`.
WarmUp = Callable[[State], Awaitable[None]]
logger = logging.getLogger("app.lifespan")


@contextlib.asynccontextmanager
async def open_state(settings: Settings, warm_ups: Sequence[WarmUp] = ()) -> AsyncIterator[State]:
    """Yield the state. No connection is made here: a process starts, and is live, while a dependency is away."""
    async with contextlib.AsyncExitStack() as stack:
        share = sizing.plan(settings, machine.detect()).connections_per_worker
        database = await stack.enter_async_context(Database(settings, share))
        redis = await stack.enter_async_context(cache.connect(settings))
        probe = await stack.enter_async_context(cache.connect(settings, max_connections=1))  # readiness' own
        checks: dict[str, Check] = {"postgres": database.check, "redis": probe.ping}
        health = Health(settings, checks, server.is_draining)
        state: State = {"settings": settings, "database": database, "cache": redis, "health": health}
        await stack.enter_async_context(_background(health.watch()))
        await stack.enter_async_context(_background(_warm_up(state, warm_ups)))
        yield state


async def _warm_up(state: State, warm_ups: Sequence[WarmUp]) -> None:
    """Run the warm-ups while liveness already answers. A failed one leaves the process `starting`, with a line."""
    try:
        for warm_up in warm_ups:
            await warm_up(state)
        state["health"].started = True
    except Exception:
        logger.exception("a warm-up failed, so this process stays in `starting`")


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something beside the requests; cancel it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
