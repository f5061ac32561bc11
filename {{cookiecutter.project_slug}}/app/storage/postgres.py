"""Postgres: a pool that fails fast, sheds load instead of queueing it, and survives restarts."""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Self, TypeVar

import asyncpg
from asyncpg.pool import PoolConnectionProxy
from fastapi import Depends, Request

from app.errors import UnavailableError
from app.network.connection_urls import postgres_addresses
from app.settings import Settings
from app.storage import query_log
from app.storage.pool import Pool
from app.storage.postgres_errors import (
    CONNECTION_ERRORS,
    SCHEMA_ERRORS,
    SHUTDOWN_ERRORS,
    BoundedCancelConnection,
    ConnectionLostError,
    TransientError,
    has_schema_changed,
    raise_translated,
)
from app.storage.traced_postgres import TracedConnection
from app.telemetry import tracing

#: Time limit for a connect.
CONNECT_TIMEOUT_SECONDS = 3.0
#: Time limit for closing the pool.
CLOSE_TIMEOUT_SECONDS = 1.0
#: Growth of the pause between attempts, and its maximum. The first retry follows at once.
BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 0.5

#: Errors after which the next host is tried, as by asyncpg.
NEXT_HOST_ERRORS = (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched)

Connection = PoolConnectionProxy
Result = TypeVar("Result")


class Database:
    """The connections of one worker: a pool for requests, and one for the readiness probe.

    Nothing connects before first use, so a process starts while the server is unavailable.
    """

    def __init__(self, settings: Settings, connections: int, process: str = "api") -> None:
        """`connections` is this worker's share of the per-pod limit; the probe uses one of them.

        `process` distinguishes the processes of the service in `pg_stat_activity`.
        """
        self.settings = settings
        self.application_name = f"{settings.service_name}-{process}"
        self.url = settings.database_url.get_secret_value()
        self.pool = Pool(self._open, connections - 1)
        self.probe: asyncpg.Connection | None = None
        self.asking = asyncio.Lock()
        #: The start of the current outage, by `time.monotonic()`.
        self.unavailable_since: float | None = None
        #: Callers that are waiting for a connection, and those that did not get one in time.
        self.pending = 0
        self.acquire_timeouts = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for connections in use, but not for a server that does not respond."""
        self.close_probe()
        await self.pool.close(CLOSE_TIMEOUT_SECONDS)

    def acquire(self) -> "Lease":
        """Lend a connection for the block: `async with database.acquire() as connection`.

        Raises `UnavailableError` if none is free in time, or if the server does not respond. What
        happens to the connection after work that is done does not fail the work.
        """
        return Lease(self)

    async def retry(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Call `work` with a connection. It must be idempotent.

        It is called again if the connection is lost, or if its transaction was rolled back because
        of a conflict: a deadlock, a serialization failure, a lock timeout, a migration.

        Raises `UnavailableError` when that lasts longer than `DATABASE_RETRY_SECONDS`, or at
        once when a command times out: a server that does not respond may still be executing it.
        """
        retries: Retries | None = None
        while True:
            try:
                async with self.acquire() as connection:
                    return await work(connection)
            except (ConnectionLostError, TransientError) as error:
                retries = retries or Retries(self)
                await retries.pause_after(error)

    async def check(self) -> None:
        """Run an empty query on the probe's connection. Raises on any failure."""
        await self.ask(_select)

    async def ask(self, question: Callable[[asyncpg.Connection], Awaitable[Result]]) -> Result:
        """Return the result of `question` for the probe's connection, one caller at a time.

        The caller limits the time. Raises on any failure.
        """
        async with self.asking:
            try:
                result = await self._ask(question)
            # The caller's timeout too: the state of the connection is unknown.
            except BaseException as error:
                self.close_probe()
                if isinstance(error, (*SHUTDOWN_ERRORS, OSError)):
                    self.mark_unavailable()
                raise
            self.unavailable_since = None
            return result

    async def _ask(self, question: Callable[[asyncpg.Connection], Awaitable[Result]]) -> Result:
        if self.probe is not None:
            # The server may have closed it while it was idle, which says nothing about it now.
            with contextlib.suppress(*SHUTDOWN_ERRORS, *CONNECTION_ERRORS):
                return await question(self.probe)
            self.close_probe()
        self.probe = await connect(
            self.url,
            timeout=self.settings.readiness_timeout_seconds,
            statement_cache_size=0,
            server_settings={"application_name": f"{self.application_name}-probe"},
        )
        return await question(self.probe)

    def close_probe(self) -> None:
        """Close the probe's connection, so that the next check looks for a server."""
        if self.probe is not None:
            self.probe.terminate()
        self.probe = None

    async def _open(self) -> asyncpg.Connection:
        settings = self.settings
        connection = await connect(
            self.url,
            timeout=min(CONNECT_TIMEOUT_SECONDS, settings.database_acquire_timeout_seconds),
            command_timeout=settings.database_command_timeout_seconds,
            statement_cache_size=settings.database_statement_cache_size,
            connection_class=TracedConnection if tracing.current else BoundedCancelConnection,
            server_settings={"application_name": self.application_name},
        )
        if settings.log_sql:
            query_log.enable(connection)
        return connection

    async def _acquire(self) -> Connection:
        timeout = self.settings.database_acquire_timeout_seconds
        self.pending += 1
        try:
            return await self.pool.wait_for_connection(timeout)
        except TimeoutError as error:
            self.acquire_timeouts += 1
            raise UnavailableError("No database connection was free in time.") from error
        except (*SHUTDOWN_ERRORS, OSError, asyncpg.InternalClientError) as error:
            raise ConnectionLostError("The database is not available.") from error
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:  # it rejects us
            raise UnavailableError("The database is not available.") from error
        finally:
            self.pending -= 1

    async def _acquire_in_time(self) -> Connection:
        """Lend a connection, within the window if the server is unavailable."""
        retries: Retries | None = None
        while True:
            try:
                return await self._acquire()
            except ConnectionLostError as error:
                retries = retries or Retries(self)
                await retries.pause_after(error)

    def mark_unavailable(self) -> float:
        """Note an outage; return for how many seconds it has lasted."""
        now = time.monotonic()
        if self.unavailable_since is None:
            self.unavailable_since = now
        return now - self.unavailable_since


class Retries:
    """The retries of an attempt that lost its connection or met a conflict, within the window."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.number = 0
        self.conflict_since: float | None = None

    async def pause_after(self, error: ConnectionLostError | TransientError) -> None:
        """Pause before the next attempt, for a random part of a growing time.

        Raises the error once the window is over.
        """
        if isinstance(error, ConnectionLostError):
            seconds = self.database.mark_unavailable()
        else:
            self.conflict_since = self.conflict_since or time.monotonic()
            seconds = time.monotonic() - self.conflict_since
        if seconds >= self.database.settings.database_retry_seconds:
            raise error
        pause = min(self.number * BACKOFF_SECONDS, MAX_BACKOFF_SECONDS)
        self.number += 1
        await asyncio.sleep(pause * random.random())  # noqa: S311 - spreads out the callers


class Lease:
    """A connection for the time of a block, in which errors of the server are translated."""

    __slots__ = ("connection", "database")

    def __init__(self, database: Database) -> None:
        self.database = database

    async def __aenter__(self) -> Connection:
        database = self.database
        connection = database.pool.take_idle()
        if connection is None:
            connection = await database._acquire_in_time()
        self.connection = connection
        return connection

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            self.database.unavailable_since = None
            self.database.pool.release(self.connection)
            return
        try:
            raise_translated(error, self.connection)
            await self._raise_if_schema_changed(error)
        finally:
            self.database.pool.release(self.connection, is_successful=False)

    async def _raise_if_schema_changed(self, error: BaseException) -> None:
        """Raise `TransientError`, and have the statements of all connections prepared again.

        asyncpg itself would use the old ones for five minutes.
        """
        if isinstance(error, SCHEMA_ERRORS) and await has_schema_changed(error, self.connection):
            await self.connection.reload_schema_state()
            raise TransientError("The database schema has changed.") from error


async def connect(
    url: str,
    *,
    timeout: float,  # noqa: ASYNC109 - its name in asyncpg
    **options: Any,
) -> asyncpg.Connection:
    """Connect to the first host that `target_session_attrs` accepts.

    Each host gets its share of the time: asyncpg itself would spend all of it on a first host that
    does not respond. Raises the error of the last host.
    """
    addresses, wanted = postgres_addresses(url)
    if len(addresses) == 1:
        return await asyncpg.connect(url, timeout=timeout, **options)
    rounds = ("standby", "any") if wanted == "prefer-standby" else (wanted,)
    options["timeout"] = timeout / len(addresses) / len(rounds)
    failure: Exception | None = None
    for attributes, (host, port) in itertools.product(rounds, addresses):
        address: dict[str, Any] = {"host": host, "port": port or None}
        address["target_session_attrs"] = attributes
        try:
            return await asyncpg.connect(url, **address, **options)
        except NEXT_HOST_ERRORS as error:
            failure = error
    assert failure is not None  # noqa: S101 - for mypy
    raise failure


async def delete_older(
    connection: Connection, table: str, column: str, hours: int, batch: int
) -> int:
    """Delete up to `batch` rows whose `column` is older; return how many.

    Any number of processes may do so at once. Table and column are never input.
    """
    old = f"select ctid from {table} where {column} < now() - make_interval(hours => $1) limit $2"  # noqa: S608
    query = f"delete from {table} where ctid = any(array({old} for update skip locked))"  # noqa: S608
    status = await connection.execute(query, hours, batch)
    return int(status.removeprefix("DELETE "))


async def _select(connection: asyncpg.Connection) -> None:
    await connection.execute("select")


async def _database(request: Request) -> Database:
    # Not by `request.state`, which is an object more per request: 1 us.
    database: Database = request.scope["state"]["database"]
    return database


#: The type of a route's parameter: `async def route(database: DatabaseDependency)`.
#: Without a scope FastAPI looks for a `yield` in the function, for each request: 2 us.
DatabaseDependency = Annotated[Database, Depends(_database, scope="request")]
