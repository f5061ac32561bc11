"""Hands out jobs by Postgres alone: each worker claims jobs that are due.

`for update skip locked` gives each job to one worker, any number of which may ask. A worker claims
as many jobs as it has free places, in one statement. It asks at once while there are more, else
every 100 ms: LISTEN would need a session, which PgBouncer does not give.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Self
from uuid import UUID

from app.jobs import starts
from app.jobs.dispatcher import Receive
from app.jobs.starts import Job
from app.storage.postgres import Connection, Database
from app.tasks import StateLog, describe

#: Pause after a look that has found too few jobs, and after one that has failed.
POLL_SECONDS = 0.1
FAILURE_SECONDS = 1.0
#: Pause between looks for jobs whose workers have died.
EXPIRED_SECONDS = 1.0
logger = logging.getLogger("app.jobs")


class PostgresDelivery:
    """A job that is claimed already, or one whose lease has expired."""

    def __init__(self, job_id: UUID, job: Job | None, free: Callable[[], None]) -> None:
        """`free` frees the place."""
        self.job_id = job_id
        self.job = job
        self.free = free
        self.is_settled = False

    async def claim(self, _: Connection) -> Job | None:
        """Return None: what is due was started when it was claimed."""
        return None

    async def is_suspect(self, _: Connection) -> bool:
        """Return True: its lease has expired."""
        return True

    async def claim_expired(self, connection: Connection) -> Job | None:
        """Start the job, unless another worker has."""
        return await starts.claim_expired(connection, self.job_id)

    async def settle(self) -> None:
        """Free the place."""
        self.is_settled = True
        self.free()

    async def discard(self) -> None:
        """Free the place: the job was deleted."""
        await self.settle()


class PostgresDispatcher:
    """Claims jobs that are due, for the free places of this worker."""

    def __init__(self, database: Database, concurrency: int) -> None:
        self.database = database
        self.free_places = concurrency
        self.is_stopping = False
        self.stopping = asyncio.Event()
        #: Set when a place becomes free, and at shutdown.
        self.change = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        #: The time of the next look for expired leases, by `time.monotonic()`.
        self.look_at = 0.0
        self.state = StateLog(logger, "jobs cannot be claimed", "jobs are claimed again")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def checks(self) -> Mapping[str, Callable[[], Awaitable[object]]]:
        """No check: only Postgres is needed."""
        return {}

    async def start(self, receive: Receive) -> None:
        """Begin to hand out jobs, in the background."""
        self.task = asyncio.create_task(self._hand_out(receive))

    async def stop(self) -> None:
        """Hand out no more jobs. Those of a claim in progress are handed out before."""
        self.is_stopping = True
        self.stopping.set()
        self.change.set()
        if self.task is not None:
            await asyncio.wait([self.task])

    async def _hand_out(self, receive: Receive) -> None:
        while not self.is_stopping:
            try:
                if time.monotonic() >= self.look_at:
                    self.look_at = time.monotonic() + EXPIRED_SECONDS
                    await self._hand_out_expired(receive)
                is_empty = await self._hand_out_due(receive)
                self.state.succeeded()
                pause = POLL_SECONDS if is_empty else 0
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                self.state.failed(describe(error))
                # After an outage, each worker renews its leases first.
                self.look_at = time.monotonic() + starts.RENEW_SECONDS
                pause = FAILURE_SECONDS
            await self._sleep(pause)

    async def _hand_out_due(self, receive: Receive) -> bool:
        """Fill the free places. Return whether there were too few jobs for them."""
        while self.free_places <= 0 and not self.is_stopping:
            await self._next_change()
        wanted = self.free_places
        if self.is_stopping:
            return True
        async with self.database.acquire() as connection:
            jobs = await starts.claim_due(connection, wanted)
        for job in jobs:
            receive(self._take_place(job.job_id, job))
        return len(jobs) < wanted

    async def _hand_out_expired(self, receive: Receive) -> None:
        """Hand out jobs with expired leases, one after another, and nothing else meanwhile.

        The runner lets each run alone. Jobs that were claimed now would wait for that as started
        ones: if the worker dies again, those starts would count.
        """
        while not self.is_stopping:
            async with self.database.acquire() as connection:
                job_id = await starts.find_expired(connection)
            if job_id is None:
                return
            delivery = self._take_place(job_id, None)
            receive(delivery)
            while not delivery.is_settled and not self.is_stopping:
                await self._next_change()

    def _take_place(self, job_id: UUID, job: Job | None) -> PostgresDelivery:
        self.free_places -= 1
        return PostgresDelivery(job_id, job, self._free_place)

    def _free_place(self) -> None:
        self.free_places += 1
        self.change.set()

    async def _next_change(self) -> None:
        """Wait until a place becomes free, or for the shutdown."""
        self.change.clear()
        await self.change.wait()

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not longer than until the shutdown."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
