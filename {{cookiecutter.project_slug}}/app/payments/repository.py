"""The SQL of payments; each function takes the connection, so that its caller decides on the transaction."""

from typing import Any
from uuid import UUID

from app.database import Connection
from app.payments.schemas import NewPayment, Payment

_COLUMNS = "payment_id, amount, currency, reference, status, created_at"


async def insert(connection: Connection, payment: NewPayment) -> Payment:
    """Store a payment and return it as stored."""
    query = f"insert into payments (amount, currency, reference) values ($1, $2, $3) returning {_COLUMNS}"  # noqa: S608
    row: Any = await connection.fetchrow(query, payment.amount, payment.currency, payment.reference)
    return Payment(**row)


async def find(connection: Connection, payment_id: UUID) -> Payment | None:
    """Return the payment, or None."""
    row = await connection.fetchrow(f"select {_COLUMNS} from payments where payment_id = $1", payment_id)  # noqa: S608
    return Payment(**row) if row else None
