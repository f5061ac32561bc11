"""Lab 5: a migration locks a table, and the pool of connections is empty. How long do you wait?"""

import asyncio
import os
import time
from collections import Counter
from typing import Any, NamedTuple

import asyncpg

from labs.picture import BAD, GOOD, ORANGE, Axes, Picture
from labs.requests import get_status
from labs.stage import Instance, Stage

NUMBER = 5
TITLE = "the pool of connections is empty: how long do requests wait?"
REQUESTS_PER_SECOND = 20
#: The lock begins and ends, in seconds since the first request; requests are sent until the end.
LOCK_SECONDS = 2.0
UNLOCK_SECONDS = 14.0
END_SECONDS = 16.0
#: DATABASE_ACQUIRE_TIMEOUT_SECONDS, DATABASE_COMMAND_TIMEOUT_SECONDS, and time for a busy machine.
LONGEST_SECONDS = 1.0 + 5.0 + 3.0
#: A request that waits for most of the lock.
ENDLESS_SECONDS = 10.0
#: The settings of the pool.
CHANGEABLE = (
    "DATABASE_MAX_CONNECTIONS",
    "DATABASE_ACQUIRE_TIMEOUT_SECONDS",
    "DATABASE_COMMAND_TIMEOUT_SECONDS",
)


class Sent(NamedTuple):
    """A request: when it was sent, how long it waited, and the status."""

    at: float
    seconds: float
    status: int


class Service(NamedTuple):
    """A service under load, and the outcome of its requests."""

    name: str
    port: int
    requests: list[Sent]

    @property
    def longest(self) -> float:
        """The longest wait."""
        return max(each.seconds for each in self.requests)

    def waiting(self, at: float) -> int:
        """Return how many requests wait at a time."""
        return sum(each.at <= at < each.at + each.seconds for each in self.requests)

    @property
    def most_waiting(self) -> int:
        """The most requests that wait at once."""
        return max(self.waiting(each.at) for each in self.requests)


def run(stage: Stage) -> None:
    """Send the same requests to both services, while a table is locked."""
    seconds = UNLOCK_SECONDS - LOCK_SECONDS
    stage.say(f"{REQUESTS_PER_SECOND} requests/s to each of two services, with one database.")
    stage.say(f"A migration locks the table `payments` for {seconds:g} s.\n")
    usual = Service("the usual pool", start_usual(stage).port, [])
    this = Service("this template's pool", start_this(stage).port, [])
    asyncio.run(under_load(stage.postgres.url, [usual, this]))
    for service in (usual, this):
        report(stage, service)
    stage.picture = draw([usual, this])
    stage.claims.claim(
        f"this pool: no request waited longer than {this.longest:.1f} s, "
        f"and {this.most_waiting} waited at once at most",
        this.longest < LONGEST_SECONDS and this.most_waiting < usual.most_waiting / 2,
    )
    stage.claims.control(
        f"the usual pool: a request waited for {usual.longest:.1f} s, "
        f"and {usual.most_waiting} waited at once",
        usual.longest > ENDLESS_SECONDS,
    )


def start_this(stage: Stage) -> Instance:
    """Start the service: one worker, which has 7 connections for requests.

    Settings of the environment are for readers that want to break it.
    """
    own = {name: os.environ[name] for name in CHANGEABLE if os.environ.get(name)}
    settings: dict[str, Any] = {"DATABASE_MAX_CONNECTIONS": "8", **own}
    instance = stage.serve(ports=stage.watch(), **settings)
    instance.wait_until_ready()
    return instance


def start_usual(stage: Stage) -> Instance:
    """Start a service with the usual pool, of the same size."""
    instance = stage.serve("labs.usual_pool:app", options="--config python:labs.usual")
    instance.wait_until_ready()
    return instance


async def under_load(database_url: str, services: list[Service]) -> None:
    """Send requests at a constant rate; lock the table for a part of the time."""
    start = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lock_table(database_url, start))
        for number in range(int(END_SECONDS * REQUESTS_PER_SECOND)):
            await asyncio.sleep(start + number / REQUESTS_PER_SECOND - time.monotonic())
            for service in services:
                tasks.create_task(send(service, start))


async def send(service: Service, start: float) -> None:
    """Send a request, and note its outcome."""
    at = time.monotonic()
    status = await get_status(service.port, "/payments")
    service.requests.append(Sent(at - start, time.monotonic() - at, status))


async def lock_table(database_url: str, start: float) -> None:
    """Lock the table as `alter table` does: nobody can read it."""
    await asyncio.sleep(start + LOCK_SECONDS - time.monotonic())
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            await connection.execute("lock table payments in access exclusive mode")
            await asyncio.sleep(start + UNLOCK_SECONDS - time.monotonic())
    finally:
        await connection.close()


def report(stage: Stage, service: Service) -> None:
    """Print what happened."""
    statuses = Counter(each.status for each in service.requests)
    counts = ", ".join(f"{number} x {status}" for status, number in sorted(statuses.items()))
    stage.say(f"{service.name}: {counts}")
    stage.say(f"    longest wait {service.longest:.1f} s")
    stage.say(f"    {service.most_waiting} requests waited at once")


def draw(services: list[Service]) -> Picture:
    """Draw each request: when it was sent, and how long it waited."""
    picture = Picture(900, 640, "A table is locked, and the pool of connections is empty")
    entries = [(GOOD, "200, within 1 s"), (BAD, "200, after more than 1 s"), (ORANGE, "503")]
    picture.legend(16, 56, entries)
    for number, service in enumerate(services):
        axes = Axes(
            picture,
            (60, 110 + number * 270, 810, 170),
            title=f"{service.name}: seconds that each request waited",
            x_label="sent at, in seconds",
            x_end=END_SECONDS,
            y_end=UNLOCK_SECONDS,
        )
        for sent in service.requests:
            picture.dot(axes.x(sent.at), axes.y(sent.seconds), 3, color(sent))
        axes.mark(LOCK_SECONDS, "table locked")
        axes.mark(UNLOCK_SECONDS, "unlocked")
    return picture


def color(sent: Sent) -> str:
    """Return the color of a request."""
    if sent.status != 200:
        return ORANGE
    return GOOD if sent.seconds < 1 else BAD
