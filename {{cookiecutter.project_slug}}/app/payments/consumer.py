"""The consumer of payment events: charges payments that the API has created.

`python -m app.payments.consumer` is a process of its own, from the same image, with probes and
metrics on `METRICS_BIND`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from uuid import UUID

from app import process
from app.patterns.periodic import run_periodically
from app.patterns.stream_consumer import StreamConsumer
from app.patterns.stream_group import Message, StreamGroup
from app.patterns.stream_handler import PoisonError, StreamHandler
from app.payments import repository
from app.payments.events import CREATED, STREAM, parse_ids, republish_pending
from app.payments.gateway import CardGateway, check_gateway, open_gateway
from app.settings import Settings, load_settings
from app.storage import Storage
from app.storage.postgres import Database
from app.storage.redis import RedisClient
from app.tasks import background_task
from app.telemetry import logs
from app.telemetry.context import request_context
from app.web.health import Health

#: The consumer group.
GROUP = "charges"
REPUBLISH_SECONDS = 5.0
#: The part of `GRACEFUL_TIMEOUT_SECONDS` that is kept for closing connections.
CLOSING_SECONDS = 5


class ChargeHandler(StreamHandler):
    """Charges each payment once and settles it."""

    def __init__(self, database: Database, redis: RedisClient, gateway: CardGateway) -> None:
        super().__init__(StreamGroup(redis, STREAM, GROUP))
        self.database = database
        self.gateway = gateway

    async def handle(self, message: Message) -> None:
        """Charge the payment of an event and settle it."""
        event_id, payment_id = parse_ids(message)
        if message.fields.get(b"type") != CREATED.encode():
            return  # an event that requires no charge
        found = await self.database.retry(lambda connection: repository.get(connection, payment_id))
        if found is None:
            msg = "the payment does not exist"
            raise PoisonError(msg)
        payment, request_id = found
        request_context.set({"request_id": request_id})
        if payment.status == "pending":
            # Outside a transaction, since it may take seconds.
            await self.gateway.charge(payment)
            await self._settle(event_id, payment_id)

    async def _settle(self, event_id: UUID, payment_id: UUID) -> None:
        """Settle the payment. Safe to retry after a lost connection."""
        await self.database.retry(
            lambda connection: repository.settle(connection, event_id, payment_id)
        )

    async def on_group_missing(self) -> None:
        """Republish every pending payment, unless it was declined."""
        await self.database.retry(repository.mark_all_due)

    async def on_poison(self, message: Message) -> None:
        """Stop republishing the payment."""
        try:
            _, payment_id = parse_ids(message)
        except PoisonError:
            return
        await self.database.retry(
            lambda connection: repository.stop_republishing(connection, payment_id)
        )


@contextlib.asynccontextmanager
async def run_consumer(settings: Settings, storage: Storage, health: Health) -> AsyncIterator[None]:
    """Charge payments during the block, then finish the charges in progress.

    A process that is not ready reads no events: others can handle them.
    """
    grace_seconds = settings.graceful_timeout_seconds - CLOSING_SECONDS
    republish = run_periodically(storage.database, REPUBLISH_SECONDS, republish_pending)
    async with open_gateway(settings) as gateway, background_task(republish):
        handler = ChargeHandler(storage.database, storage.redis, gateway)
        concurrency = settings.message_concurrency_per_worker
        consumer = StreamConsumer(handler, concurrency, health.is_ready)
        running = asyncio.create_task(consumer.run(grace_seconds))
        yield
        consumer.is_stopping = True
        await running


def main() -> None:
    """Consume until SIGTERM. Raises `SystemExit` for invalid settings."""
    settings = load_settings()
    logs.configure(settings)
    check_gateway(settings)
    process.run(settings, run_consumer)


if __name__ == "__main__":
    main()
