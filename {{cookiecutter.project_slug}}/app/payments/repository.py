"""The SQL of payments. The caller passes the connection and owns the transaction."""

from uuid import UUID

from app.patterns import idempotency, inbox, outbox
from app.patterns.idempotency import Claim
from app.patterns.outbox import Event
from app.patterns.pagination import Cursor
from app.payments.schemas import Payment, Total, Totals
from app.storage.postgres import Connection

_COLUMNS = "payment_id, amount, currency, reference, status, created_at"
#: One statement, so one round trip and one transaction: nothing is stored unless the key is new.
_CREATE = f"""
    with claimed as ({idempotency.CLAIM}),
    created as (
        insert into payments ({_COLUMNS}, request_id)
        select $7, $8, $9, $10, $11, $12, $13 from claimed
    ),
    published as (
        insert into outbox ({outbox.COLUMNS}) select $14, $15, $16, $17, $18 from claimed
    )
    select true from claimed
"""  # noqa: S608
_GET = f"select {_COLUMNS}, request_id from payments where payment_id = $1"  # noqa: S608
_LIST_PAGE = f"""
    select {_COLUMNS} from payments where (created_at, payment_id) < ($1, $2)
    order by created_at desc, payment_id desc limit $3
"""  # noqa: S608
_TOTALS = """
    select currency, status, count(*) as payments, sum(amount) as amount from payments
    where created_at > now() - interval '1 day'
    group by currency, status order by currency, status
"""
_SETTLE = f"""
    with claimed as ({inbox.CLAIM})
    update payments set status = 'settled' where payment_id = $2 and exists (select from claimed)
"""  # noqa: S608
_CLAIM_DUE = f"""
    update payments
    set announce_at = now() + least(greatest(now() - created_at, '1 minute'), '1 hour')
    where payment_id = any(array(
        select payment_id from payments where status = 'pending' and announce_at < now()
        limit $1 for update skip locked
    ))
    returning {_COLUMNS}
"""  # noqa: S608
_MARK_DUE = """
    update payments set announce_at = 'epoch'
    where payment_id = any(array(
        select payment_id from payments
        where status = 'pending' and announce_at > 'epoch' and announce_at < 'infinity'
        limit 1000
    ))
"""
_STOP_REPUBLISHING = "update payments set announce_at = 'infinity' where payment_id = $1"


async def create(
    connection: Connection, claim: Claim, payment: Payment, request_id: str, event: Event
) -> bool:
    """Store a payment with its event if the idempotency key is new; return whether it is."""
    row = payment.model_dump().values()
    is_new = await connection.fetchval(
        _CREATE, *claim.arguments(), *row, request_id, *event.values()
    )
    return bool(is_new)


async def get(connection: Connection, payment_id: UUID) -> tuple[Payment, str] | None:
    """Return the payment, and the ID of the request that created it; or None."""
    row = await connection.fetchrow(_GET, payment_id)
    if row is None:
        return None
    return Payment(**row), row["request_id"]


async def list_page(connection: Connection, limit: int, after: Cursor) -> list[Payment]:
    """Return up to `limit` payments after the cursor, newest first."""
    rows = await connection.fetch(_LIST_PAGE, after.created_at, after.row_id, limit)
    return [Payment(**row) for row in rows]


async def totals(connection: Connection) -> Totals:
    """Return the number and the sum of the last day's payments, by currency and status."""
    rows = await connection.fetch(_TOTALS)
    return Totals(items=[Total(**row) for row in rows])


async def settle(connection: Connection, event_id: UUID, payment_id: UUID) -> None:
    """Mark the payment as charged, unless another delivery of the event has done so.

    One statement: the event is recorded if and only if the payment is settled.
    """
    await connection.execute(_SETTLE, event_id, payment_id)


async def claim_due(connection: Connection, limit: int) -> list[Payment]:
    """Return up to `limit` payments to republish, and schedule the next time.

    A payment is due after a minute as pending, then after twice the time each, up to an hour.
    """
    rows = await connection.fetch(_CLAIM_DUE, limit)
    return [Payment(**row) for row in rows]


async def mark_all_due(connection: Connection) -> None:
    """Make every pending payment due now, except those with republishing stopped."""
    status = ""
    while status != "UPDATE 0":
        status = await connection.execute(_MARK_DUE)


async def stop_republishing(connection: Connection, payment_id: UUID) -> None:
    """Never republish the payment, even if Redis loses its data."""
    await connection.execute(_STOP_REPUBLISHING, payment_id)
