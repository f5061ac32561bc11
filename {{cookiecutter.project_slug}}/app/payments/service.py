"""Payments: created once per idempotency key, with an event; totals are cached."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, cast
from uuid import UUID, uuid4

from fastapi import Depends, Request

from app.patterns import idempotency, inbox, outbox
from app.patterns.cache_aside import Cache, Loaded
from app.patterns.idempotency import Claim, StoredResponse
from app.patterns.pagination import Cursor
from app.patterns.periodic import run_periodically
from app.patterns.rate_limit import RateLimit
from app.payments import repository
from app.payments.events import created_event
from app.payments.schemas import NewPayment, Page, Payment
from app.settings import Settings
from app.storage import Storage
from app.storage.postgres import Connection, Database
from app.storage.redis import RedisClient
from app.storage.replica import Reads
from app.tasks import background_task
from app.telemetry.context import request_id

#: Maximum age of the totals. Every payment changes them, so they expire, and nothing deletes them.
TOTALS_SECONDS = 10.0
#: Approximate length of the stream. An event that is trimmed unread is republished while its
#: payment is pending.
MAX_EVENTS = 100_000
#: Interval of the update of the outbox metrics.
METRICS_SECONDS = 5.0
#: Interval of the deletion of expired rows, which are hours old.
DELETION_SECONDS = 30.0


class Payments:
    """Creates and reads payments."""

    def __init__(self, settings: Settings, database: Database, redis: RedisClient) -> None:
        self.database = database
        self.totals_cache = Cache(redis, "payment-totals")
        #: Set after each commit of an event, for the relay.
        self.committed = asyncio.Event()
        self.limit = RateLimit(redis, "payments", settings.rate_limit_per_minute)

    async def create(
        self, new: NewPayment, key: str, principal: str, root_path: str
    ) -> StoredResponse:
        """Create a payment with its event, once per key and principal.

        Returns the response, which a repeated call returns again. Raises `IdempotencyError`.
        """
        payment = Payment(
            payment_id=uuid4(), status="pending", created_at=datetime.now(UTC), **new.model_dump()
        )
        body = payment.model_dump_json()
        event = created_event(payment.payment_id, body)
        response = _created(payment.payment_id, body, root_path)
        content = new.model_dump_json(exclude_unset=True).encode()
        claim = Claim(f"POST /payments {principal}", key, content, response)

        async def create_once(connection: Connection) -> StoredResponse:
            if await repository.create(connection, claim, payment, request_id(), event):
                return response
            return await idempotency.replay(connection, claim)

        # Safe to retry after a lost connection, since the key is committed with the payment.
        stored = await self.database.retry(create_once)
        self.committed.set()
        return stored

    async def get(self, payment_id: UUID) -> Payment | None:
        """Return the payment, or None if it does not exist.

        Not through a cache: Redis would cost the service more than this query does.
        """
        found = await self.database.retry(lambda connection: repository.get(connection, payment_id))
        return found[0] if found else None

    async def totals(self) -> bytes:
        """Return the totals of the last day as JSON, at most `TOTALS_SECONDS` old.

        The query reads every payment of a day, which is dear enough to be cached.
        """

        async def load() -> Loaded:
            totals = await self.database.retry(repository.totals)
            return totals.model_dump_json().encode(), TOTALS_SECONDS

        totals = await self.totals_cache.get("day", load)
        # Never None, since `load` never returns it.
        return cast("bytes", totals)

    async def list_page(self, reads: Reads, limit: int, after: Cursor) -> Page:
        """Return up to `limit` payments after the cursor, newest first.

        From the replica, if there is one: a payment that is seconds old may be missing.
        """
        # One more than the page shows whether there is a next one.
        found = await reads.retry(
            lambda connection: repository.list_page(connection, limit + 1, after)
        )
        items = found[:limit]
        if len(found) <= limit:
            return Page(items=items, next_cursor=None)
        last = items[-1]
        next_cursor = Cursor(last.created_at, last.payment_id)
        return Page(items=items, next_cursor=str(next_cursor))


def _created(payment_id: UUID, body: str, root_path: str) -> StoredResponse:
    headers = {"Location": f"{root_path}/payments/{payment_id}", "Cache-Control": "no-store"}
    return StoredResponse(201, headers, body.encode())


@contextlib.asynccontextmanager
async def open_payments(settings: Settings, storage: Storage) -> AsyncIterator[Payments]:
    """Yield the payments of a worker; run the outbox relay and the periodic jobs."""
    database = storage.database
    payments = Payments(settings, database, storage.redis)
    relay = outbox.relay(database, storage.redis, MAX_EVENTS, payments.committed)
    metrics = run_periodically(database, METRICS_SECONDS, outbox.update_metrics)
    deletion = run_periodically(
        database, DELETION_SECONDS, idempotency.delete_expired, inbox.delete_expired
    )
    async with background_task(relay), background_task(metrics), background_task(deletion):
        yield payments


async def _payments(request: Request) -> Payments:
    payments: Payments = request.scope["state"]["payments"]
    return payments


#: The type of a route's parameter: `async def route(payments: PaymentsDependency)`.
PaymentsDependency = Annotated[Payments, Depends(_payments)]
