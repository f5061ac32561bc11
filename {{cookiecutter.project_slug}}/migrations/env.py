"""Runs the migrations through asyncpg, so that one `DATABASE_URL` with its TLS parameters serves app and migrations."""

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

#: Any number, the same for every run: whoever holds this lock migrates, another run waits for it.
ADVISORY_LOCK = 7_236_514_099
CONNECT_TIMEOUT_SECONDS = 10


def run(connection: Connection) -> None:
    """Run what is missing, in one transaction; PgBouncer in transaction mode carries its lock too."""
    context.configure(connection=connection)
    with context.begin_transaction():
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        connection.execute(
            text("set local lock_timeout = '10s'")
        )  # rather fail than queue the service behind us
        context.run_migrations()


async def migrate() -> None:
    """Connect and run. If the database cannot be reached, one line says so and the exit code is 1."""
    settings = load_settings()
    logs.configure(settings)
    url = settings.database_url.get_secret_value()
    try:
        driver = await asyncpg.connect(url, timeout=CONNECT_TIMEOUT_SECONDS, statement_cache_size=0)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        logging.getLogger("app.migrations").error(
            "the database of DATABASE_URL cannot be reached: %s", str(error) or type(error).__name__
        )
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
