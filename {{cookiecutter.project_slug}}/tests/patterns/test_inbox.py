"""The inbox: a message has its effect once, in the transaction of its row."""

import asyncio
import contextlib
from uuid import uuid4

import pytest

from app.patterns import inbox
from app.storage.postgres import Database


async def test_concurrent_claims_of_a_message_succeed_once(database: Database) -> None:
    message_id = uuid4()

    async def receive() -> bool:
        async with database.acquire() as connection, connection.transaction():
            return await inbox.claim(connection, message_id)

    claims = await asyncio.gather(*(receive() for _ in range(10)))
    assert sorted(claims) == [False] * 9 + [True]


async def test_claim_is_rolled_back_with_its_effect(database: Database) -> None:
    message_id = uuid4()
    async with database.acquire() as connection:
        with contextlib.suppress(KeyError):
            async with connection.transaction():
                assert await inbox.claim(connection, message_id)
                raise KeyError
        async with connection.transaction():
            assert await inbox.claim(connection, message_id)


async def test_statement_that_depends_on_the_claim_has_its_effect_once(database: Database) -> None:
    """Without a transaction around it, and with concurrent deliveries."""
    message_id = uuid4()
    apply = f"""
        with claimed as ({inbox.CLAIM})
        insert into inbox (message_id) select $2 where exists (select from claimed) returning true
    """

    async def receive() -> bool | None:
        async with database.acquire() as connection:
            return await connection.fetchval(apply, message_id, uuid4())  # type: ignore[no-any-return]

    effects = await asyncio.gather(*(receive() for _ in range(10)))
    assert effects.count(True) == 1


async def test_claim_outside_a_transaction_is_rejected(database: Database) -> None:
    async with database.acquire() as connection:
        with pytest.raises(RuntimeError, match="transaction"):
            await inbox.claim(connection, uuid4())


async def test_expired_rows_are_deleted_in_batches(database: Database) -> None:
    async with database.acquire() as connection:
        await connection.execute("""
            insert into inbox
            select gen_random_uuid(), now() - interval '31 days' from generate_series(1, 3)
        """)
        await connection.execute("""
            insert into inbox values (gen_random_uuid(), now() - interval '29 days')
        """)
        assert [await inbox.delete_expired(connection, 2) for _ in range(3)] == [2, 1, 0]
        assert await connection.fetchval("select count(*) from inbox") == 1
