"""A process that serves no requests, such as a consumer, with the probes and the metrics of one that does.

It is an application whose routes are the probes and `/metrics`, on `METRICS_BIND`, and whose work is in its lifespan.
"""

import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from redis.asyncio import Redis

from app.settings import Settings
from app.storage.postgres import Database
from app.storage.redis import create_redis
from app.tasks import background_task
from app.telemetry import logs
from app.web import health

Work = Callable[[Settings, Database, Redis], AbstractAsyncContextManager[None]]
_UP = Gauge("dependency_up", "1 if it answers.", ["dependency"])


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True  # uvicorn's own would raise the signal again at the end, which looks like a failure


def run(settings: Settings, work: Work) -> None:
    """Work until SIGTERM or SIGINT. `work` is entered with connections to Postgres and Redis, and left at the end.

    It is ready while both answer; neither has to at the start. Raises `SystemExit` if `METRICS_BIND` is taken.
    """
    app = FastAPI(lifespan=lambda _: _open(settings, work), openapi_url=None)
    app.include_router(health.router)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    host, _, port = settings.metrics_bind.rpartition(":")
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), int(port)), family=family)
    except OSError as error:
        sys.exit(f"configuration error: METRICS_BIND={settings.metrics_bind}: {error.strerror}")
    options: dict[str, Any] = {
        "log_config": logs.config(settings),
        "access_log": False,
        "server_header": False,
    }
    _Server(uvicorn.Config(app, lifespan="on", **options)).run(sockets=[listener])


@contextlib.asynccontextmanager
async def _open(settings: Settings, work: Work) -> AsyncIterator[dict[str, Any]]:
    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            Database(settings, max(2, settings.database_max_connections))
        )
        redis = await stack.enter_async_context(create_redis(settings))
        probe = await stack.enter_async_context(
            create_redis(settings, max_connections=1)
        )  # readiness' own
        both = settings.model_copy(update={"readiness_required": ("postgres", "redis")})
        state = health.Health(
            both, {"postgres": database.check, "redis": probe.ping}, lambda: False, _UP
        )
        state.started = True
        await stack.enter_async_context(background_task(state.watch()))
        await stack.enter_async_context(work(settings, database, redis))
        yield {"health": state}
