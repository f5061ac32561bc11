"""Conflicts with other transactions and with migrations: repeated, or a 503, but never a bug.

PostgreSQL's documentation, "Serialization Failure Handling": an application must repeat the whole
transaction after 40001 and 40P01. asyncpg's, "Frequently Asked Questions" and
`Connection.reload_schema_state`: a prepared statement becomes invalid when the schema changes.
"""

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import asyncpg
import httpx
import pytest

from app.errors import UnavailableError
from app.settings import Settings
from app.storage.postgres import Connection, Database
from scripts.dev_services import Redis
from tests.patience import patience
from tests.service_process import Service, serving
from tests.storage.database_routes import raise_error

#: Deadlock, serialization failure, its siblings, lock timeout.
SQLSTATES = ("40P01", "40001", "40000", "40003", "55P03")
CLIENTS = 8
ROWS = 200
#: How often a deadlock may end the migration itself: the Job repeats it as often.
MIGRATION_ATTEMPTS = 3


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    short = {"database_retry_seconds": 0.5}
    async with Database(settings.model_copy(update=short), 4) as database:
        yield database


@pytest.mark.parametrize("sqlstate", SQLSTATES)
async def test_conflict_is_retried_until_it_succeeds(database: Database, sqlstate: str) -> None:
    attempts = 0

    async def work(connection: Connection) -> int:
        nonlocal attempts
        attempts += 1
        async with connection.transaction():
            if attempts < 3:
                await raise_error(connection, sqlstate)
            return attempts

    assert await database.retry(work) == 3
    assert database.unavailable_since is None


@pytest.mark.parametrize("sqlstate", SQLSTATES)
async def test_lasting_conflict_is_503_after_the_retry_window(
    database: Database, sqlstate: str
) -> None:
    start = time.monotonic()
    with pytest.raises(UnavailableError):
        await database.retry(functools.partial(raise_error, sqlstate=sqlstate))
    seconds = time.monotonic() - start
    assert seconds >= database.settings.database_retry_seconds
    with pytest.raises(UnavailableError):
        async with database.acquire() as connection:
            await raise_error(connection, sqlstate)


@pytest.mark.parametrize("sqlstate", ["42804", "42883", "XX000", "0A000", "55006", "23505"])
async def test_error_of_the_query_itself_stays_a_bug(database: Database, sqlstate: str) -> None:
    attempts = 0

    async def work(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        await raise_error(connection, sqlstate)

    with pytest.raises(asyncpg.PostgresError) as raised:
        await database.retry(work)
    assert raised.value.sqlstate == sqlstate
    assert attempts == 1


async def test_invalid_statement_stays_a_bug(database: Database, admin: asyncpg.Connection) -> None:
    body = "begin return 1 + ''a''::text; end"
    await admin.execute(f"create function broken() returns int language plpgsql as '{body}'")
    await admin.execute("create table numbers (n int)")
    queries = ["select 1 + 'a'::text", "insert into numbers values ('a'::text)", "select broken()"]
    for query in queries:
        async with database.acquire() as connection:
            for _ in range(2):
                with pytest.raises((asyncpg.UndefinedFunctionError, asyncpg.DatatypeMismatchError)):
                    await connection.fetch(query)
        with pytest.raises((asyncpg.UndefinedFunctionError, asyncpg.DatatypeMismatchError)):
            async with database.acquire() as connection:
                await connection.fetch(query)
    await admin.execute("drop function broken; drop table numbers")


async def test_real_deadlock_is_invisible(database: Database, admin: asyncpg.Connection) -> None:
    # The attempts may meet again, and Postgres needs a second to find a deadlock.
    patient = {"database_retry_seconds": 30}
    database.settings = database.settings.model_copy(update=patient)
    await admin.execute("create table deadlock as select id, 0 as n from generate_series(1, 2) id")
    both_locked = asyncio.Barrier(2)

    async def swap(first: int, second: int) -> None:
        attempts = itertools.count()

        async def work(connection: Connection) -> None:
            async with connection.transaction():
                await connection.execute("update deadlock set n = n + 1 where id = $1", first)
                if next(attempts) == 0:
                    await both_locked.wait()
                await connection.execute("update deadlock set n = n + 1 where id = $1", second)

        await database.retry(work)

    await asyncio.gather(swap(1, 2), swap(2, 1))
    assert await admin.fetchval("select array_agg(n) from deadlock") == [2, 2]
    await admin.execute("drop table deadlock")


async def test_real_serialization_failure_is_invisible(
    database: Database, admin: asyncpg.Connection
) -> None:
    await admin.execute("create table counters as select 0 as n")

    async def count(connection: Connection) -> None:
        async with connection.transaction(isolation="repeatable_read"):
            n = await connection.fetchval("select n from counters")
            await connection.execute("update counters set n = $1", n + 1)

    await asyncio.gather(*(database.retry(count) for _ in range(6)))
    assert await admin.fetchval("select n from counters") == 6
    await admin.execute("drop table counters")


#: Setup, the queries with their arguments, and the migration. The old code works with both schemas.
SCHEMA_CHANGES: dict[str, tuple[str, dict[str, tuple[Any, ...]], str]] = {
    "int becomes bigint": (
        "create table changes (id int, v int)",
        {"select v from changes": (), "insert into changes values (1, $1) returning v": (1,)},
        "alter table changes alter v type bigint",
    ),
    "text becomes uuid": (
        "create table changes (id int, v text)",
        {
            "insert into changes values (1, $1)": ("00000000-0000-0000-0000-000000000001",),
            "select id from changes where v = $1": ("00000000-0000-0000-0000-000000000001",),
        },
        "alter table changes alter v type uuid using v::uuid",
    ),
    "text becomes an enum": (
        "create table changes (id int, v text)",
        {
            "insert into changes values (1, $1)": ("a",),
            "select id from changes where v = any($1)": (["a"],),
            "select v from changes where v = $1": ("a",),
        },
        "create type kind as enum ('a'); alter table changes alter v type kind using v::kind",
    ),
    "an enum is created again": (
        "create type old_kind as enum ('a'); create table changes (id int, v old_kind)",
        {
            "insert into changes values (1, $1)": ("a",),
            "select id from changes where v = any($1)": (["a"],),
            "select v from changes where v = $1": ("a",),
        },
        """
        create type kind as enum ('a', 'b');
        alter table changes alter v type kind using v::text::kind;
        drop type old_kind
        """,
    ),
    "a composite type grows": (
        "create type kind as (a int); create table changes (id int, v kind);"
        "insert into changes values (1, row(1))",
        {"select v from changes": ()},
        "alter type kind add attribute b int",
    ),
    "a column is added": (
        "create table changes (id int)",
        {"select * from changes": ()},
        "alter table changes add v int",
    ),
}


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("change", SCHEMA_CHANGES)
async def test_schema_change_is_invisible_to_retry(
    database: Database, admin: asyncpg.Connection, change: str, in_transaction: bool
) -> None:
    setup, queries, migration = SCHEMA_CHANGES[change]
    await admin.execute(setup)

    async def work(connection: Connection) -> None:
        for query, arguments in queries.items():
            if in_transaction:
                async with connection.transaction():
                    await connection.fetch(query, *arguments)
            else:
                await connection.fetch(query, *arguments)

    try:
        for _ in range(3):
            await database.retry(work)
        await admin.execute(migration)
        await database.retry(work)
        async with database.acquire() as connection:
            await work(connection)
    finally:
        await drop(admin)


async def test_schema_change_outside_retry_is_one_503(
    database: Database, admin: asyncpg.Connection
) -> None:
    """One 503, not one for every statement that is prepared, nor for five minutes."""
    setup, queries, migration = SCHEMA_CHANGES["an enum is created again"]
    await admin.execute(setup)

    async def work() -> None:
        async with database.acquire() as connection, connection.transaction():
            for query, arguments in queries.items():
                await connection.fetch(query, *arguments)

    try:
        await work()
        await admin.execute(migration)
        with pytest.raises(UnavailableError):
            await work()
        await work()
    finally:
        await drop(admin)


async def drop(admin: asyncpg.Connection) -> None:
    await admin.execute("drop table changes")
    await admin.execute("drop type if exists kind, old_kind")


@pytest.fixture
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    settings = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        # One for each client, at either worker: the pool is another limit.
        "DATABASE_MAX_CONNECTIONS": str(2 * (CLIENTS + 1)),
    }
    with serving("tests.storage.database_routes:app", **settings) as service:
        service.wait()
        yield service


async def test_conflict_outside_retry_is_503_with_retry_after(service: Service) -> None:
    """RFC 9110, sections 15.6.4 and 10.2.3."""
    for sqlstate in SQLSTATES:
        response = service.http.post("/errors", params={"sqlstate": sqlstate})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert service.http.post("/errors", params={"sqlstate": "22012"}).status_code == 500


async def test_migration_of_two_tables_under_load_fails_no_request(
    service: Service, admin: asyncpg.Connection
) -> None:
    """It locks the tables in the other order, and changes the type of two columns that are read."""
    for table in ("conflict_first", "conflict_second"):
        rows = f"select id, 0 as n, 'a' as kind from generate_series(1, {ROWS}) id"
        await admin.execute(f"create table {table} as {rows}")
        await admin.execute(f"create index on {table} (id)")
    stopped = Event()
    try:
        with ThreadPoolExecutor(CLIENTS) as threads:
            clients = [threads.submit(send, service, number, stopped) for number in range(CLIENTS)]
            await until(clients, 20)
            await migrate(admin)
            await until(clients, 40)
            stopped.set()
            statuses = [status for client in clients for status in client.result()]
        assert set(statuses) == {204}
        changed = await admin.fetchval("select sum(n) from conflict_first")
        assert changed == await admin.fetchval("select sum(n) from conflict_second") > 0
    finally:
        stopped.set()
        await admin.execute("drop table conflict_first, conflict_second")
        await admin.execute("drop type if exists conflict_kind")


#: The number of responses that each client has got.
PROGRESS = [0] * CLIENTS


def send(service: Service, number: int, stopped: Event) -> list[int]:
    """Change and read rows until stopped; return the statuses. No other client has these rows."""
    statuses = []
    with httpx.Client(base_url=service.http.base_url, timeout=service.http.timeout) as http:
        for count in itertools.count():
            row = 1 + number + CLIENTS * (count % 20)
            for method, path in (("POST", "/transfers"), ("GET", "/rows")):
                response = http.request(method, path, params={"row": row, "kind": "a"})
                statuses.append(response.status_code)
            PROGRESS[number] = len(statuses)
            if stopped.is_set():
                return statuses
    raise AssertionError


async def until(clients: list[Future[list[int]]], more: int) -> None:
    """Wait until every client has got this many further responses."""
    goals = [count + more for count in PROGRESS]
    async with patience(60):
        while any(count < goal for count, goal in zip(PROGRESS, goals, strict=True)):
            assert not any(client.done() for client in clients)
            await asyncio.sleep(0.05)


async def migrate(admin: asyncpg.Connection) -> None:
    """Run the migration as the Job does: again if it was chosen to resolve the deadlock."""
    for attempt in range(MIGRATION_ATTEMPTS):
        try:
            async with admin.transaction():
                await admin.execute("create type conflict_kind as enum ('a', 'b')")
                await admin.execute("""
                    alter table conflict_first
                        alter n type bigint, alter kind type conflict_kind using kind::conflict_kind
                """)
                # Meanwhile requests lock the second table, and wait for the first.
                await admin.execute("select pg_sleep(0.5)")
                await admin.execute("alter table conflict_second alter n type bigint")
        except asyncpg.DeadlockDetectedError:
            assert attempt < MIGRATION_ATTEMPTS - 1
        else:
            return
