"""Runs a process without routes, such as a consumer, with probes, metrics and a graceful shutdown.

It is an application whose routes are the probes and `/metrics`, on `METRICS_BIND`, and whose work
is in its lifespan.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.lifecycle import Lifecycle, isolate_children
from app.settings import Settings, fail
from app.sizing.plan import MIN_CONNECTIONS, pod_connections
from app.storage import Storage, open_storage
from app.storage.postgres import Database
from app.storage.redis import RedisClient
from app.tasks import background_task
from app.telemetry import logs
from app.telemetry.control_group import ControlGroupCollector
from app.telemetry.metrics_prefix import PrefixedMetrics
from app.telemetry.pod_metrics import set_pod_metrics
from app.telemetry.process_metrics import ProcessMetrics, dropped_log_lines
from app.telemetry.scrape_server import MAX_CONNECTIONS
from app.telemetry.stdout import LOG_LINES
from app.telemetry.trace_setup import open_tracing
from app.web.health import Check, Health
from app.web.health import router as health_router

#: Time limit for a connection, from its start to the end of its response.
CONNECTION_SECONDS = 30.0
#: Time limit for responses at shutdown, before the work is closed.
RESPONSES_SECONDS = 2


class Clients(Protocol):
    """The clients of a process. It is ready while all their checks succeed."""

    @property
    def database(self) -> Database:
        """Postgres."""

    @property
    def redis(self) -> RedisClient | None:
        """Redis, if the process uses it."""

    @property
    def checks(self) -> Mapping[str, Check]:
        """A check of each dependency, by its name."""


Opened = TypeVar("Opened", bound=Clients)
#: Opens the clients of a process: settings, number of connections to Postgres, name of the process.
OpenClients = Callable[[Settings, int, str], AbstractAsyncContextManager[Opened]]
#: Opens the work of a process, and closes it at shutdown.
Work = Callable[[Settings, Opened, Health], AbstractAsyncContextManager[None]]


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Exit with 0: uvicorn would raise the signal again, which looks like a failure."""
        self.should_exit = True


class _Connection(HttpToolsProtocol):
    """One connection, with one request.

    A connection over the limit closes the oldest one, preferably one without a request. So idle
    clients, and clients that do not read, keep no probe from its response.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and limit its time."""
        super().connection_made(transport)
        self.time_limit = self.loop.call_later(CONNECTION_SECONDS, transport.abort)
        if len(self.connections) > MAX_CONNECTIONS:
            oldest: Any = min(self.connections, key=_has_request_and_age)
            oldest.transport.abort()
            # uvicorn does so later, when the next ones may have been accepted.
            self.connections.discard(oldest)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the connection."""
        self.time_limit.cancel()
        super().connection_lost(exc)


def _has_request_and_age(connection: Any) -> tuple[bool, float]:
    """Return a key for sorting: connections without a request first, then the oldest."""
    cycle = connection.cycle
    has_request = cycle is not None and not cycle.response_complete
    return has_request, connection.time_limit.when()


def run(settings: Settings, work: Work[Storage], name: str = "consumer") -> None:
    """Work with Postgres and Redis until SIGTERM or SIGINT.

    `name` distinguishes the process in `pg_stat_activity`. `work` is entered with the clients, and
    left at shutdown. The process is ready while both respond, which `health.is_ready()` returns;
    neither has to at the start.

    Raises `SystemExit` if `METRICS_BIND` is in use.
    """
    run_with(settings, open_storage, work, name)


def run_with(
    settings: Settings, open_clients: OpenClients[Opened], work: Work[Opened], name: str
) -> None:
    """Do the same with other clients, such as those of a process without Redis."""
    logs.capture_prints(settings)
    set_pod_metrics(settings)
    REGISTRY.register(ControlGroupCollector())
    dropped_lines = dropped_log_lines(REGISTRY)
    exposed = PrefixedMetrics(REGISTRY, settings.metrics_prefix)
    state = _open(settings, open_clients, work, name)
    app = FastAPI(lifespan=lambda _: state, openapi_url=None)
    app.include_router(health_router)

    @app.get("/metrics")
    async def serve_metrics() -> Response:
        dropped_lines.inc(LOG_LINES.take_dropped())
        return Response(generate_latest(exposed), media_type=CONTENT_TYPE_LATEST)

    options: dict[str, Any] = {
        "log_config": logs.config(settings),
        "access_log": False,
        "server_header": False,
        "http": _Connection,
        "loop": "app.network.event_loop:EventLoop",
        "headers": [("Connection", "close")],
        "timeout_graceful_shutdown": RESPONSES_SECONDS,
    }
    isolate_children()
    config = uvicorn.Config(app, lifespan="on", **options)
    _Server(config).run(sockets=[_listen(settings)])


def _listen(settings: Settings) -> socket.socket:
    address = settings.metrics_bind
    try:
        return socket.create_server((address.host, address.port), family=address.family)
    except OSError as error:
        fail("METRICS_BIND", address, f"cannot listen there: {error.strerror}")


@contextlib.asynccontextmanager
async def _open(
    settings: Settings, open_clients: OpenClients[Opened], work: Work[Opened], name: str
) -> AsyncIterator[dict[str, Any]]:
    """Yield the state of the probes while the work is open."""
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(open_tracing(settings))
        connections = max(MIN_CONNECTIONS, pod_connections(settings, workers=1))
        clients = await stack.enter_async_context(open_clients(settings, connections, name))

        required = tuple(clients.checks)
        metrics = ProcessMetrics(REGISTRY, required)
        all_checks = settings.model_copy(update={"readiness_required": required})
        health = Health(all_checks, clients.checks, Lifecycle(), metrics.up)
        health.started = True
        await stack.enter_async_context(background_task(health.watch()))
        redis_pool = clients.redis.connection_pool if clients.redis else None
        update = metrics.update_periodically(clients.database, redis_pool)
        await stack.enter_async_context(background_task(update))

        await stack.enter_async_context(work(settings, clients, health))
        yield {"health": health}
