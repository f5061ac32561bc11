"""Payments that are stored with events, as the API and its outbox would have done it."""

import json
from uuid import uuid4

import asyncpg

from app.payments.events import CREATED

_INSERT = """
    insert into payments (amount, currency, reference) values ($1, 'EUR', $2)
    returning payment_id::text
"""
Event = dict[str, str]


async def store_payments(database_url: str, count: int) -> list[Event]:
    """Store pending payments; return the event of each."""
    connection = await asyncpg.connect(database_url)
    events = []
    try:
        for number in range(1, count + 1):
            payment_id = await connection.fetchval(_INSERT, number, f"order-{number}")
            payload = json.dumps({"payment_id": payment_id})
            events.append({"event_id": str(uuid4()), "type": CREATED, "payload": payload})
    finally:
        await connection.close()
    return events


def payment_id(event: Event) -> str:
    """Return the ID of the payment of an event."""
    return str(json.loads(event["payload"])["payment_id"])
