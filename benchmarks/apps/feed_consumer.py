"""Feed a consumer of payments: `python -m feed_consumer PREFIX PID NUMBER`, in the service.

Stores payments, adds their events to the stream of this prefix, waits until all are settled, and
prints the seconds and the CPU seconds of the process as JSON.
"""

import asyncio
import json
import os
import sys
import time
from uuid import UUID, uuid4, uuid5

import asyncpg
import psutil
from app.payments.events import CREATED, STREAM
from redis import Redis

INSERT = """
    insert into payments (payment_id, amount, currency, reference, request_id)
    select unnest($1::uuid[]), 1250, 'EUR', 'order-1', 'bench'
"""
SETTLED = """
    select count(*) from payments where payment_id = any($1::uuid[]) and status = 'settled'
"""
POLL_SECONDS = 0.02
LIMIT_SECONDS = 60


def publish(redis: Redis, stream: str, payment_ids: list[UUID]) -> None:
    """Add the events of payments to the stream."""
    pipeline = redis.pipeline(transaction=False)
    for payment_id in payment_ids:
        event = {
            "event_id": str(uuid5(payment_id, CREATED)),
            "type": CREATED,
            "payload": json.dumps({"payment_id": str(payment_id)}),
        }
        pipeline.xadd(stream, event)
    pipeline.execute()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process so far."""
    times = process.cpu_times()
    return times.user + times.system


async def feed(prefix: str, consumer: psutil.Process, number: int) -> dict[str, float]:
    """Have a number of payments settled; return the seconds and the CPU seconds of it."""
    payment_ids = [uuid4() for _ in range(number)]
    database = await asyncpg.connect(os.environ["DATABASE_URL"])
    await database.execute(INSERT, payment_ids)
    cpu_before = cpu_seconds(consumer)
    start = time.perf_counter()
    with Redis.from_url(os.environ["REDIS_URL"]) as redis:
        publish(redis, f"{prefix}:{STREAM}", payment_ids)
    async with asyncio.timeout(LIMIT_SECONDS):
        while await database.fetchval(SETTLED, payment_ids) < number:
            await asyncio.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - start
    cpu = cpu_seconds(consumer) - cpu_before
    await database.close()
    return {"seconds": seconds, "cpu_seconds": cpu}


def main() -> None:
    """Feed the consumer, and print the figures."""
    prefix, pid, number = sys.argv[1:]
    figures = asyncio.run(feed(prefix, psutil.Process(int(pid)), int(number)))
    sys.stdout.write(f"{json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
