"""Reads from a streaming standby, and from the primary while it is too old or unavailable.

The lag is measured like `replay_lag` of pg_stat_replication (PostgreSQL, "Monitoring"). A read that
follows a write sees it (`Write-Position`).
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response

from app.errors import UnavailableError
from app.lifespan import open_state
from app.settings import Settings
from app.storage.postgres import Connection, Database
from app.storage.postgres_errors import ConnectionLostError
from app.storage.replica import (
    BUSY,
    CONFLICT,
    HEADER,
    LAG,
    POSITION,
    REPLICA,
    SCHEMA,
    UNAVAILABLE,
    UNKNOWN,
    History,
    Reads,
    Replica,
    Source,
    open_replica,
)
from scripts.dev_services import Postgres
from tests.patience import patience
from tests.service_process import frozen
from tests.standby import Standby, standby

MAX_LAG_SECONDS = 1.0
#: Of a comparison, in the tests of servers that hang.
CHECK_TIMEOUT_SECONDS = 0.5
#: Far below that of a command, which is `DEADLINE_SECONDS`, and of a connect.
SOON_SECONDS = 8.0
_names = itertools.count(1)


@dataclass
class Servers:
    """The reads of a process, and connections of the test to both servers."""

    replica: Replica
    primary: asyncpg.Connection
    standby: asyncpg.Connection
    table: str

    def reads(self, position: str | None = None) -> Reads:
        headers = [] if position is None else [(HEADER.lower().encode(), position.encode())]
        return self.replica.for_request(Request({"type": "http", "headers": headers}))

    async def read(self, position: str | None = None) -> tuple[int, int]:
        """Return the number of rows, and the port of the server that has counted them."""

        async def count(connection: Connection) -> tuple[int, int]:
            rows = await connection.fetchval(f"select count(*) from {self.table}")
            return rows, await port_of(connection)

        return await self.reads(position).retry(count)

    async def write(self) -> str:
        """Insert a row; return the position that the response to the write has."""
        await self.primary.execute(f"insert into {self.table} values (1)")
        return await position_of(self.replica)

    def hurry(self) -> None:
        """Limit the time of a comparison."""
        update = {"readiness_timeout_seconds": CHECK_TIMEOUT_SECONDS}
        self.replica.settings = self.replica.settings.model_copy(update=update)

    async def until_replayed(self, position: str) -> None:
        """Wait until the standby itself reports this position."""
        query = "select pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
        async with patience(20):
            while not await self.standby.fetchval(query, position):  # noqa: ASYNC110 - a server
                await asyncio.sleep(0.02)

    def count(self, result: str) -> float:
        return float(self.replica.metrics.reads[result]._value.get())


@pytest.fixture(scope="module")
def server(database_url: str, postgres: Postgres) -> Iterator[Standby]:
    with standby(postgres) as server:
        yield server


@pytest.fixture
def with_replica(settings: Settings, server: Standby) -> Settings:
    update = {
        "database_replica_url": SecretStr(server.url),
        "database_replica_max_lag_seconds": MAX_LAG_SECONDS,
    }
    return settings.model_copy(update=update)


@pytest.fixture
async def servers(
    with_replica: Settings, server: Standby, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Servers]:
    monkeypatch.setattr("app.storage.replica.CHECK_SECONDS", 0.1)
    primary = await asyncpg.connect(with_replica.database_url.get_secret_value())
    direct = await asyncpg.connect(server.url)
    table = f"replicated_{next(_names)}"
    # Else the position of a write is replayed once it is flushed, up to 0.6 s later.
    await primary.execute("set synchronous_commit = on")
    await primary.execute(f"create table {table} (n int)")
    async with (
        Database(with_replica, 3) as database,
        open_replica(with_replica, database, 3) as replica,
    ):
        assert isinstance(replica, Replica)
        servers = Servers(replica, primary, direct, table)
        await servers.until_replayed(await servers.write())
        await until(lambda: replica.reason is None)
        yield servers
    await primary.execute(f"drop table {table}")
    await primary.close()
    direct.terminate()


async def position_of(source: Source) -> str:
    """Return the position that a response gets after a write."""
    response = Response()
    await source.add_write_position(response)
    return response.headers.get(HEADER, "")


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    async with patience(seconds):
        while not condition():  # noqa: ASYNC110 - the state of other servers
            await asyncio.sleep(0.02)


async def port_of(connection: Connection) -> int:
    port: int = await connection.fetchval("select inet_server_port()")
    return port


def check_of(replica: Replica) -> Awaitable[object]:
    return replica.checks["replica"]()


# Where reads go to


async def test_read_goes_to_the_replica(servers: Servers, server: Standby) -> None:
    assert await servers.read() == (1, server.port)
    assert servers.count(REPLICA) == 1
    await check_of(servers.replica)


async def test_idle_primary_does_not_make_the_replica_old(
    servers: Servers, server: Standby
) -> None:
    """`now() - pg_last_xact_replay_timestamp()` would: it is over the limit here."""
    last = "select extract(epoch from now() - pg_last_xact_replay_timestamp()) > $1"
    async with patience(10):
        while not await servers.standby.fetchval(last, MAX_LAG_SECONDS):
            assert await servers.read() == (1, server.port)
            await asyncio.sleep(0.05)
    assert servers.replica.lag < MAX_LAG_SECONDS


async def test_reads_of_a_paused_replica_go_to_the_primary(
    servers: Servers, server: Standby, postgres: Postgres
) -> None:
    await servers.standby.execute("select pg_wal_replay_pause()")
    try:
        await servers.write()
        assert await servers.read() == (1, server.port)
        await until(lambda: servers.replica.reason == LAG)
        assert MAX_LAG_SECONDS < servers.replica.lag < SOON_SECONDS
        assert await servers.read() == (2, postgres.port)
        assert servers.count(LAG) == 1
        with pytest.raises(UnavailableError, match=r"is \d\.\d s old, and may be 1 s"):
            await check_of(servers.replica)
    finally:
        await servers.standby.execute("select pg_wal_replay_resume()")
    await until(lambda: servers.replica.reason is None)
    assert await servers.read() == (2, server.port)


async def test_replica_that_receives_nothing_becomes_old(
    servers: Servers, postgres: Postgres
) -> None:
    """It has replayed all that it has received, and so knows nothing of its age."""
    sender = await servers.primary.fetchval("select pid from pg_stat_replication")
    with frozen(sender):
        await servers.write()
        await until(lambda: servers.replica.reason == LAG)
        assert await servers.read() == (2, postgres.port)
        same = "select pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()"
        assert await servers.standby.fetchval(same)
    await until(lambda: servers.replica.reason is None)


async def test_stopped_replica_fails_no_read(
    servers: Servers, server: Standby, postgres: Postgres
) -> None:
    assert await servers.read() == (1, server.port)
    server.stop()
    try:
        results = [await servers.read() for _ in range(20)]
        assert set(results) == {(1, postgres.port)}
        assert servers.count(UNAVAILABLE) == 20
        await until(lambda: servers.replica.reason == UNAVAILABLE)
        with pytest.raises(UnavailableError, match="does not respond"):
            await check_of(servers.replica)
    finally:
        server.start()
    await until(lambda: servers.replica.reason is None)
    assert await servers.read() == (1, server.port)


async def test_hung_replica_costs_only_the_reads_in_flight_their_time(
    servers: Servers, server: Standby, postgres: Postgres
) -> None:
    """Those wait for the next comparison and its time limit, not for that of a command."""
    await asyncio.gather(*[servers.read() for _ in range(2)])
    servers.hurry()
    with frozen(server.pid):
        start = time.monotonic()
        results = await asyncio.gather(*[servers.read() for _ in range(2)])
        assert set(results) == {(1, postgres.port)}
        for _ in range(20):
            assert await servers.read() == (1, postgres.port)
        assert time.monotonic() - start < SOON_SECONDS
    await until(lambda: servers.replica.reason is None)
    assert await servers.read() == (1, server.port)


async def test_lost_connection_sends_the_read_to_the_primary(
    servers: Servers, postgres: Postgres
) -> None:
    """As after a restart of the replica. All reads follow until the next comparison."""

    async def lose(connection: Connection) -> int:
        if await connection.fetchval("select pg_is_in_recovery()"):
            await connection.execute("select pg_terminate_backend(pg_backend_pid())")
        return await port_of(connection)

    assert await servers.reads().retry(lose) == postgres.port
    assert servers.replica.reason == UNAVAILABLE
    await until(lambda: servers.replica.reason is None)


@pytest.mark.parametrize(
    ("sqlstate", "reason"),
    [("40001", CONFLICT), ("57014", UNAVAILABLE), ("42P01", SCHEMA)],
    ids=["conflict with recovery", "statement timeout", "table not replayed yet"],
)
async def test_error_of_the_replica_sends_the_read_to_the_primary(
    servers: Servers, postgres: Postgres, sqlstate: str, reason: str
) -> None:
    """PostgreSQL, "Handling Query Conflicts": a standby cancels queries to go on replaying."""

    async def read(connection: Connection) -> int:
        if await connection.fetchval("select pg_is_in_recovery()"):
            raised = f"do $$ begin raise exception sqlstate '{sqlstate}'; end $$"
            await connection.execute(raised)
        return await port_of(connection)

    assert await servers.reads().retry(read) == postgres.port
    assert servers.count(reason) == 1


async def test_read_without_a_free_connection_goes_to_the_primary(
    servers: Servers, postgres: Postgres
) -> None:
    database = servers.replica.database
    impatient = {"database_acquire_timeout_seconds": 0.1}
    async with database.acquire(), database.acquire():
        database.settings = database.settings.model_copy(update=impatient)
        assert await servers.read() == (1, postgres.port)
    assert servers.count(BUSY) == 1
    assert servers.replica.reason is None


async def test_write_to_the_replica_is_an_error(servers: Servers) -> None:
    """Otherwise it would go to the primary each time, and succeed."""

    async def write(connection: Connection) -> None:
        await connection.execute(f"insert into {servers.table} values (2)")

    with pytest.raises(UnavailableError, match="read-only"):
        await servers.reads().retry(write)
    assert await servers.primary.fetchval(f"select count(*) from {servers.table}") == 1


async def test_error_of_a_read_is_raised(servers: Servers) -> None:
    """Of a bug, the error is the primary's; an error of the application is never repeated."""
    attempts = 0

    async def fail(connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        raise KeyError

    with pytest.raises(KeyError):
        await servers.reads().retry(fail)
    assert attempts == 1
    with pytest.raises(asyncpg.UndefinedTableError):
        await servers.reads().retry(lambda connection: connection.execute("select from nothing"))


# Promotion


async def test_promoted_replica_is_read_unless_there_is_another_primary(
    settings: Settings, postgres: Postgres
) -> None:
    """Without fencing both accept writes, and the promoted one lacks those of the other."""
    with standby(postgres) as server:
        update = {"database_replica_url": SecretStr(server.url)}
        async with Database(settings, 2) as primary:
            replica = Replica(settings.model_copy(update=update), primary, 2)
            async with replica.database:
                server.promote()
                await replica.compare()
                assert replica.reason == UNAVAILABLE
                # The primary's own address: both URLs lead to the same server.
                replica.database.close_probe()
                replica.database.url = primary.url
                await replica.compare()
                assert replica.reason is None


# A caller's own writes


async def test_read_after_a_write_sees_it(
    servers: Servers, server: Standby, postgres: Postgres
) -> None:
    """With the position of the write. Other reads go on to the replica."""
    await servers.standby.execute("select pg_wal_replay_pause()")
    try:
        position = await servers.write()
        assert await servers.read(position) == (2, postgres.port)
        assert servers.count(POSITION) == 1
        assert await servers.read() == (1, server.port)
        assert await servers.read("0/1") == (1, server.port)
    finally:
        await servers.standby.execute("select pg_wal_replay_resume()")
    await servers.until_replayed(position)
    assert await servers.read(position) == (2, server.port)


async def test_caller_that_has_just_written_reads_from_the_replica(
    servers: Servers, server: Standby, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica itself is asked, not the last comparison."""
    monkeypatch.setattr("app.storage.replica.CHECK_SECONDS", 60)
    position = await servers.write()
    await servers.until_replayed(position)
    assert await servers.read(position) == (2, server.port)


async def test_position_that_is_not_known_is_read_from_the_primary(
    servers: Servers, postgres: Postgres
) -> None:
    for position in (UNKNOWN, "", "0", "1/2/3", "-1/2", "FFFFFFFF/FFFFFFFF"):
        assert await servers.read(position) == (1, postgres.port), position


async def test_write_does_not_fail_for_lack_of_its_position(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is committed. Its caller then reads from the primary."""

    def unavailable() -> None:
        raise ConnectionLostError("The database is not available.")

    monkeypatch.setattr(servers.replica.primary, "acquire", unavailable)
    assert await position_of(servers.replica) == UNKNOWN


# Lag


def test_lag_is_the_age_of_the_newest_position_that_is_replayed() -> None:
    history = History()
    assert history.lag(100) == math.inf
    for second, position in enumerate([100, 200, 200, 300]):
        history.note(position, float(second))
    assert history.lag(99) == math.inf  # older than all that is known
    assert history.lag(100) == 3
    assert history.lag(250) == 1
    assert history.lag(300) == 0
    assert history.lag(400) == 0
    history.note(500, 9.0)
    assert history.lag(400) == 6


def test_lag_does_not_grow_while_the_primary_does_not_respond() -> None:
    """Nothing is committed meanwhile, so reads of the replica outlast an outage of the primary."""
    history = History()
    history.note(100, 0.0)
    history.note(200, 1.0)
    assert [history.lag(100), history.lag(100)] == [1, 1]


async def test_replica_serves_reads_while_the_primary_is_hung(
    servers: Servers, server: Standby, postgres: Postgres
) -> None:
    servers.hurry()
    with frozen(postgres.pid):
        noted = servers.replica.history.noted
        await until(lambda: time.monotonic() - noted[-1][0] > 1.5 * MAX_LAG_SECONDS)
        assert await servers.read() == (1, server.port)


# The process


async def test_without_a_replica_reads_are_those_of_the_primary(settings: Settings) -> None:
    async with open_state(settings) as state:
        source = state["replica"]
        assert source.database is None
        assert source.checks == {}
        assert await position_of(source) == ""
        reads: Any = source.for_request(Request({"type": "http", "headers": []}))
        assert reads.retry == state["database"].retry


async def test_readiness_reports_the_replica_and_does_not_depend_on_it(
    with_replica: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage.replica.CHECK_SECONDS", 60)
    async with open_state(with_replica) as state:
        replica = state["replica"]
        assert isinstance(replica, Replica)
        await until(lambda: replica.reason is None)
        health = state["health"]
        health.started = True
        for reason, expected in ((None, "healthy"), (LAG, "unhealthy")):
            replica.reason = reason
            if health.running is not None:
                await health.running
            health.checked_at = -math.inf
            status, body = await health.readiness()
            assert status == 200
            assert body["checks"]["replica"]["status"] == expected


async def test_queries_of_the_replica_are_logged(
    with_replica: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    logged = with_replica.model_copy(update={"log_sql": True})
    async with Database(logged, 2) as database, open_replica(logged, database, 2) as replica:
        assert isinstance(replica, Replica)
        await until(lambda: replica.reason is None)
        reads = replica.for_request(Request({"type": "http", "headers": []}))
        await reads.retry(lambda connection: connection.execute("select 'replica'"))
        await asyncio.sleep(0)
    assert "select 'replica'" in caplog.text
