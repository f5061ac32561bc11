"""Inbox: a redelivered message has its effect once.

Brokers deliver at least once; no option of theirs changes that. The row and the effect are
committed in one transaction, or by one statement: either both exist, or neither.
"""

from uuid import UUID

from app.storage.postgres import Connection, delete_older

#: Rows expire after 30 days. A message must not be redelivered later than that.
EXPIRY_HOURS = 30 * 24
#: Records the message `$1`; returns a row unless it was recorded before. An effect of one statement
#: depends on it as `with claimed as (CLAIM) update ... where ... and exists (select from claimed)`.
CLAIM = "insert into inbox (message_id) values ($1) on conflict do nothing returning true"


async def claim(connection: Connection, message_id: UUID) -> bool:
    """Claim a message for this transaction; return False if it was claimed before.

    A second transaction with the same message waits here until the first one ends. Raises
    `RuntimeError` outside a transaction, where the row would stay without the effect.
    """
    if not connection.is_in_transaction():
        msg = "a message must be claimed in the transaction of its effect"
        raise RuntimeError(msg)
    return await connection.fetchval(CLAIM, message_id) is True


async def delete_expired(connection: Connection, batch: int) -> int:
    """Delete up to `batch` expired rows; return how many. A periodic job."""
    return await delete_older(connection, "inbox", "received_at", EXPIRY_HOURS, batch)
