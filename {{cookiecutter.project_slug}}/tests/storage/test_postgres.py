"""The database under faults: what is lost, slow or cancelled costs bounded time, no connection, and no second try."""

import asyncio
import random
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest
from pydantic import SecretStr

from app.errors import UnavailableError
from app.settings import Settings
from app.storage.postgres import Connection, Database
from scripts.dev_services import Postgres
from tests.service_process import frozen

CONNECTIONS = 4  # one of them is readiness'
TIMEOUT_SECONDS = 2.0


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {
        "use_uvloop": True
    }  # as the workers do; when it hears of a lost connection differs


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    quick = {"database_command_timeout_seconds": TIMEOUT_SECONDS, "database_retry_seconds": 1.2}
    async with Database(settings.model_copy(update=quick), CONNECTIONS) as database:
        yield database


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def terminate(admin: asyncpg.Connection, connection: Connection) -> None:
    """End a connection at the server; this process hears of it only when it next looks."""
    await admin.execute("select pg_terminate_backend($1)", connection.get_server_pid())
    time.sleep(0.1)  # noqa: ASYNC251 - the loop must not see the end of it


async def one(connection: Connection) -> int:
    value: int = await connection.fetchval("select 1")
    return value


async def assert_nothing_leaked(database: Database) -> None:
    """Assert that every connection of the pool can be lent, and works."""
    async with asyncio.timeout(20):
        lent = [database.acquire() for _ in range(CONNECTIONS - 1)]
        assert [await one(await each.__aenter__()) for each in lent] == [1] * len(lent)
        for each in lent:
            await each.__aexit__(None, None, None)
    assert database.pool.get_idle_size() == database.pool.get_size()


async def sleep(database: Database, in_transaction: bool) -> None:
    async with database.acquire() as connection:
        if in_transaction:
            async with connection.transaction():
                await connection.execute("select pg_sleep(60)")
        await connection.execute("select pg_sleep(60)")


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_a_command_that_takes_too_long_ends_at_the_server_too(
    database: Database, admin: asyncpg.Connection, leaves: bool, in_transaction: bool
) -> None:
    request = asyncio.create_task(sleep(database, in_transaction))
    if leaves:
        await asyncio.sleep(0.2)
        request.cancel()
    with pytest.raises(asyncio.CancelledError if leaves else UnavailableError):
        await request
    active = "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
    async with asyncio.timeout(20):
        while await admin.fetchval(active):  # noqa: ASYNC110 - the server may learn of it after we have given up
            await asyncio.sleep(0.05)
    await assert_nothing_leaked(database)


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_a_server_that_freezes_in_a_command_costs_its_timeout_once(
    database: Database, postgres: Postgres, leaves: bool, in_transaction: bool
) -> None:
    ready, go = asyncio.Event(), asyncio.Event()

    async def work(connection: Connection) -> int:
        await connection.execute("select")
        ready.set()
        await go.wait()
        return await one(connection)

    async def work_in_transaction(connection: Connection) -> int:
        async with connection.transaction():
            return await work(connection)

    request = asyncio.create_task(database.retry(work_in_transaction if in_transaction else work))
    await ready.wait()
    with frozen(postgres.pid):
        go.set()
        begin = time.monotonic()
        if leaves:
            await asyncio.sleep(0.1)
            request.cancel()
        with pytest.raises(asyncio.CancelledError if leaves else UnavailableError):
            await request
        # The timeout, and half a second for the cancellation; a rollback would take the timeout once more.
        assert time.monotonic() - begin < 2 * TIMEOUT_SECONDS
    await assert_nothing_leaked(database)


async def test_work_that_is_done_does_not_fail_with_its_connection(
    database: Database, admin: asyncpg.Connection, postgres: Postgres
) -> None:
    async with database.acquire() as connection:
        assert await one(connection) == 1
        await terminate(admin, connection)
    async with database.acquire() as connection:
        assert await one(connection) == 1
        freeze = frozen(postgres.pid)
        freeze.__enter__()
    freeze.__exit__(None, None, None)
    await assert_nothing_leaked(database)


async def test_a_read_is_done_again_when_its_connection_is_lost(
    database: Database, admin: asyncpg.Connection
) -> None:
    tries = 0

    async def read(connection: Connection) -> int:
        nonlocal tries
        tries += 1
        async with connection.transaction(readonly=True):
            if tries == 1:
                await terminate(admin, connection)
            return await one(connection)

    assert await database.retry(read) == 1
    assert tries == 2


async def test_a_connection_that_was_closed_while_idle_costs_a_read_nothing(
    database: Database, admin: asyncpg.Connection
) -> None:
    await database.check()
    async with database.acquire() as connection:
        await connection.execute("select")
    await admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
    )
    time.sleep(0.1)  # noqa: ASYNC251 - the loop must not see the end of it
    await database.check()
    assert await database.retry(one) == 1


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("another service"),
        asyncpg.InterfaceError("a bug"),
        asyncpg.UniqueViolationError("a conflict"),
        KeyError("a bug"),
    ],
)
async def test_what_is_no_outage_is_not_tried_again(database: Database, error: Exception) -> None:
    tries = 0

    async def fail(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        await connection.execute("select")
        raise error

    with pytest.raises(type(error)) as raised:
        await database.retry(fail)
    assert raised.value is error
    assert tries == 1
    await assert_nothing_leaked(database)


async def test_a_command_that_takes_too_long_is_not_tried_again(database: Database) -> None:
    tries = 0

    async def work(connection: Connection) -> None:
        nonlocal tries
        tries += 1
        await connection.execute("set statement_timeout = 100")
        await connection.execute("select pg_sleep(60)")

    with pytest.raises(UnavailableError):
        await database.retry(work)
    assert tries == 1
    assert (
        await database.retry(lambda connection: connection.fetchval("show statement_timeout"))
        == "0"
    )


async def seconds_of_a_read(database: Database) -> float:
    begin = time.monotonic()
    with pytest.raises(UnavailableError):
        await database.retry(one)
    return time.monotonic() - begin


async def test_an_outage_is_waited_for_only_while_it_is_young(
    database: Database, postgres: Postgres
) -> None:
    assert await database.retry(one) == 1
    budget = database.settings.database_retry_seconds
    postgres.stop()
    try:
        young, *old = [await seconds_of_a_read(database) for _ in range(3)]
        assert young >= budget
        assert max(old) < budget
        await asyncio.sleep(budget * 2)
        assert await seconds_of_a_read(database) < budget  # also when nobody has asked for a while
    finally:
        postgres.start()
    assert await database.retry(one) == 1
    postgres.stop()
    try:
        assert await seconds_of_a_read(database) >= budget  # another one
    finally:
        postgres.start()


async def test_readiness_tells_how_old_an_outage_is(database: Database, postgres: Postgres) -> None:
    budget = database.settings.database_retry_seconds
    postgres.stop()
    try:
        with pytest.raises(ConnectionError):
            await database.check()
        await asyncio.sleep(budget)
        assert await seconds_of_a_read(database) < budget
    finally:
        postgres.start()
    await database.check()
    assert database.unavailable_since is None


async def test_a_server_that_takes_no_changes_is_left_for_the_next_connection(
    database: Database,
) -> None:
    """Such as the old primary after a failover: a pool that kept its connections would stay with it."""
    servers: list[int] = []

    async def change() -> None:
        async with database.acquire() as connection:
            servers.append(connection.get_server_pid())
            await connection.execute("set default_transaction_read_only = on")
            await connection.execute("create table changes (n int)")

    with pytest.raises(UnavailableError, match="changes"):
        await change()
    async with database.acquire() as connection:
        assert connection.get_server_pid() not in servers


async def test_a_server_that_is_full_is_not_waited_for(
    settings: Settings, admin: asyncpg.Connection
) -> None:
    await admin.execute("create role crowd login password 'crowd' connection limit 0")
    url = settings.database_url.get_secret_value().split("@")[1]
    crowded = settings.model_copy(
        update={"database_url": SecretStr(f"postgresql://crowd:crowd@{url}")}
    )
    async with Database(crowded, CONNECTIONS) as database:
        assert await seconds_of_a_read(database) < database.settings.database_retry_seconds
    await admin.execute("drop role crowd")


async def test_requests_that_leave_at_any_moment_leak_no_connection(database: Database) -> None:
    async def read(number: int) -> None:
        async with (
            asyncio.timeout(random.random() * 0.02),
            database.acquire() as connection,
            connection.transaction(),
        ):
            assert (
                await connection.fetchval("select $1::int from pg_sleep(0.002)", number) == number
            )

    for _ in range(20):
        ended = await asyncio.gather(
            *(read(number) for number in range(20)), return_exceptions=True
        )
        assert all(
            each is None or isinstance(each, (TimeoutError, UnavailableError)) for each in ended
        ), ended
    await assert_nothing_leaked(database)
