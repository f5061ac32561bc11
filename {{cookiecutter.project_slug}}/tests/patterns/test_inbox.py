"""A message has its effect once, and its note goes with the effect."""

import asyncio
import contextlib
from uuid import uuid4

import pytest

from app.patterns import inbox
from app.storage.postgres import Database


async def test_a_message_is_new_once(database: Database) -> None:
    message = uuid4()

    async def receive() -> bool:
        async with database.acquire() as connection, connection.transaction():
            return await inbox.claim(connection, message)

    assert sorted(await asyncio.gather(*(receive() for _ in range(10)))) == [False] * 9 + [True]


async def test_a_message_whose_effect_failed_is_new_again(database: Database) -> None:
    message = uuid4()
    async with database.acquire() as connection:
        with contextlib.suppress(KeyError):
            async with connection.transaction():
                assert await inbox.claim(connection, message)
                raise KeyError
        async with connection.transaction():
            assert await inbox.claim(connection, message)
        with pytest.raises(RuntimeError, match="transaction"):
            await inbox.claim(connection, uuid4())


async def test_old_notes_are_purged_in_batches(database: Database) -> None:
    async with database.acquire() as connection:
        await connection.execute(
            "insert into inbox select gen_random_uuid(), now() - interval '31 days' from generate_series(1, 3)"
        )
        await connection.execute("insert into inbox values (gen_random_uuid())")
        assert [await inbox.delete_expired(connection, 2) for _ in range(3)] == [2, 1, 0]
        assert await connection.fetchval("select count(*) from inbox") == 1
