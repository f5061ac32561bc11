"""Run the migrations through asyncpg.

The application and the migrations share one `DATABASE_URL`, with its TLS parameters.
"""

import asyncio
import logging
import sys

import asyncpg
from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.settings import load_settings
from app.telemetry import logs

#: An arbitrary number, the same for every run: the holder of this lock migrates, others wait.
ADVISORY_LOCK = 7_236_514_099
CONNECT_TIMEOUT_SECONDS = 10
logger = logging.getLogger("app.migrations")


def run(connection: Connection) -> None:
    """Run the missing migrations in one transaction.

    The lock belongs to the transaction, so that it also works with PgBouncer in transaction mode.
    """
    context.configure(connection=connection)
    with context.begin_transaction():
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        # Better fail than make the queries of the service wait behind a lock that we wait for.
        connection.execute(text("set local lock_timeout = '10s'"))
        context.run_migrations()


async def migrate() -> None:
    """Connect and run. Exits with 1 and a log line if there is no connection."""
    settings = load_settings()
    logs.configure(settings)
    url = settings.database_url.get_secret_value()
    names = {"application_name": f"{settings.service_name}-migrate"}
    try:
        driver = await asyncpg.connect(
            url, timeout=CONNECT_TIMEOUT_SECONDS, statement_cache_size=0, server_settings=names
        )
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = str(error) or type(error).__name__
        logger.error("the database of DATABASE_URL cannot be reached: %s", reason)
        sys.exit(1)

    async def connected() -> asyncpg.Connection:
        return driver

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=connected, poolclass=NullPool
    )
    async with engine.connect() as connection:
        await connection.run_sync(run)
        await connection.commit()


asyncio.run(migrate())
