"""`python -m app.payments.consumer` charges what was taken: a second process of the same image, with its own probes."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from uuid import UUID

from redis.asyncio import Redis

from app import process
from app.patterns import inbox
from app.patterns.cache_aside import Cache
from app.patterns.circuit_breaker import CircuitBreaker, CircuitOpenError
from app.patterns.http_client import UpstreamClient, UpstreamError
from app.patterns.periodic import run_periodically
from app.patterns.stream_consumer import StreamConsumer
from app.patterns.stream_group import Message, StreamGroup
from app.patterns.stream_handler import PoisonError, RetryLaterError, StreamHandler
from app.payments import repository
from app.payments.schemas import Payment
from app.payments.service import CACHE, CREATED, STREAM, publish_created
from app.settings import Settings, fail, load_settings
from app.storage import Storage
from app.storage.postgres import Connection, Database
from app.tasks import background_task
from app.telemetry import logs
from app.telemetry.context import request_context

FAILURES, REPUBLISH_SECONDS, CLOSING_SECONDS, MAX_REMEMBERED = 5, 5, 5, 10_000
#: What a gateway answers to a payment that it will never charge; any other 4xx may be a fault of ours, to be mended.
REFUSALS = {402, 422}


class ChargeHandler(StreamHandler):
    """ChargeHandler each payment once, and settles it."""

    def __init__(self, database: Database, redis: Redis, gateway: UpstreamClient) -> None:
        super().__init__(StreamGroup(redis, STREAM, "charges"))
        self.database, self.cache, self.gateway = database, Cache(redis, CACHE), gateway
        self.charged_at = 0.0
        self.failed_at: dict[UUID, float] = {}

    async def handle(self, message: Message) -> None:
        """Charge the payment of an event, then settle it with a note in the inbox, then forget it in the cache."""
        event_id, payment_id = _ids(message)
        if message.fields.get(b"type") != CREATED.encode():
            return  # it asks for no charge
        found = await self.database.retry(lambda connection: repository.get(connection, payment_id))
        if found is None:
            raise PoisonError("there is no such payment")
        payment, request_id = found
        request_context.set({"request_id": request_id})
        if payment.status == "pending":
            await self._charge(payment)  # in no transaction: it may take seconds
            async with self.database.acquire() as connection, connection.transaction():
                if await inbox.claim(connection, event_id):
                    await repository.settle(connection, payment_id)
        if not await self.cache.delete(str(payment_id)):
            raise RetryLaterError

    async def _charge(self, payment: Payment) -> None:
        """Have the gateway charge a payment. The key makes it do so once, however often it is asked."""
        headers = {"Idempotency-Key": str(payment.payment_id), "Content-Type": "application/json"}
        try:
            status, _ = await self.gateway.request(
                "POST", "charges", headers, content=payment.model_dump_json()
            )
        except CircuitOpenError as error:
            await asyncio.sleep(error.retry_in)  # nobody else would get through
            raise RetryLaterError from error
        except UpstreamError as error:
            self._blame(payment.payment_id, error)
            raise
        if status in REFUSALS:
            raise PoisonError(f"the gateway refuses it: {status}")
        if not 200 <= status < 300:
            if (
                time.monotonic() - self.charged_at > self.gateway.breaker.reset_seconds
            ):  # it may fail for all
                await asyncio.sleep(
                    self.gateway.breaker.reset_seconds
                )  # the breaker takes it for an answer
            self._blame(payment.payment_id, fault := UpstreamError("gateway", status))
            raise fault
        self.charged_at = time.monotonic()
        self.failed_at.pop(payment.payment_id, None)

    def _blame(self, payment_id: UUID, error: UpstreamError) -> None:
        """Raise `RetryLaterError` unless others were charged since this one failed before: then the fault is its own."""
        if len(self.failed_at) > MAX_REMEMBERED:
            self.failed_at.clear()  # another consumer may have charged them
        before = self.failed_at.get(payment_id, time.monotonic())
        self.failed_at[payment_id] = time.monotonic()
        if self.charged_at < before:
            raise RetryLaterError from error

    async def on_group_created(self) -> None:
        """Have every pending payment announced again that is not given up."""
        await self.database.retry(repository.mark_all_due)

    async def on_dead_letter(self, message: Message) -> None:
        """Have the payment never announced again."""
        with contextlib.suppress(PoisonError):
            _, payment_id = _ids(message)
            await self.database.retry(
                lambda connection: repository.stop_republishing(connection, payment_id)
            )


async def republish_pending(connection: Connection, limit: int) -> int:
    """Announce again what is pending for long, since its event may be lost with Redis' memory; return how many."""
    due = await repository.claim_due(connection, limit)
    for payment in due:
        await publish_created(connection, payment)
    return len(due)


def _ids(message: Message) -> tuple[UUID, UUID]:
    try:
        payload = json.loads(message.fields[b"payload"])
        return UUID(message.fields[b"event_id"].decode()), UUID(payload["payment_id"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PoisonError("it is no event of a payment") from None


@contextlib.asynccontextmanager
async def run_consumer(settings: Settings, storage: Storage) -> AsyncIterator[None]:
    """Charge payments from here to the end of the block, then finish what is under way."""
    concurrency = settings.message_concurrency_per_worker
    gateway = UpstreamClient(
        "gateway",
        settings.gateway_url,
        CircuitBreaker("gateway", max(FAILURES, concurrency)),
        concurrency,
    )
    async with contextlib.aclosing(gateway.http):
        consumer = StreamConsumer(
            ChargeHandler(storage.database, storage.redis, gateway), concurrency
        )
        async with background_task(
            run_periodically(storage.database, REPUBLISH_SECONDS, republish_pending)
        ):
            running = asyncio.create_task(
                consumer.run(settings.graceful_timeout_seconds - CLOSING_SECONDS)
            )
            yield
            consumer.is_stopping = True
            await running


def main() -> None:
    """Consume until SIGTERM. Raises `SystemExit` for settings that are wrong."""
    settings = load_settings()
    logs.configure(settings)
    if settings.environment != "development" and settings.gateway_url.startswith("http://"):
        fail(
            "GATEWAY_URL",
            settings.gateway_url,
            "must be https:// unless ENVIRONMENT is development",
        )
    process.run(settings, run_consumer)


if __name__ == "__main__":
    main()
