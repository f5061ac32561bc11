"""Resources connect on first use, and close in reverse, also on a failed start."""

from typing import Any

import pytest
from redis.asyncio import Redis

from app.lifespan import open_state
from app.settings import Settings
from app.storage.postgres import Database
from scripts.dev_services import free_port


async def test_nothing_connects_before_first_use(settings: Settings) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    urls: dict[str, Any] = {
        "database_url": f"postgresql://a:b@{nowhere}/c",
        "redis_url": f"redis://{nowhere}",
    }
    async with open_state(Settings(**urls)) as state:
        assert state["database"].pool.get_size() == 0


async def test_resources_are_closed_in_reverse(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are two Redis clients at least, one of them for the readiness probe."""
    closed = []
    close_redis: Any = Redis.__aexit__
    close_database: Any = Database.__aexit__

    async def note_redis(self: Redis, *error: object) -> None:
        closed.append("redis")
        await close_redis(self, *error)

    async def note_database(self: Database, *error: object) -> None:
        closed.append("database")
        await close_database(self, *error)

    monkeypatch.setattr(Redis, "__aexit__", note_redis)
    monkeypatch.setattr(Database, "__aexit__", note_database)
    async with open_state(settings) as state:
        async with state["database"].acquire() as connection:
            assert await connection.fetchval("select 1") == 1
        assert await state["redis"].ping()
    assert closed[-3:] == ["redis", "redis", "database"]
    assert set(closed[:-1]) == {"redis"}


async def test_failed_start_closes_the_opened_resources(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_database = Database.__aenter__

    async def note_opened(self: Database) -> Database:
        opened.append(self)
        return await open_database(self)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(Database, "__aenter__", note_opened)
    monkeypatch.setattr("app.storage.create_redis", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        async with open_state(settings):
            pass
    assert opened[0].pool.is_closing()
