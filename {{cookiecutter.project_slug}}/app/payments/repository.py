"""The SQL of payments; each function takes the connection, so that its caller decides on the transaction."""

from typing import Any
from uuid import UUID

from app.patterns.pagination import Cursor
from app.payments.schemas import NewPayment, Payment
from app.storage.postgres import Connection

_COLUMNS = "payment_id, amount, currency, reference, status, created_at"
_INSERT = f"""
    insert into payments (amount, currency, reference, request_id) values ($1, $2, $3, $4) returning {_COLUMNS}
"""  # noqa: S608
_FIND = f"select {_COLUMNS}, request_id from payments where payment_id = $1"  # noqa: S608
_PAGE = f"""
    select {_COLUMNS} from payments where (created_at, payment_id) < ($1, $2)
    order by created_at desc, payment_id desc limit $3
"""  # noqa: S608
_DUE = f"""
    update payments set announce_at = now() + least(greatest(now() - created_at, '1 minute'), '1 hour')
    where payment_id = any(array(
        select payment_id from payments where status = 'pending' and announce_at < now() limit $1 for update skip locked
    )) returning {_COLUMNS}
"""  # noqa: S608
_MAKE_DUE = """
    update payments set announce_at = 'epoch' where payment_id = any(array(select payment_id from payments
    where status = 'pending' and announce_at > 'epoch' and announce_at < 'infinity' limit 1000))
"""


async def create(connection: Connection, payment: NewPayment, request_id: str) -> Payment:
    """Store a payment and return it as stored."""
    row: Any = await connection.fetchrow(
        _INSERT, payment.amount, payment.currency, payment.reference, request_id
    )
    return Payment(**row)


async def get(connection: Connection, payment_id: UUID) -> tuple[Payment, str] | None:
    """Return the payment, and the ID of the request that it came with; or None."""
    row = await connection.fetchrow(_FIND, payment_id)
    return (Payment(**row), row["request_id"]) if row else None


async def list_page(connection: Connection, limit: int, after: Cursor) -> list[Payment]:
    """Return up to `limit` payments after a place, the newest first."""
    return [Payment(**row) for row in await connection.fetch(_PAGE, *after, limit)]


async def settle(connection: Connection, payment_id: UUID) -> None:
    """Note that the payment is charged."""
    await connection.execute(
        "update payments set status = 'settled' where payment_id = $1", payment_id
    )


async def claim_due(connection: Connection, limit: int) -> list[Payment]:
    """Return payments to announce again: those pending for a minute, then after twice the time of before."""
    return [Payment(**row) for row in await connection.fetch(_DUE, limit)]


async def mark_all_due(connection: Connection) -> None:
    """Make all pending payments due at once, except those that are given up."""
    while await connection.execute(_MAKE_DUE) != "UPDATE 0":
        pass


async def stop_republishing(connection: Connection, payment_id: UUID) -> None:
    """Never announce the payment again, whatever Redis loses."""
    await connection.execute(
        "update payments set announce_at = 'infinity' where payment_id = $1", payment_id
    )
