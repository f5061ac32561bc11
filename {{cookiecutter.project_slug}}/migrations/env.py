"""Run the migrations through asyncpg, or print them with `--sql`.

The application and the migrations share one `DATABASE_URL`, with its TLS parameters.
"""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
from alembic import context
from alembic.script.revision import MultipleHeads
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.network.event_loop import EventLoop
from app.settings import Settings, load_settings
from app.storage import postgres
from app.telemetry import logs

#: An arbitrary number, the same for every run: the holder of this lock migrates, others wait.
ADVISORY_LOCK = 7_236_514_099
#: Time between attempts to get the lock.
POLL_SECONDS = 0.5
CONNECT_TIMEOUT_SECONDS = 10
#: Each migration is a transaction, so that the next one can use a new enum value.
OPTIONS: dict[str, Any] = {"transaction_per_migration": True}
#: Better fail than make the queries of the service wait behind a lock that we wait for.
SET_LOCK_TIMEOUT = "set lock_timeout = '10s'"
#: The transaction that holds the lock is idle while a migration runs.
NO_TIMEOUTS = """
    select set_config(name, '0', true) from pg_settings
    where name in ('idle_in_transaction_session_timeout', 'transaction_timeout')
"""
REMEDY = "run `alembic merge heads -m merge`, and commit the new file"
logger = logging.getLogger("app.migrations")


async def connect(settings: Settings) -> asyncpg.Connection:
    """Return a connection. Exits with 1 and a log line if there is none."""
    try:
        return await postgres.connect(
            settings.database_url.get_secret_value(),
            timeout=CONNECT_TIMEOUT_SECONDS,
            statement_cache_size=0,
            server_settings={"application_name": f"{settings.service_name}-migrate"},
        )
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = str(error) or type(error).__name__
        logger.error("the database of DATABASE_URL cannot be reached: %s", reason)
        sys.exit(1)


async def try_lock(connection: asyncpg.Connection) -> bool:
    """Return whether this transaction has got the lock."""
    is_locked = await connection.fetchval("select pg_try_advisory_xact_lock($1)", ADVISORY_LOCK)
    # asyncpg leaves the query open, with its snapshot, for which `create index concurrently` would
    # wait. A query of the simple protocol closes it.
    await connection.execute("select")
    return bool(is_locked)


@contextlib.asynccontextmanager
async def lock(settings: Settings, stop: Callable[[str], None]) -> AsyncIterator[None]:
    """Hold the lock for the block, across the transactions of the migrations.

    It belongs to a transaction of a connection of its own, so that it works with PgBouncer in
    transaction mode, and ends with this process. It is polled: a statement that waits would itself
    be waited for by `create index concurrently`. `stop` is called if the connection is lost.
    """

    def lost(_: object) -> None:
        stop("the connection that holds the lock was lost")

    connection = await connect(settings)
    try:
        async with connection.transaction():
            await connection.execute(NO_TIMEOUTS)
            if not await try_lock(connection):
                logger.info("waiting for another run of the migrations")
                while not await try_lock(connection):  # noqa: ASYNC110 - another process ends it
                    await asyncio.sleep(POLL_SECONDS)
            connection.add_termination_listener(lost)
            yield
    finally:
        connection.remove_termination_listener(lost)
        connection.terminate()


def configure(connection: Connection) -> bool:
    """Prepare Alembic; return whether its command changes the database."""
    context.configure(connection=connection, **OPTIONS)
    return not context.get_context().opts.get("dont_mutate", False)


def run(_: Connection | None = None) -> None:
    """Run the command of Alembic. Exits with 1 and a line if two are the newest."""
    try:
        with context.begin_transaction():
            context.run_migrations()
    except CommandError as error:
        if not isinstance(error.__cause__, MultipleHeads):
            raise
        newest = " and ".join(context.script.get_heads())
        logger.error("several migrations are the newest, %s: %s", newest, REMEDY)
        sys.exit(1)


async def migrate(settings: Settings, stop: Callable[[str], None]) -> None:
    """Connect and run."""
    driver = await connect(settings)

    async def connected() -> asyncpg.Connection:
        return driver

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=connected, poolclass=NullPool
    )
    async with contextlib.AsyncExitStack() as stack:
        connection = await stack.enter_async_context(engine.connect())
        # Of the session: it also holds in an `autocommit_block()`.
        await connection.execute(text(SET_LOCK_TIMEOUT))
        await connection.commit()
        if await connection.run_sync(configure):
            await stack.enter_async_context(lock(settings, stop))
        await connection.run_sync(run)
        await connection.commit()


async def migrate_until_stopped(settings: Settings) -> None:
    """Migrate; exit with 1 and a log line if a signal, or the loss of the lock, stops it.

    A cancelled task has asyncpg cancel its statement at the server.
    """
    stopped_by: list[str] = []

    def stop(reason: str) -> None:
        stopped_by.append(reason)
        task.cancel()

    task = asyncio.create_task(migrate(settings, stop))
    for number in (signal.SIGTERM, signal.SIGINT):
        # Not possible outside of the main thread, where a program may run Alembic.
        with contextlib.suppress(ValueError, RuntimeError):
            asyncio.get_running_loop().add_signal_handler(number, stop, number.name)
    try:
        await task
    except (Exception, asyncio.CancelledError):
        # Not always the cancellation: Alembic may fail in its own cleanup.
        if not stopped_by:
            raise
        logger.error("the migration was stopped: %s", stopped_by[0])
        sys.exit(1)


def main() -> None:
    """Run the command of Alembic, or print its statements."""
    if context.is_offline_mode():
        context.configure(url="postgresql+asyncpg://", literal_binds=True, **OPTIONS)
        context.execute(SET_LOCK_TIMEOUT)
        run()
    else:
        settings = load_settings()
        logs.configure(settings)
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            runner.run(migrate_until_stopped(settings))


main()
