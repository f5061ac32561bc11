"""Resources open lazily, close in reverse, and close also when opening fails half-way."""

import asyncio
import gc
import warnings
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.errors import UnavailableError
from app.lifespan import open_state
from app.settings import Settings
from app.storage.postgres import Database
from app.storage.redis import create_redis
from scripts.dev_services import Postgres, free_port
from tests.service_process import frozen


async def test_nothing_connects_before_first_use(settings: Settings) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    urls: dict[str, Any] = {
        "database_url": f"postgresql://a:b@{nowhere}/c",
        "redis_url": f"redis://{nowhere}",
    }
    async with open_state(Settings(**urls)) as state:
        assert state["database"].pool.get_size() == 0


async def test_what_was_opened_is_closed_in_reverse(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close_redis: Any = Redis.__aexit__
    close_database: Any = Database.__aexit__

    async def redis_closes(self: Redis, *error: object) -> None:
        closed.append("redis")
        await close_redis(self, *error)

    async def database_closes(self: Database, *error: object) -> None:
        closed.append("database")
        await close_database(self, *error)

    monkeypatch.setattr(Redis, "__aexit__", redis_closes)
    monkeypatch.setattr(Database, "__aexit__", database_closes)
    async with open_state(settings) as state:
        async with state["database"].acquire() as connection:
            assert await connection.fetchval("select 1") == 1
        assert await state["redis"].ping()
    assert closed == ["redis", "redis", "database"]


async def test_a_start_that_fails_half_way_closes_what_it_opened(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    enter = Database.__aenter__

    async def remembered(self: Database) -> Database:
        opened.append(self)
        return await enter(self)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(Database, "__aenter__", remembered)
    monkeypatch.setattr("app.storage.redis.create_redis", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        async with open_state(settings):
            pass
    assert opened[0].pool.is_closing()


async def test_an_exhausted_pool_sheds_requests_and_stays_ready(settings: Settings) -> None:
    tight = settings.model_copy(
        update={"database_acquire_timeout_seconds": 0.1, "web_concurrency": 4}
    )
    async with open_state(tight) as state:
        await asyncio.sleep(0)
        async with state[
            "database"
        ].pool.acquire():  # the only one; connecting may take longer than 0.1 s
            with pytest.raises(UnavailableError) as error:
                async with state["database"].acquire():
                    pass
            assert error.value.headers == {"Retry-After": "1"}
            state["health"].checked_at = float("-inf")
            status, _ = await state["health"].readiness()
            assert status == 200


async def test_a_slow_query_is_cut_off(settings: Settings) -> None:
    async with open_state(
        settings.model_copy(update={"database_command_timeout_seconds": 0.1})
    ) as state:
        with pytest.raises(UnavailableError):
            async with state["database"].acquire() as connection:
                await connection.execute("select pg_sleep(5)")


async def test_a_query_on_a_server_that_freezes_ends_in_time(
    settings: Settings, postgres: Postgres
) -> None:
    loop = asyncio.get_running_loop()
    async with open_state(
        settings.model_copy(update={"database_command_timeout_seconds": 2})
    ) as state:
        async with state["database"].acquire() as connection:
            await connection.execute("select")
        with frozen(postgres.pid):
            start = loop.time()
            with pytest.raises(UnavailableError):
                async with state["database"].acquire() as connection:
                    await connection.execute("select")
            assert loop.time() - start < 4  # 2.5 where the machine has time


async def test_a_bug_in_a_query_is_no_outage(settings: Settings) -> None:
    async with open_state(settings) as state:
        for query, arguments in (("select $1::int", ()), ("select nothing from nowhere", ())):
            with pytest.raises((asyncpg.InterfaceError, asyncpg.PostgresError)):
                async with state["database"].acquire() as connection:
                    await connection.execute(query, *arguments)


async def test_requests_while_the_server_restarts_are_refused_and_then_served(
    settings: Settings, postgres: Postgres
) -> None:
    async with open_state(settings) as state:
        database = state["database"]
        with pytest.raises(UnavailableError):
            async with database.acquire() as connection:
                await connection.execute("select pg_terminate_backend(pg_backend_pid())")
        postgres.stop()
        with pytest.raises(UnavailableError):
            async with database.acquire():
                pass
        postgres.start()
        async with database.acquire() as connection:
            assert await connection.fetchval("select 1") == 1


async def test_closing_does_not_wait_for_a_connection_that_hangs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.storage.postgres.CLOSE_TIMEOUT_SECONDS", 0.2)
    async with open_state(settings) as state:
        held = await state["database"].pool.acquire()
        start = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - start < 5  # it is held for ever
    with pytest.raises(asyncpg.InterfaceError):
        await held.execute("select")


async def test_redis_gives_up_soon(settings: Settings) -> None:
    nowhere = settings.model_copy(
        update={"redis_url": SecretStr(f"redis://127.0.0.1:{free_port()}")}
    )
    async with create_redis(nowhere) as client:
        start = asyncio.get_running_loop().time()
        with pytest.raises(RedisError):
            await client.ping()
        assert asyncio.get_running_loop().time() - start < 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()
