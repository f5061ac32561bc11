"""Postgres under faults: bounded delays, no leaked connections, safe retries."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest
from pydantic import SecretStr

from app.errors import UnavailableError
from app.lifespan import open_state
from app.settings import Settings
from app.storage.postgres import Connection, Database
from app.storage.redis import create_redis
from app.telemetry.process_metrics import POOL, WorkerMetrics
from scripts.dev_services import Postgres
from tests.patience import patience
from tests.service_process import frozen

#: One of them is the readiness probe's.
CONNECTIONS = 4
TIMEOUT_SECONDS = 2.0
RETRY_SECONDS = 1.2


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """A database with short timeouts."""
    short = {
        "database_command_timeout_seconds": TIMEOUT_SECONDS,
        "database_retry_seconds": RETRY_SECONDS,
    }
    async with Database(settings.model_copy(update=short), CONNECTIONS) as database:
        yield database


async def terminate(admin: asyncpg.Connection, connection: Connection) -> None:
    """Terminate a connection at the server; this process notices only on its next use."""
    await admin.execute("select pg_terminate_backend($1)", connection.get_server_pid())
    time.sleep(0.1)  # noqa: ASYNC251 - the event loop must not notice it yet


async def select_one(connection: Connection) -> int:
    value: int = await connection.fetchval("select 1")
    return value


async def sleep(database: Database, in_transaction: bool) -> None:
    """Run a command that lasts longer than its timeout."""
    async with database.acquire() as connection:
        if in_transaction:
            async with connection.transaction():
                await connection.execute("select pg_sleep(60)")
        await connection.execute("select pg_sleep(60)")


async def seconds_until_failure(database: Database) -> float:
    """Run a read that fails; return how long it took."""
    start = time.monotonic()
    with pytest.raises(UnavailableError):
        await database.retry(select_one)
    return time.monotonic() - start


async def assert_nothing_leaked(database: Database) -> None:
    """Assert that the pool can lend all of its connections, and that they work."""
    async with patience(20):
        lent = [database.acquire() for _ in range(CONNECTIONS - 1)]
        assert [await select_one(await each.__aenter__()) for each in lent] == [1] * len(lent)
        for each in lent:
            await each.__aexit__(None, None, None)
    assert database.pool.get_idle_size() == database.pool.get_size()


# The pool


async def test_exhausted_pool_sheds_requests_and_stays_ready(settings: Settings) -> None:
    """With four workers the pool has one connection, and the probe another."""
    short = {"database_acquire_timeout_seconds": 0.1}
    update = short | {"database_max_connections": 8, "web_concurrency": 4}
    async with open_state(settings.model_copy(update=update)) as state:
        await asyncio.sleep(0)
        # From the pool itself, since a connect may take longer than 0.1 s.
        used = await state["database"].pool.acquire()
        with pytest.raises(UnavailableError) as error:
            async with state["database"].acquire():
                pass
        assert error.value.headers == {"Retry-After": "1"}
        state["health"].checked_at = float("-inf")
        status, _ = await state["health"].readiness()
        assert status == 200
        state["database"].pool.release(used)


async def test_closing_does_not_wait_for_a_used_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage.postgres.CLOSE_TIMEOUT_SECONDS", 0.2)
    async with open_state(settings) as state:
        used = await state["database"].pool.acquire()
        start = time.monotonic()
    assert time.monotonic() - start < 5  # seconds, and not forever
    with pytest.raises(asyncpg.InterfaceError):
        await used.execute("select")


async def test_requests_cancelled_at_any_moment_leak_no_connection(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is a transaction logged as left active."""

    async def read(number: int) -> None:
        query = "select $1::int from pg_sleep(0.002)"
        async with (
            asyncio.timeout(random.random() * 0.02),
            database.acquire() as connection,
            connection.transaction(),
        ):
            assert await connection.fetchval(query, number) == number

    for _ in range(20):
        reads = [read(number) for number in range(20)]
        results = await asyncio.gather(*reads, return_exceptions=True)
        expected = (TimeoutError, UnavailableError)
        assert all(each is None or isinstance(each, expected) for each in results), results
    await assert_nothing_leaked(database)
    assert "active transaction" not in caplog.text


# Timeouts


async def test_statements_are_logged_without_values(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The setting `LOG_SQL`. The statement that resets a connection is not the caller's."""
    logged = settings.model_copy(update={"log_sql": True})
    async with Database(logged, CONNECTIONS) as database:
        async with database.acquire() as connection, connection.transaction():
            await connection.fetchval("select\n  $1::text", "a secret")
        with pytest.raises(asyncpg.UndefinedTableError):
            async with database.acquire() as connection:
                await connection.execute("select * from nothing")
        await asyncio.sleep(0)  # the driver calls the logger soon
    records = [vars(record) for record in caplog.records if record.name == "app.sql"]
    statements = [record["message"] for record in records]
    assert statements == ["BEGIN;", "select $1::text", "COMMIT;", "select * from nothing"]
    assert all(0 <= record["duration_ms"] < 10_000 for record in records)
    assert records[-1]["error"] == "UndefinedTableError"
    assert "a secret" not in caplog.text


async def test_slow_query_times_out(settings: Settings) -> None:
    short = settings.model_copy(update={"database_command_timeout_seconds": 0.1})
    async with open_state(short) as state:
        with pytest.raises(UnavailableError):
            async with state["database"].acquire() as connection:
                await connection.execute("select pg_sleep(5)")


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_timed_out_command_is_cancelled_at_the_server(
    database: Database, admin: asyncpg.Connection, is_cancelled: bool, in_transaction: bool
) -> None:
    request = asyncio.create_task(sleep(database, in_transaction))
    if is_cancelled:
        await asyncio.sleep(0.2)
        request.cancel()
    with pytest.raises(asyncio.CancelledError if is_cancelled else UnavailableError):
        await request
    running = (
        "select count(*) from pg_stat_activity "
        "where query like 'select pg_sleep%' and state = 'active'"
    )
    async with patience(20):
        while await admin.fetchval(running):  # noqa: ASYNC110 - the server may cancel it later
            await asyncio.sleep(0.05)
    await assert_nothing_leaked(database)


async def test_timed_out_command_is_not_retried(database: Database) -> None:
    """The server may still be executing it.

    A setting of the failed command does not reach the next user of the connection.
    """
    attempts = 0

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("set statement_timeout = 100")
        await connection.execute("select pg_sleep(60)")

    async def show_timeout(connection: Connection) -> str:
        value: str = await connection.fetchval("show statement_timeout")
        return value

    with pytest.raises(UnavailableError):
        await database.retry(work)
    assert attempts == 1
    assert await database.retry(show_timeout) == "0"


async def test_idle_connection_to_a_hung_server_times_out(
    database: Database, postgres: Postgres
) -> None:
    async with database.acquire() as connection:
        await connection.execute("select")
    with frozen(postgres.pid):
        start = time.monotonic()
        with pytest.raises(UnavailableError):
            async with database.acquire() as connection:
                await connection.execute("select")
        # 2.5 s on an idle machine: the timeout, and half a second for the cancellation.
        assert time.monotonic() - start < 2 * TIMEOUT_SECONDS


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_hung_server_costs_one_command_timeout(
    database: Database, postgres: Postgres, is_cancelled: bool, in_transaction: bool
) -> None:
    """A rollback must not wait for the timeout once more."""
    has_connection = asyncio.Event()
    is_hung = asyncio.Event()

    async def work(connection: Connection) -> int:
        await connection.execute("select")
        has_connection.set()
        await is_hung.wait()
        return await select_one(connection)

    async def work_in_transaction(connection: Connection) -> int:
        async with connection.transaction():
            return await work(connection)

    request = asyncio.create_task(database.retry(work_in_transaction if in_transaction else work))
    await has_connection.wait()
    with frozen(postgres.pid):
        is_hung.set()
        start = time.monotonic()
        if is_cancelled:
            await asyncio.sleep(0.1)
            request.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else UnavailableError):
            await request
        # The timeout, and half a second for the cancellation.
        assert time.monotonic() - start < 2 * TIMEOUT_SECONDS
    await assert_nothing_leaked(database)


# Lost connections and outages


async def test_failed_release_does_not_fail_completed_work(
    database: Database, admin: asyncpg.Connection, postgres: Postgres
) -> None:
    """A release resets the connection at the server, which may be lost or hung."""
    async with database.acquire() as connection:
        assert await select_one(connection) == 1
        await terminate(admin, connection)
    async with database.acquire() as connection:
        assert await select_one(connection) == 1
        hang = frozen(postgres.pid)
        hang.__enter__()
    hang.__exit__(None, None, None)
    await assert_nothing_leaked(database)


async def test_read_is_retried_after_a_lost_connection(
    database: Database, admin: asyncpg.Connection
) -> None:
    attempts = 0

    async def read(connection: Connection) -> int:
        nonlocal attempts
        attempts += 1
        async with connection.transaction(readonly=True):
            if attempts == 1:
                await terminate(admin, connection)
            return await select_one(connection)

    assert await database.retry(read) == 1
    assert attempts == 2


async def test_connection_closed_while_idle_fails_no_request(
    database: Database, admin: asyncpg.Connection
) -> None:
    await database.check()
    async with database.acquire() as connection:
        await connection.execute("select")
    await admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
    )
    time.sleep(0.1)  # noqa: ASYNC251 - the event loop must not notice it yet
    await database.check()
    assert await database.retry(select_one) == 1


async def test_requests_fail_during_a_restart_and_work_after_it(
    database: Database, postgres: Postgres
) -> None:
    with pytest.raises(UnavailableError):
        async with database.acquire() as connection:
            await connection.execute("select pg_terminate_backend(pg_backend_pid())")
    postgres.stop()
    try:
        with pytest.raises(UnavailableError):
            async with database.acquire():
                pass
    finally:
        postgres.start()
    async with database.acquire() as connection:
        assert await select_one(connection) == 1


async def test_requests_fail_fast_after_the_retry_window(
    database: Database, postgres: Postgres
) -> None:
    """The window begins with the outage, also without requests.

    Each outage has its own.
    """
    assert await database.retry(select_one) == 1
    postgres.stop()
    try:
        assert await seconds_until_failure(database) >= RETRY_SECONDS
        assert await seconds_until_failure(database) < RETRY_SECONDS
        assert await seconds_until_failure(database) < RETRY_SECONDS
        await asyncio.sleep(RETRY_SECONDS * 2)
        assert await seconds_until_failure(database) < RETRY_SECONDS
    finally:
        postgres.start()
    assert await database.retry(select_one) == 1
    postgres.stop()
    try:
        assert await seconds_until_failure(database) >= RETRY_SECONDS
    finally:
        postgres.start()


async def test_readiness_probe_starts_the_retry_window(
    database: Database, postgres: Postgres
) -> None:
    postgres.stop()
    try:
        with pytest.raises(ConnectionError):
            await database.check()
        await asyncio.sleep(RETRY_SECONDS)
        assert await seconds_until_failure(database) < RETRY_SECONDS
    finally:
        postgres.start()
    await database.check()
    assert database.unavailable_since is None


async def test_server_without_free_connections_is_not_retried(
    settings: Settings, admin: asyncpg.Connection
) -> None:
    await admin.execute("create role crowd login password 'crowd' connection limit 0")
    address = settings.database_url.get_secret_value().split("@")[1]
    url = SecretStr(f"postgresql://crowd:crowd@{address}")
    full = settings.model_copy(update={"database_url": url})
    async with Database(full, CONNECTIONS) as database:
        assert await seconds_until_failure(database) < database.settings.database_retry_seconds
    await admin.execute("drop role crowd")


async def test_read_only_server_loses_its_connections(database: Database) -> None:
    """After a failover, the old primary is read-only.

    A new connection may reach the new one.
    """
    servers: list[int] = []

    async def change() -> None:
        async with database.acquire() as connection:
            servers.append(connection.get_server_pid())
            await connection.execute("set default_transaction_read_only = on")
            await connection.execute("create table changes (n int)")

    with pytest.raises(UnavailableError, match="read-only"):
        await change()
    async with database.acquire() as connection:
        assert connection.get_server_pid() not in servers


# Errors that are not outages


@pytest.mark.parametrize("query", ["select $1::int", "select nothing from nowhere"])
async def test_bug_in_a_query_is_not_an_outage(database: Database, query: str) -> None:
    with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresError)):
        async with database.acquire() as connection:
            await connection.execute(query)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("another service"),
        asyncpg.InterfaceError("a bug"),
        asyncpg.UniqueViolationError("a conflict"),
        KeyError("a bug"),
    ],
)
async def test_application_errors_are_not_retried(database: Database, error: Exception) -> None:
    attempts = 0

    async def fail(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await connection.execute("select")
        raise error

    with pytest.raises(type(error)) as raised:
        await database.retry(fail)
    assert raised.value is error
    assert attempts == 1
    await assert_nothing_leaked(database)


async def test_callers_that_wait_for_a_connection_are_counted(
    database: Database, settings: Settings
) -> None:
    """OpenTelemetry: `db.client.connection.pending_requests` and `.timeouts`."""
    metrics = WorkerMetrics(settings.readiness_required)
    redis = create_redis(settings).connection_pool

    def value(name: str) -> float | None:
        metrics.update(database, redis)
        return metrics.registry.get_sample_value(name, {POOL: "postgres"})

    pending = "db_client_connection_pending_requests"
    timeouts = "db_client_connection_timeouts_total"
    assert (value(pending), value(timeouts)) == (0, 0)
    impatient = {"database_acquire_timeout_seconds": 0.2}
    database.settings = settings.model_copy(update=impatient)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(CONNECTIONS - 1):
            await stack.enter_async_context(database.acquire())
        waiting = asyncio.create_task(database.retry(select_one))
        await asyncio.sleep(0)
        assert value(pending) == 1
        with pytest.raises(UnavailableError):
            await waiting
    assert (value(pending), value(timeouts)) == (0, 1)
    await assert_nothing_leaked(database)
