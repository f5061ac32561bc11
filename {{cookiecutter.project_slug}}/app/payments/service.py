"""What a worker does for payments: takes each once, announces it with an event, and finds it again."""

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, cast
from uuid import UUID, uuid5

from fastapi import Depends, Request, Response
from redis.asyncio import Redis

from app.patterns import idempotency, inbox, outbox
from app.patterns.cache_aside import Cache
from app.patterns.pagination import Cursor
from app.patterns.periodic import run_periodically
from app.patterns.rate_limit import RateLimit
from app.payments import repository
from app.payments.schemas import NewPayment, Page, Payment
from app.settings import Settings
from app.storage import Storage
from app.storage.postgres import Connection, Database
from app.tasks import background_task
from app.telemetry.context import request_id

STREAM, CREATED, CACHE = "payment-events", "payment.created", "payments"
KEPT_SECONDS = {
    "pending": 1.0,
    "settled": 30.0,
}  # in the cache: Redis may be away when a payment changes
#: About which the stream is trimmed. An event that is cut off unread is announced again while its payment is pending.
MAX_EVENTS = 100_000
CLEAN_UP_SECONDS = 5.0


async def publish_created(connection: Connection, payment: Payment) -> None:
    """Have the event published that says that there is this payment; announced again, it has the same ID."""
    event_id = uuid5(payment.payment_id, CREATED)
    await outbox.add(connection, STREAM, event_id, CREATED, payment.model_dump_json())


class Payments:
    """What a worker holds for payments."""

    def __init__(self, settings: Settings, database: Database, redis: Redis) -> None:
        self.database, self.redis, self.cache = database, redis, Cache(redis, CACHE)
        self.limit = RateLimit(redis, "payments", settings.rate_limit_per_minute)

    async def create(self, new: NewPayment, key: str, principal: str, root_path: str) -> Response:
        """Store a payment with its event, once for each key of a principal; answer with it, or as before."""

        async def store(connection: Connection) -> idempotency.StoredResponse:
            payment = await repository.create(connection, new, request_id())
            await publish_created(connection, payment)
            headers = {
                "Location": f"{root_path}/payments/{payment.payment_id}",
                "Cache-Control": "no-store",
            }
            return idempotency.StoredResponse(201, headers, payment.model_dump_json().encode())

        scope, content = (
            f"POST /payments {principal}",
            new.model_dump_json(exclude_unset=True).encode(),
        )
        # Safe to do again when the database goes away in the middle, since the key is committed with the payment.
        return await self.database.retry(
            lambda connection: idempotency.once(connection, scope, key, content, store)
        )

    async def get(self, payment_id: UUID) -> bytes | None:
        """Return the payment as JSON, or None."""

        async def load() -> tuple[bytes, float] | None:
            found = await self.database.retry(
                lambda connection: repository.get(connection, payment_id)
            )
            return (
                (found[0].model_dump_json().encode(), KEPT_SECONDS[found[0].status])
                if found
                else None
            )

        return await self.cache.get(str(payment_id), load)

    async def list_page(self, limit: int, after: Cursor) -> Page:
        """Return up to `limit` payments after a place, the newest first."""
        items = await self.database.retry(
            lambda connection: repository.list_page(connection, limit + 1, after)
        )
        last = items[limit - 1] if len(items) > limit else None
        return Page(
            items=items[:limit],
            next_cursor=str(Cursor(last.created_at, last.payment_id)) if last else None,
        )


@contextlib.asynccontextmanager
async def open_payments(settings: Settings, storage: Storage) -> AsyncIterator[Payments]:
    """Yield the payments of a worker, with their background tasks: the outbox relay, clean-up."""
    database = storage.database
    jobs = (outbox.update_metrics, idempotency.delete_expired, inbox.delete_expired)
    relay = outbox.relay(database, storage.redis, MAX_EVENTS)
    async with (
        background_task(relay),
        background_task(run_periodically(database, CLEAN_UP_SECONDS, *jobs)),
    ):
        yield Payments(settings, database, storage.redis)


async def _payments(request: Request) -> Payments:
    return cast("Payments", request.state.payments)


#: The type of a route's parameter.
PaymentsDependency = Annotated[Payments, Depends(_payments)]
