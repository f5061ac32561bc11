"""Lab 9: a prefetch of 10, and still one message at a time. What is concurrency?"""

import asyncio
import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import aio_pika
import asyncpg

from labs.computation import KIND, steps_for
from labs.picture import BAD, GOOD, GRAY, GRID, Axes, Picture
from labs.prefetching_consumer import PREFETCH, QUEUE
from labs.stage import Process, Stage, status, wait_until
from scripts.dev_rabbitmq import find_program, rabbitmq
from scripts.tune.advice import best_point

NUMBER = 9
TITLE = "prefetch 10, and one message at a time: what is concurrency?"
MESSAGES = 40
WAIT_SECONDS = 0.05
COMPUTE_SECONDS = 0.02
#: W and C: processes for computations, and messages at once.
PROCESSES = (1, 2, 4)
CONCURRENCY = (1, 8, 32)
#: The time of a point of the grid if nothing else runs, and its limit.
POINT_SECONDS = 1.2
LIMIT_SECONDS = 2.5
#: On a busy machine the last points are left out after this time.
GRID_SECONDS = 60.0
#: The best point handles at least this number of times the messages of the consumer. It is 5 if
#: nothing else runs. On a busy machine the CPUs are the limit of both.
LEAST_RATIO = 1.1
_TABLES = """
    create table lab_messages (
        number integer primary key,
        taken_at timestamptz,
        started_at timestamptz,
        finished_at timestamptz
    );
    create table lab_effects (job_id uuid not null);
"""
_ADD_MESSAGES = "insert into lab_messages select generate_series(1, $1)"
_COUNT_MESSAGES = "select count(finished_at) from lab_messages"
_MESSAGES = """
    select extract(epoch from taken_at)::float8 as taken,
        extract(epoch from started_at)::float8 as start,
        extract(epoch from finished_at)::float8 as end
    from lab_messages order by number
"""
_ADD_JOBS = "insert into jobs (type, payload) select $1, '{}' from generate_series(1, $2)"
_COUNT_JOBS = "select count(*) from jobs where type = $1 and status = 'succeeded'"
_JOBS = """
    select extract(epoch from started_at)::float8 as taken,
        extract(epoch from started_at)::float8 as start,
        extract(epoch from finished_at)::float8 as end
    from jobs where type = $1 and status = 'succeeded' order by started_at
"""


class Message(NamedTuple):
    """When a message was taken, and from when to when it was handled, in seconds."""

    taken: float
    start: float
    end: float


class Point(NamedTuple):
    """The messages that were handled by a number of processes, and of messages at once."""

    processes: int
    concurrency: int
    messages: list[Message]

    @property
    def jobs_per_second(self) -> float:
        """The messages per second."""
        start = min(message.start for message in self.messages)
        return len(self.messages) / (max(message.end for message in self.messages) - start)

    @property
    def settings(self) -> str:
        """The settings in words."""
        plural = "" if self.processes == 1 else "es"
        return f"{self.processes} process{plural} and {self.concurrency} at once"

    @property
    def p50_ms(self) -> float:
        """The median time from start to end."""
        return median(message.end - message.start for message in self.messages) * 1000

    @property
    def most_taken(self) -> int:
        """The most messages that were taken and not done."""
        return most_at_once([(message.taken, message.end) for message in self.messages])

    @property
    def most_handled(self) -> int:
        """The most messages that were handled at once."""
        return most_at_once([(message.start, message.end) for message in self.messages])


def most_at_once(spans: Sequence[tuple[float, float]]) -> int:
    """Return how many spans overlap at most."""
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


def run(stage: Stage) -> None:
    """Measure the consumer, then each point of the grid."""
    wait_ms = WAIT_SECONDS * 1000
    stage.say(f"Each message waits {wait_ms:.0f} ms for another service, then computes for")
    stage.say(f"{COMPUTE_SECONDS * 1000:.0f} ms. This machine has {os.cpu_count()} CPUs.\n")
    with broker(stage) as amqp_url:
        consumer, points = asyncio.run(measure_all(stage, amqp_url))
    best = best_point(points)
    stage.say(f"\nBest: {best.settings}.")
    stage.picture = draw(consumer, points, best)
    rate = best.jobs_per_second
    stage.claims.claim(
        f"with {best.settings}, the worker handled {rate:.0f} messages/s, "
        f"{rate / consumer.jobs_per_second:.1f} times as many",
        rate > LEAST_RATIO * consumer.jobs_per_second and best.most_handled > 1,
    )
    stage.claims.control(
        f"the consumer with a prefetch of {PREFETCH} had {consumer.most_taken} messages, and "
        f"handled {consumer.most_handled} at once, {consumer.jobs_per_second:.0f} messages/s",
        consumer.most_handled == 1 < consumer.most_taken,
    )


@contextlib.contextmanager
def broker(stage: Stage) -> Iterator[str]:
    """Yield the URL of a temporary RabbitMQ, or an empty text if Postgres hands out."""
    has_rabbitmq = find_program() is not None and os.environ.get("RABBITMQ") != "0"
    stage.say(f"{'RabbitMQ' if has_rabbitmq else 'Postgres'} hands out the messages.\n")
    if not has_rabbitmq:
        yield ""
        return
    with rabbitmq() as server:
        yield server.url


async def measure_all(stage: Stage, amqp_url: str) -> tuple[Point, list[Point]]:
    """Return the figures of the consumer, and those of the worker's points."""
    steps = str(steps_for(COMPUTE_SECONDS))
    own = {"AMQP_URL": amqp_url, "STEPS": steps, "WAIT_SECONDS": str(WAIT_SECONDS)}
    # Another lab may run: computations that yield would wait for it.
    own["JOB_YIELDS_CPU"] = "false"
    own["METRICS_BIND"] = f"127.0.0.1:{stage.watch(is_worker=True).metrics}"
    points = []
    database = await asyncpg.connect(stage.postgres.url)
    try:
        await database.execute(_TABLES)
        consumer = await measure_consumer(stage, database, own)
        stage.say(f"a consumer with prefetch {PREFETCH}: {figures(consumer)}\n")
        end = time.monotonic() + GRID_SECONDS
        for processes, concurrency in itertools.product(PROCESSES, CONCURRENCY):
            if time.monotonic() > end:
                stage.say("The rest is left out: this machine is busy.")
                break
            point = await measure_worker(stage, database, own, processes, concurrency)
            stage.say(f"{processes} x {concurrency:2} at once: {figures(point)}")
            points.append(point)
    finally:
        await database.close()
    return consumer, points


def figures(point: Point) -> str:
    """Return the figures of a line."""
    rate = f"{point.jobs_per_second:5.1f} messages/s"
    return f"{rate}, each takes {point.p50_ms:3.0f} ms, {point.most_handled:2} at once"


async def measure_consumer(stage: Stage, database: Any, own: Mapping[str, str]) -> Point:
    """Let labs/prefetching_consumer.py handle messages."""
    await database.execute(_ADD_MESSAGES, MESSAGES)
    if own["AMQP_URL"]:
        await publish(own["AMQP_URL"])
    command = (sys.executable, "-m", "labs.prefetching_consumer")
    process = stage.start(*command, variables=stage.variables(**own))
    await wait_until_done(database, process, MESSAGES, math.inf, _COUNT_MESSAGES)
    process.kill()
    return Point(1, 1, [Message(**row) for row in await database.fetch(_MESSAGES)])


async def publish(amqp_url: str) -> None:
    """Publish the numbers of the messages."""
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_queue(QUEUE, durable=True)
        for number in range(1, MESSAGES + 1):
            message = aio_pika.Message(str(number).encode())
            await channel.default_exchange.publish(message, QUEUE)


async def measure_worker(
    stage: Stage, database: Any, own: Mapping[str, str], processes: int, concurrency: int
) -> Point:
    """Let a worker with these settings handle messages, after a few that start its processes.

    Those that it cannot handle within the limit do not count.
    """
    settings = {"JOB_PROCESSES": str(processes), "JOB_CONCURRENCY": str(concurrency)}
    variables = stage.variables(**own, **settings)
    worker = stage.start(sys.executable, "-m", "labs.prefetch_worker", variables=variables)
    wait_until(lambda: is_ready(worker, own["METRICS_BIND"]), "the worker is ready")
    for number in (2 * processes, messages_for(processes, concurrency)):
        await database.execute("truncate jobs")
        await database.execute(_ADD_JOBS, KIND, number)
        await wait_until_done(database, worker, number, LIMIT_SECONDS, _COUNT_JOBS, KIND)
    worker.kill()
    messages = [Message(**row) for row in await database.fetch(_JOBS, KIND)]
    return Point(processes, concurrency, messages)


def is_ready(worker: Process, address: str) -> bool:
    """Return whether a worker is ready. Raises `LabError` if it has exited."""
    worker.check()
    return status(f"http://{address}/health/ready") == 200


def messages_for(processes: int, concurrency: int) -> int:
    """Return the messages of `POINT_SECONDS`: what is short, the places or the CPUs, decides."""
    by_places = concurrency / (WAIT_SECONDS + COMPUTE_SECONDS)
    by_cpus = min(processes, os.cpu_count() or 1) / COMPUTE_SECONDS
    return round(POINT_SECONDS * min(by_places, by_cpus))


async def wait_until_done(
    database: Any, process: Process, number: int, seconds: float, query: str, *values: str
) -> None:
    """Wait until messages are done: this number, or any after this time.

    Raises `LabError` if the process exits.
    """
    end = time.monotonic() + seconds
    done = 0
    while done < number and not (done and time.monotonic() > end):
        process.check()
        await asyncio.sleep(0.05)
        done = await database.fetchval(query, *values)


def draw(consumer: Point, points: list[Point], best: Point) -> Picture:
    """Draw the first messages of both, and the table."""
    picture = Picture(900, 560, "A prefetch of 10 is no concurrency")
    legend = [(GRAY, "sent ahead, waits in the consumer"), (BAD, "handled, one by one")]
    picture.legend(16, 56, [*legend, (GOOD, "handled")])
    end = max(message.end for message in consumer.messages)
    seconds = end - min(message.taken for message in consumer.messages)
    titles = (
        f"prefetch {PREFETCH}: {consumer.jobs_per_second:.0f} messages/s",
        f"{best.settings}: {best.jobs_per_second:.0f} messages/s",
    )
    for number, (title, point) in enumerate(zip(titles, (consumer, best), strict=True)):
        axes = Axes(
            picture,
            (60, 110 + number * 230, 500, 150),
            title=f"{title}; the first {MESSAGES}",
            x_label="seconds",
            x_end=seconds,
            y_end=MESSAGES,
        )
        draw_messages(axes, point.messages[:MESSAGES], GOOD if point is best else BAD)
    draw_table(picture, points, best)
    return picture


def draw_messages(axes: Axes, messages: list[Message], color: str) -> None:
    """Draw a bar for each message, the first one at the bottom."""
    first = min(message.taken for message in messages)
    for number, message in enumerate(messages):
        start = message.start - first
        axes.column(message.taken - first, start, number, number + 0.8, GRAY)
        axes.column(start, message.end - first, number, number + 0.8, color)


def draw_table(picture: Picture, points: list[Point], best: Point) -> None:
    """Write the messages per second of each point. The best one has a background."""
    left = 690
    top = 190
    picture.text(left - 80, top - 60, "Messages/s, time of each", size=14, is_bold=True)
    picture.text(left - 80, top - 20, "processes")
    for column, concurrency in enumerate(CONCURRENCY):
        label = f"{concurrency} at once"
        picture.text(left + 70 * column + 35, top - 20, label, anchor="middle", size=12)
    for row, processes in enumerate(PROCESSES):
        picture.text(left - 50, top + 60 * row + 28, str(processes), anchor="middle")
    for point in points:
        x = left + 70 * CONCURRENCY.index(point.concurrency)
        y = top + 60 * PROCESSES.index(point.processes)
        is_best = point is best
        if is_best:
            picture.box(x + 2, y, 66, 54, GRID)
        rate = f"{point.jobs_per_second:.0f}"
        picture.text(x + 35, y + 24, rate, size=16, anchor="middle", is_bold=is_best)
        picture.text(x + 35, y + 44, f"{point.p50_ms:.0f} ms", size=12, anchor="middle")
