"""Lab 7: two of 200 messages can never be handled. What becomes of the others?"""

import asyncio
import sys
import time
from typing import Any, NamedTuple

import redis

from labs.events import payment_id, store_payments
from labs.picture import BAD, GOOD, GRAY, WHITE, Axes, Picture
from labs.stage import Process, Stage, wait_until
from scripts.fake_gateway import FakeGateway, run_gateway

NUMBER = 7
TITLE = "the poison message: what becomes of the others?"
MESSAGES = 200
GOOD_MESSAGES = MESSAGES - 2
#: The number of the event that is cut off, and of the payment that the gateway declines.
CUT_OFF = 40
DECLINED = 80
DECLINED_STATUS = 422
GATEWAY_SECONDS = 0.01
LIMIT_SECONDS = 45.0
SAMPLE_SECONDS = 0.1
#: The naive consumer is watched for this time after the other one is done.
EXTRA_SECONDS = 2.0


class Consumer(NamedTuple):
    """A consumer, with a stream and a gateway of its own."""

    name: str
    prefix: str
    gateway: FakeGateway
    #: The number of charged payments over time.
    samples: list[tuple[float, float]]

    @property
    def stream(self) -> str:
        """The name of the stream in Redis."""
        return f"{self.prefix}:payment-events"

    @property
    def charged(self) -> int:
        """The payments that were charged so far."""
        return len(self.gateway.charged_keys)


def run(stage: Stage) -> None:
    """Let both consumers handle the same messages."""
    stage.say(f"{MESSAGES} payments to charge. The event of payment {CUT_OFF} is cut off, and the")
    stage.say(f"gateway declines payment {DECLINED}.\n")
    client: Any = redis.Redis.from_url(stage.redis_url)
    with run_gateway() as first, run_gateway() as second:
        naive = Consumer("the naive consumer", "naive", first, [])
        this = Consumer("this template's consumer", "this", second, [])
        processes = [start_naive(stage, naive), start_this(stage, this)]
        wait_until_reading(client, [naive, this], processes)
        for consumer in (naive, this):
            publish(stage, client, consumer)
        watch([naive, this], processes)
        dead = client.xrange(f"{this.stream}.dead")
    report(stage, [naive, this], dead)
    stage.picture = draw([naive, this])
    stage.claims.claim(
        f"this consumer charged {this.charged} of {GOOD_MESSAGES} good payments, "
        f"and dead-lettered {len(dead)} messages",
        this.charged == GOOD_MESSAGES and len(dead) == 2,
    )
    stage.claims.control(
        f"the naive consumer stopped after {naive.charged}", naive.charged == CUT_OFF - 1
    )


def start_naive(stage: Stage, consumer: Consumer) -> Process:
    """Start labs/naive_consumer.py."""
    variables = stage.variables(GATEWAY_URL=consumer.gateway.url) | {"STREAM": consumer.stream}
    return stage.start(sys.executable, "-m", "labs.naive_consumer", variables=variables)


def start_this(stage: Stage, consumer: Consumer) -> Process:
    """Start the consumer of this template: one message at a time, like the other."""
    variables = stage.variables(
        GATEWAY_URL=consumer.gateway.url,
        REDIS_KEY_PREFIX=consumer.prefix,
        MESSAGE_CONCURRENCY_PER_WORKER="1",
        METRICS_BIND=f"127.0.0.1:{stage.watch(is_worker=True).metrics}",
    )
    return stage.start(sys.executable, "-m", "app.payments.consumer", variables=variables)


def wait_until_reading(client: Any, consumers: list[Consumer], processes: list[Process]) -> None:
    """Wait until both consumers have created their groups. Raises `LabError` if one exits."""

    def are_reading() -> bool:
        for process in processes:
            process.check()
        return all(client.exists(consumer.stream) for consumer in consumers)

    wait_until(are_reading, "both consumers read")


def publish(stage: Stage, client: Any, consumer: Consumer) -> None:
    """Store the payments, and add their events to the stream of a consumer."""
    events = asyncio.run(store_payments(stage.postgres.url, MESSAGES))
    consumer.gateway.delay_seconds = GATEWAY_SECONDS
    consumer.gateway.status_by_key[payment_id(events[DECLINED - 1])] = DECLINED_STATUS
    events[CUT_OFF - 1]["payload"] = events[CUT_OFF - 1]["payload"][:30]
    with client.pipeline() as pipeline:
        for event in events:
            pipeline.xadd(consumer.stream, event)
        pipeline.execute()


def watch(consumers: list[Consumer], processes: list[Process]) -> None:
    """Count charged payments, until one consumer has charged all, and a bit longer."""
    start = time.monotonic()
    end = start + LIMIT_SECONDS
    while time.monotonic() < end:
        for process in processes:
            process.check()
        for consumer in consumers:
            consumer.samples.append((time.monotonic() - start, consumer.charged))
        if max(consumer.charged for consumer in consumers) >= GOOD_MESSAGES:
            end = min(end, time.monotonic() + EXTRA_SECONDS)
        time.sleep(SAMPLE_SECONDS)


def report(stage: Stage, consumers: list[Consumer], dead: list[Any]) -> None:
    """Print what was charged, and the dead letters."""
    for consumer in consumers:
        stage.say(f"{consumer.name}: {consumer.charged} of {GOOD_MESSAGES} good payments charged")
    stage.say("\nThe dead letters of this template's consumer, for a person to look at:")
    for _, fields in dead:
        stage.say(f"    {fields[b'payload'].decode()[:28]}...  {fields[b'reason'].decode()}")


def draw(consumers: list[Consumer]) -> Picture:
    """Draw the charged payments over time."""
    picture = Picture(900, 420, "Two messages that can never be handled")
    colors = [BAD, GOOD]
    names = [consumer.name for consumer in consumers]
    picture.legend(16, 56, list(zip(colors, names, strict=True)))
    axes = Axes(
        picture,
        (60, 110, 810, 250),
        title=f"charged payments, of {MESSAGES}",
        x_label="seconds",
        x_end=max(consumer.samples[-1][0] for consumer in consumers),
        y_end=MESSAGES,
    )
    for number, label in ((CUT_OFF, "cut off"), (DECLINED, "declined")):
        y = axes.y(number)
        picture.line([(60, y), (870, y)], GRAY, 1, is_dashed=True)
        picture.box(720, y - 17, 150, 15, WHITE)  # no grid line through the text
        picture.text(866, y - 5, f"payment {number}: {label}", size=12, anchor="end")
    for color, consumer in zip(colors, consumers, strict=True):
        axes.line(consumer.samples, color, 3)
    return picture
