"""Lab 8: three accidents, and one safeguard removed at a time. What is paid twice?"""

import asyncio
import sys
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import httpx
import redis

from app.patterns import inbox
from labs.events import Event, store_payments
from labs.picture import BAD, GOOD, Picture, bars
from labs.stage import Process, Stage, wait_until
from scripts.fake_gateway import FakeGateway, run_gateway

NUMBER = 8
TITLE = "paid twice: one safeguard removed at a time"
ORDERS = 8
#: The gateway charges, and its response is late: the consumer is killed meanwhile.
LATE_SECONDS = 60.0
_COUNT = "select count(*) from payments where reference like $1"
_BOOK = "update points set total = total + 1"


class Result(NamedTuple):
    """An accident with the safeguard, and without it."""

    accident: str
    safeguard: str
    #: What is counted: payments, charges, bookings.
    counted: str
    with_it: int
    without_it: int


def run(stage: Stage) -> None:
    """Let each accident happen with its safeguard, and without it."""
    stage.say(f"{ORDERS} orders. Each must be paid once, whatever happens.\n")
    killed = kill_consumers(stage)
    lost = lose_responses(stage)
    repeated = asyncio.run(deliver_twice(stage))
    results = [lost, killed, repeated]
    for result in results:
        report(stage, result)
    stage.picture = draw(results)


def report(stage: Stage, result: Result) -> None:
    """Print a result; claim that the safeguard works, and that it is needed."""
    stage.say(result.accident)
    stage.say(f"    with {result.safeguard}: {result.with_it} {result.counted}")
    stage.say(f"    without: {result.without_it} {result.counted}")
    stage.claims.claim(
        f"with {result.safeguard}: {result.with_it} {result.counted} for {ORDERS} orders",
        result.with_it == ORDERS,
    )
    stage.claims.control(
        f"without {result.safeguard}: {result.without_it} {result.counted}",
        result.without_it == 2 * ORDERS,
    )


def lose_responses(stage: Stage) -> Result:
    """Each client loses the response to its order, and sends the order again."""
    service = stage.serve(ports=stage.watch())
    service.wait_until_ready()
    with httpx.Client(base_url=service.url, timeout=30, trust_env=False) as client:
        for number in range(ORDERS):
            for attempt in ("first", "second"):
                order(client, f"same-{number}", f"same-{number}")
                order(client, f"other-{number}", f"{attempt}-{number}")
    return Result(
        "The response is lost, so the client sends the order again.",
        "Idempotency-Key",
        "payments",
        asyncio.run(count_payments(stage.postgres.url, "same-%")),
        asyncio.run(count_payments(stage.postgres.url, "other-%")),
    )


def order(client: httpx.Client, reference: str, key: str) -> None:
    """Send an order, and ignore the response. Raises `httpx.HTTPError`."""
    body = {"amount": 1250, "currency": "EUR", "reference": reference}
    response = client.post("/payments", json=body, headers={"Idempotency-Key": key})
    response.raise_for_status()


async def count_payments(database_url: str, references: str) -> int:
    """Return the number of payments with references of this kind."""
    connection = await asyncpg.connect(database_url)
    try:
        return int(await connection.fetchval(_COUNT, references))
    finally:
        await connection.close()


def kill_consumers(stage: Stage) -> Result:
    """Kill a consumer after the gateway has charged, before it knows."""
    with run_gateway() as with_keys, run_gateway() as without_keys:
        without_keys.honors_keys = False
        gateways = {"with": with_keys, "without": without_keys}
        for gateway in gateways.values():
            gateway.delay_seconds = LATE_SECONDS
        consumers = [start(stage, gateway, prefix) for prefix, gateway in gateways.items()]
        for prefix in gateways:
            publish(stage, prefix, asyncio.run(store_payments(stage.postgres.url, ORDERS)))
        for gateway, consumer in zip(gateways.values(), consumers, strict=True):
            wait_for_calls(gateway, consumer, 1)
            consumer.kill()
            gateway.delay_seconds = 0
        # The messages in progress are delivered again to the next consumer.
        consumers = [start(stage, gateway, prefix) for prefix, gateway in gateways.items()]
        for gateway, consumer in zip(gateways.values(), consumers, strict=True):
            wait_for_calls(gateway, consumer, 2)
            consumer.kill()
        charges = [sum(gateway.charges.values()) for gateway in gateways.values()]
    return Result(
        "The consumer is killed after the charge, before it notes that.",
        "the key for the gateway",
        "charges",
        *charges,
    )


def start(stage: Stage, gateway: FakeGateway, prefix: str) -> Process:
    """Start a consumer that handles all orders at once."""
    variables = stage.variables(
        GATEWAY_URL=gateway.url, REDIS_KEY_PREFIX=prefix, MESSAGE_CONCURRENCY_PER_WORKER=str(ORDERS)
    )
    return stage.start(sys.executable, "-m", "app.payments.consumer", variables=variables)


def publish(stage: Stage, prefix: str, events: list[Event]) -> None:
    """Add events to the stream of a consumer."""
    client: Any = redis.Redis.from_url(stage.redis_url)
    for event in events:
        client.xadd(f"{prefix}:payment-events", event)


def wait_for_calls(gateway: FakeGateway, consumer: Process, number: int) -> None:
    """Wait until the consumer has called the gateway this number of times for each order."""

    def is_called() -> bool:
        consumer.check()
        calls = list(gateway.calls.values())
        return len(calls) == ORDERS and min(calls) >= number

    wait_until(is_called, f"{ORDERS} orders reach the gateway {number} times", 40)


async def deliver_twice(stage: Stage) -> Result:
    """Deliver each event twice to a handler that books a point for each payment."""
    events = await store_payments(stage.postgres.url, ORDERS)
    connection: Any = await asyncpg.connect(stage.postgres.url)
    totals = []
    try:
        for has_inbox in (True, False):
            await connection.execute("create temporary table points as select 0 as total")
            for event in [*events, *events]:
                await book(connection, event, has_inbox)
            totals.append(await connection.fetchval("select total from points"))
            await connection.execute("drop table points")
    finally:
        await connection.close()
    return Result(
        "The relay of the outbox crashes after sending: each event comes twice.",
        "the inbox",
        "bookings",
        *totals,
    )


async def book(connection: Any, event: Event, has_inbox: bool) -> None:
    """Book a point for a payment. The inbox and the booking are committed together."""
    async with connection.transaction():
        if not has_inbox or await inbox.claim(connection, UUID(event["event_id"])):
            await connection.execute(_BOOK)


def draw(results: list[Result]) -> Picture:
    """Draw what was counted, with and without each safeguard."""
    picture = Picture(900, 400, f"{ORDERS} orders, and one safeguard removed at a time")
    rows = []
    for result in results:
        for name, number, color in (
            (f"with {result.safeguard}", result.with_it, GOOD),
            ("without", result.without_it, BAD),
        ):
            rows.append((name, number, color, f"{number} {result.counted}"))
    bars(picture, (200, 50, 560, 330), rows)
    return picture
