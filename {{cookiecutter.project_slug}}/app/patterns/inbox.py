"""Inbox: a message that comes twice has its effect once. Brokers deliver at least once; no option of theirs changes it.

The row and the effect are committed in one transaction, so that either both are there or none.
"""

from uuid import UUID

from app.storage.postgres import Connection


async def claim(connection: Connection, message_id: UUID) -> bool:
    """Tell whether this message has had no effect yet, and note that it has one now.

    A second transaction with the same message waits here for the end of the first. Raises `RuntimeError` outside of a
    transaction, where the note would stay without the effect.
    """
    if not connection.is_in_transaction():
        msg = "a message is noted in the transaction of its effect"
        raise RuntimeError(msg)
    query = "insert into inbox (message_id) values ($1) on conflict do nothing returning true"
    return await connection.fetchval(query, message_id) is True


async def delete_expired(connection: Connection, batch: int, days: int = 30) -> int:
    """Delete up to `batch` older notes, and return how many. Let none be younger than what may come again."""
    old = "select ctid from inbox where received_at < now() - make_interval(days => $1) limit $2"
    query = f"delete from inbox where ctid = any(array({old} for update skip locked))"  # noqa: S608
    return int((await connection.execute(query, days, batch)).split()[1])
