"""The pool: no round trip but the caller's, and no connection that is dirty, dead or old.

asyncpg's documentation of `create_pool`: idle lifetime, number of uses, use after release.
PgBouncer's, "SQL feature map for pooling modes": state of sessions.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import pytest

from app.settings import Settings
from app.storage import pool as pool_module
from app.storage.pool import Pool
from app.storage.postgres import Connection, Database
from scripts.dev_services import Postgres
from tests.patience import patience
from tests.service_process import eventually
from tests.session_state import no_session_state, session_state

#: One of them is the readiness probe's.
CONNECTIONS = 4
TERMINATE = """
select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name like '%-pool'
"""


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with Database(settings, CONNECTIONS, process="pool") as database:
        yield database


@pytest.fixture
def pool(database: Database) -> Pool:
    return database.pool


async def fill(pool: Pool) -> list[int]:
    """Open all connections; return their processes, the one that is lent next last."""
    lent = [await pool.acquire() for _ in pool.places]
    for each in lent:
        pool.release(each)
    return [each.connection.get_server_pid() for each in pool.free if each.connection]


async def lent_pid(pool: Pool) -> int:
    """Return the process of the connection that is lent next."""
    connection = await pool.acquire()
    pid: int = connection.get_server_pid()
    pool.release(connection)
    return pid


@pytest.fixture
def terminate_all(settings: Settings) -> Iterator[Callable[[], object]]:
    """Ends the connections of the pool, while the event loop of the test is blocked."""
    url = settings.database_url.get_secret_value()
    with asyncio.Runner() as runner, ThreadPoolExecutor(1) as thread:
        admin = thread.submit(runner.run, asyncpg.connect(url)).result()
        yield lambda: thread.submit(runner.run, admin.execute(TERMINATE)).result()
        thread.submit(runner.run, admin.close()).result()


# Lending


async def test_connection_used_last_is_lent_first(pool: Pool) -> None:
    """The others become idle, and are closed after a peak."""
    pids = await fill(pool)
    assert len(set(pids)) == CONNECTIONS - 1
    assert [await lent_pid(pool) for _ in range(3)] == [pids[-1]] * 3


async def test_released_connection_raises_on_use(pool: Pool) -> None:
    connection = await pool.acquire()
    transaction = connection.transaction()
    pool.release(connection)
    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
        await connection.execute("select 1")
    with pytest.raises(asyncpg.InterfaceError, match="released back to the pool"):
        await transaction.start()


async def test_callers_get_a_connection_in_their_order(pool: Pool) -> None:
    lent = [await pool.acquire() for _ in pool.places]
    order: list[int] = []

    async def wait(number: int) -> None:
        connection = await pool.acquire()
        order.append(number)
        pool.release(connection)

    waiting = [asyncio.create_task(wait(number)) for number in range(5)]
    await asyncio.sleep(0)
    waiting.pop(1).cancel()
    for each in lent:
        pool.release(each)
    await asyncio.gather(*waiting)
    assert order == [0, 2, 3, 4]


async def test_caller_that_gives_up_loses_no_connection(pool: Pool) -> None:
    """At any moment, also in that in which a connection is released."""
    for _ in range(50):
        lent = [await pool.acquire() for _ in pool.places]
        waiting = asyncio.create_task(pool.acquire())
        await asyncio.sleep(0)
        pool.release(lent.pop())
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for each in lent:
            pool.release(each)
        with pytest.raises(TimeoutError):
            await asyncio.gather(*(pool.acquire(0.001) for _ in range(CONNECTIONS)))
        # Those that the others got.
        used: list[Any] = [each.connection for each in pool.places if each not in pool.free]
        assert len(used) == CONNECTIONS - 1
        for connection in used:
            pool.release(connection._proxy)
        assert not pool.waiting


async def test_read_is_one_round_trip(
    clean_database: str, settings: Settings, postgres: Postgres
) -> None:
    """Each round trip is a statement in the server's log."""
    name = clean_database.rpartition("/")[2]
    admin = await asyncpg.connect(clean_database)
    await admin.execute(f"alter database {name} set log_statement = 'all'")
    await admin.close()
    log = postgres.data / "log"

    async def read(connection: Connection) -> int:
        number: int = await connection.fetchval("select $1::int", 7)
        return number

    async with Database(settings, CONNECTIONS, process="pool") as database:
        await database.retry(read)
        start = log.stat().st_size
        for _ in range(5):
            assert await database.retry(read) == 7
        async with database.acquire() as connection, connection.transaction():
            await read(connection)
        await database.pool.execute("select 'end'")

        def statements() -> list[str]:
            text = log.read_bytes()[start:].decode()
            return re.findall(r"(?:statement|execute \S+): (.*)", text)

        eventually(lambda: statements()[-1:] == ["select 'end'"])
        found = statements()
    reads = ["select $1::int"] * 5
    assert found == [*reads, "BEGIN;", "select $1::int", "COMMIT;", "select 'end'"]


# Connections that are no longer good


async def test_writes_on_connections_that_died_while_idle_succeed(
    database: Database, terminate_all: Callable[[], object]
) -> None:
    """The event loop has not noticed yet: asyncpg's pool failed 59 of 60."""
    await database.pool.execute("create table pool_writes (n int)")
    for number in range(60):
        await database.pool.execute("select")
        terminate_all()
        async with database.acquire() as connection:
            await connection.execute("insert into pool_writes values ($1)", number)
    assert await database.pool.fetchval("select count(distinct n) from pool_writes") == 60
    await database.pool.execute("drop table pool_writes")


@pytest.mark.parametrize("limit", ["MAX_USES", "MAX_AGE_SECONDS"])
async def test_worn_connection_is_replaced(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """By number of uses, and by age."""
    monkeypatch.setattr(pool_module, limit, 1 if limit == "MAX_USES" else 0)
    assert await lent_pid(pool) != await lent_pid(pool)
    assert pool.get_size() == 0


async def test_idle_connections_are_closed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are used, or lent, stay."""
    monkeypatch.setattr(pool_module, "SWEEP_SECONDS", 0.02)
    used = await pool.acquire()
    await fill_rest(pool)
    assert pool.get_size() == CONNECTIONS - 1
    monkeypatch.setattr(pool_module, "MAX_IDLE_SECONDS", 0.2)
    async with patience(20):
        while pool.get_size() > 1:  # noqa: ASYNC110 - a timer of the pool changes it
            await asyncio.sleep(0.01)
    assert await used.fetchval("select 1") == 1
    pool.release(used)
    await fill(pool)


async def fill_rest(pool: Pool) -> None:
    """Open the connections that are not lent."""
    for each in [await pool.acquire() for _ in range(len(pool.free))]:
        pool.release(each)


# Connections that are dirty


async def test_failed_work_leaves_no_state(database: Database) -> None:
    async def fail(connection: Connection) -> None:
        await connection.execute("set statement_timeout = 12345")
        raise KeyError

    with pytest.raises(KeyError):
        await database.retry(fail)
    assert await database.pool.fetchval("show statement_timeout") == "0"


async def test_open_transaction_is_rolled_back(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncpg logs it, since it is a bug."""
    connection = await pool.acquire()
    await connection.execute("begin")
    await connection.execute("create table never (n int)")
    pool.release(connection)
    assert await pool.fetchval("select to_regclass('never')") is None
    await asyncio.gather(*pool.resets)
    assert "active transaction" in caplog.text
    assert pool.get_idle_size() == pool.get_size()


@pytest.mark.parametrize("query", ["select pg_sleep(10)", "select pg_sleep($1)"])
async def test_timeout_that_is_caught_leaves_no_command(pool: Pool, query: str) -> None:
    """Its cancellation may arrive after the release, and must not hit the next user."""
    arguments = [10] if "$1" in query else []
    for _ in range(10):
        connection = await pool.acquire()
        with pytest.raises(TimeoutError):
            await connection.fetchval(query, *arguments, timeout=0.01)
        pool.release(connection)
        assert await pool.fetchval("select 1") == 1


async def test_command_that_outlives_its_block_is_ended(pool: Pool) -> None:
    connection = await pool.acquire()
    command = asyncio.create_task(connection.fetchval("select pg_sleep($1)", 10))
    await asyncio.sleep(0.05)
    pool.release(connection)
    assert await pool.fetchval("select 1") == 1
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await command


# Closing


async def test_closing_waits_for_connections_that_are_lent(pool: Pool) -> None:
    lent = await pool.acquire()
    closing = asyncio.create_task(pool.close(20))
    await asyncio.sleep(0)
    with pytest.raises(asyncpg.InterfaceError, match="closing"):
        await pool.acquire()
    assert await lent.fetchval("select 1") == 1
    pool.release(lent)
    await closing
    assert pool.get_size() == 0
    assert pool.is_closing()


async def test_closing_terminates_connections_that_are_kept(pool: Pool) -> None:
    lent = await pool.acquire()
    start = time.monotonic()
    await pool.close(0.1)
    assert time.monotonic() - start < 5
    with pytest.raises(asyncpg.InterfaceError):
        await lent.fetchval("select 1")
    pool.release(lent)
    assert pool.get_size() == 0


# The guard of tests/conftest.py


@pytest.mark.parametrize(
    ("statement", "state"),
    [
        ("set statement_timeout = 50000", "set statement_timeout"),
        ("select set_config('work_mem', '8MB', false)", "set work_mem"),
        ("select pg_advisory_lock(1)", "advisory lock"),
        ("listen news", "listen news"),
        ("create temp table kept (n int)", "temporary table kept"),
        ("prepare kept as select 1", "prepare kept"),
        ("declare kept cursor with hold for select 1", "cursor with hold kept"),
    ],
)
async def test_session_state_fails_a_test(settings: Settings, statement: str, state: str) -> None:
    async def leave() -> None:
        async with (
            Database(settings, CONNECTIONS) as database,
            database.acquire() as connection,
            connection.transaction(),
        ):
            await connection.execute(statement)

    expected = pytest.raises(pytest.fail.Exception, match=f"released with: {state}")
    with expected, no_session_state():
        await leave()


async def test_state_of_a_transaction_is_no_session_state(database: Database) -> None:
    """Nor is what asyncpg itself prepares, and sets while it looks up types."""
    async with database.acquire() as connection, connection.transaction():
        await connection.execute("set local statement_timeout = 50000")
        await connection.execute("select set_config('work_mem', '8MB', true)")
        await connection.execute("select pg_advisory_xact_lock(1)")
        await connection.fetch("select $1::uuid[], $2::jsonb, $3::numrange", [], "{}", None)
        async for _ in connection.cursor("select 1"):
            pass
    assert await session_state(database.pool) == []
    assert database.pool.get_idle_size() == 1
