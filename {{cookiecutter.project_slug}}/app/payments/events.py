"""The event of a new payment, republished while the payment stays pending."""

import json
from uuid import UUID, uuid5

from app.patterns import outbox
from app.patterns.outbox import Event
from app.patterns.stream_group import Message
from app.patterns.stream_handler import PoisonError
from app.payments import repository
from app.storage.postgres import Connection

STREAM = "payment-events"
CREATED = "payment.created"


def created_event(payment_id: UUID, payload: str) -> Event:
    """Return the event of a payment, as JSON. Every event of one payment has the same ID."""
    return Event(STREAM, uuid5(payment_id, CREATED), CREATED, payload)


async def republish_pending(connection: Connection, limit: int) -> int:
    """Publish up to `limit` due payments again; return how many. A periodic job.

    Their events may be lost with the memory of Redis.
    """
    due = await repository.claim_due(connection, limit)
    for payment in due:
        event = created_event(payment.payment_id, payment.model_dump_json())
        await outbox.add(connection, *event)
    return len(due)


def parse_ids(message: Message) -> tuple[UUID, UUID]:
    """Return the IDs of the event and of its payment. Raises `PoisonError`."""
    try:
        event_id = UUID(message.fields[b"event_id"].decode())
        payload = json.loads(message.fields[b"payload"])
        payment_id = UUID(payload["payment_id"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PoisonError("not an event of a payment") from None
    return event_id, payment_id
