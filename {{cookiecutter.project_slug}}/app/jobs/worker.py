"""The work of `python -m app.jobs_main`: the clients of a worker, and what it does with them."""

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from app.jobs import job_metrics
from app.jobs.consume import subscriptions
from app.jobs.dispatcher import Dispatcher
from app.jobs.handlers import handlers
from app.jobs.postgres_dispatcher import PostgresDispatcher
from app.jobs.rabbitmq_dispatcher import RabbitMQDispatcher
from app.jobs.runner import Runner
from app.jobs.schedules import schedules
from app.process_pool.pool import ProcessPool
from app.settings import Settings
from app.sizing.plan import MIN_CONNECTIONS
from app.sizing.resources import detect_resources
from app.storage.postgres import Database
from app.storage.redis import RedisClient
from app.tasks import background_task
from app.web.health import Check, Health

#: The part of `GRACEFUL_TIMEOUT_SECONDS` that is kept for releasing jobs and closing connections.
CLOSING_SECONDS = 5
logger = logging.getLogger("app.jobs")


class Clients(NamedTuple):
    """The clients of a worker: Postgres, and RabbitMQ if `AMQP_URL` is set."""

    database: Database
    #: With one connection, for the leases of jobs.
    leases: Database
    dispatcher: Dispatcher
    checks: Mapping[str, Check]
    #: A worker needs no Redis.
    redis: RedisClient | None = None


@contextlib.asynccontextmanager
async def open_clients(
    settings: Settings, connections: int, process: str
) -> AsyncIterator[Clients]:
    """Open the clients. Nothing connects before first use."""
    # One of them renews the leases.
    others = max(MIN_CONNECTIONS, connections - 1)
    async with (
        Database(settings, others, process) as database,
        Database(settings, MIN_CONNECTIONS, f"{process}-leases") as leases,
        _create_dispatcher(settings, database) as dispatcher,
    ):
        checks = {"postgres": database.check, **dispatcher.checks}
        yield Clients(database, leases, dispatcher, checks)


@contextlib.asynccontextmanager
async def run_worker(settings: Settings, clients: Clients, _: Health) -> AsyncIterator[None]:
    """Do jobs during the block, then finish those under way.

    Those that take longer than the grace are released, and done by another worker.
    """
    async with contextlib.AsyncExitStack() as stack:
        processes = await stack.enter_async_context(_create_processes(settings))
        runner = Runner(handlers, clients.database, processes)
        for work in (
            runner.renew_leases(clients.leases),
            schedules.run(clients.database, settings.job_timezone),
            job_metrics.update_periodically(clients.database),
        ):
            await stack.enter_async_context(background_task(work))
        await clients.dispatcher.start(runner.receive)
        try:
            yield
        finally:
            await clients.dispatcher.stop()
            await runner.finish(settings.graceful_timeout_seconds - CLOSING_SECONDS)


def _create_dispatcher(settings: Settings, database: Database) -> Dispatcher:
    if settings.amqp_url.get_secret_value():
        return RabbitMQDispatcher(settings, database)
    for each in subscriptions.all:
        logger.info("not consumed, since AMQP_URL is not set: %s", each.queue)
    return PostgresDispatcher(database, settings.job_concurrency)


def _create_processes(settings: Settings) -> ProcessPool:
    """Create the pool for computations, which wait for a free process as long as their job may.

    They delay neither the event loop of this worker nor other services in its control group, unless
    `JOB_YIELDS_CPU` is false.
    """
    return ProcessPool(
        settings,
        processes=settings.job_processes or max(1, round(detect_resources().cpus)),
        max_waiting=None,
        timeout_seconds=None,
        calls_per_process=settings.job_calls_per_process,
        is_background=settings.job_yields_cpu,
    )
