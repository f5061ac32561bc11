"""Postgres: a pool that fails fast, sheds load instead of queueing for ever, and survives restarts of the server."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Self, TypeVar

import asyncpg
from fastapi import Depends, Request

from app.errors import UnavailableError
from app.settings import Settings
from app.storage.postgres_errors import (
    CONNECTION_ERRORS,
    SHUTDOWN_ERRORS,
    BoundedCancelConnection,
    ConnectionLostError,
    translate_errors,
)

#: Seconds that connecting may take.
CONNECT_TIMEOUT_SECONDS = 3.0
#: Seconds that closing may take.
CLOSE_TIMEOUT_SECONDS = 1.0
#: Seconds between tries, of which the first follows at once; a random part of them is waited.
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.05, 0.5
Connection = asyncpg.pool.PoolConnectionProxy
Result = TypeVar("Result")


class Database:
    """The connections of one worker: a pool to serve requests, and one connection of readiness' own.

    Nothing connects before first use, so a process starts while the server is away.
    """

    def __init__(self, settings: Settings, connections: int) -> None:
        """Take `connections`, this worker's share of the pod's budget; one of them is readiness'."""
        self.settings = settings
        self.url = settings.database_url.get_secret_value()
        self.pool = asyncpg.create_pool(
            self.url,
            min_size=0,
            max_size=connections - 1,
            timeout=CONNECT_TIMEOUT_SECONDS,
            command_timeout=settings.database_command_timeout_seconds,
            statement_cache_size=settings.database_statement_cache_size,
            connection_class=BoundedCancelConnection,
            server_settings={"application_name": settings.service_name},
        )
        self.probe: asyncpg.Connection | None = None
        self.unavailable_since: float | None = (
            None  # when it was found away first, after it had answered
        )

    async def __aenter__(self) -> Self:
        await self.pool
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for connections in use, but not for a server that does not answer."""
        if self.probe is not None:
            self.probe.terminate()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                await self.pool.close()
        except TimeoutError:
            self.pool.terminate()

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """Lend a connection. Raises `UnavailableError` if none is free in time, or when the server does not answer.

        A connection that is no good any more is replaced; that is no error of work that is done.
        """
        connection = await self._connect()
        try:
            with translate_errors(connection):
                yield connection
            self.unavailable_since = None
        finally:
            with contextlib.suppress(asyncpg.PostgresError, *CONNECTION_ERRORS):
                await self.pool.release(connection)

    async def retry(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Do work that may be done twice, such as a read, and do it again if the server goes away meanwhile.

        Raises `UnavailableError` when an outage lasts longer than `DATABASE_RETRY_SECONDS`, or at once when a command
        takes too long: a server that does not answer may still be working on it.
        """
        tries = 0
        while True:
            try:
                async with self.acquire() as connection:
                    return await work(connection)
            except ConnectionLostError:
                if not await self._back_off(tries):
                    raise
            tries += 1

    async def _connect(self) -> Connection:
        tries = 0
        while True:
            try:
                return await self.pool.acquire(
                    timeout=self.settings.database_acquire_timeout_seconds
                )
            except TimeoutError as error:
                raise UnavailableError("No connection to the database was free in time.") from error
            except (*SHUTDOWN_ERRORS, OSError, asyncpg.InternalClientError) as error:
                if not await self._back_off(tries):
                    raise ConnectionLostError("The database is not available.") from error
            except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # it does not want us
                raise UnavailableError("The database is not available.") from error
            tries += 1

    async def _back_off(self, tries: int) -> bool:
        """Wait a little and return True in an outage that is young; in a longer one everybody fails at once."""
        now = time.monotonic()
        self.unavailable_since = self.unavailable_since or now
        if now - self.unavailable_since >= self.settings.database_retry_seconds:
            return False
        await asyncio.sleep(min(tries * PAUSE_SECONDS, MAX_PAUSE_SECONDS) * random.random())  # noqa: S311 - to keep callers apart
        return True

    async def check(self) -> None:
        """Ask the server for nothing over readiness' own connection; raises whatever is wrong."""
        probe, self.probe = self.probe, None
        try:
            if probe is None or not await _is_usable(probe):
                probe = await asyncpg.connect(self.url, statement_cache_size=0)
                await probe.execute("select")
        except (
            BaseException
        ) as error:  # a timeout of the caller too: what is in flight on this connection is unknown
            if probe is not None:
                probe.terminate()
            if isinstance(error, (*SHUTDOWN_ERRORS, OSError)):
                self.unavailable_since = self.unavailable_since or time.monotonic()
            raise
        self.probe, self.unavailable_since = probe, None


async def _is_usable(connection: asyncpg.Connection) -> bool:
    """Tell whether a connection still works; one that was closed while it was idle says nothing of the server."""
    try:
        await connection.execute("select")
    except (*SHUTDOWN_ERRORS, *CONNECTION_ERRORS):
        connection.terminate()
        return False
    return True


async def _database(request: Request) -> Database:
    database: Database = request.state.database
    return database


#: The type of a route's parameter: `async def route(database: DatabaseDependency)`.
DatabaseDependency = Annotated[Database, Depends(_database)]
