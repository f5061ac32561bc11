"""The protocol of the two dispatchers: they hand out jobs, and the row decides.

A dispatcher delivers the ID of a job to the runner (`app/jobs/runner.py`), at most
`JOB_CONCURRENCY` at once. For each delivery the runner does this:

1. `claim`: start the job in its row, if it is queued. Most are: that is one statement.
2. `is_suspect`: else, may it have killed its worker? Then `claim_expired`, and nothing else runs
   meanwhile. If not, there is nothing to do.
3. Call the handler, and store in the row what happens next.
4. `settle`: the row is up to date, whatever became of the job. Or `discard`: there is no such row.

While Postgres is unavailable, the runner repeats a step until it succeeds. It settles no delivery
whose worker shuts down: it releases the job in the row, and the dispatcher hands it out elsewhere.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol
from uuid import UUID

from app.jobs.starts import Job
from app.storage.postgres import Connection


class Delivery(Protocol):
    """One job, handed out to this worker. It has a place until it is settled or discarded."""

    @property
    def job_id(self) -> UUID:
        """The ID of the job."""

    @property
    def job(self) -> Job | None:
        """The job, if the dispatcher has started it: then the first step is left out."""

    async def claim(self, connection: Connection) -> Job | None:
        """Start the job if it is queued.

        It is repeated if the connection is lost, when the first one may have succeeded.
        """

    async def is_suspect(self, connection: Connection) -> bool:
        """Return whether a start of the job has not ended: it may have killed its worker.

        Its lease has expired.
        """

    async def claim_expired(self, connection: Connection) -> Job | None:
        """Start a suspect, unless it has ended or another worker has started it."""

    async def settle(self) -> None:
        """Free the place. By RabbitMQ: acknowledge the message."""

    async def discard(self) -> None:
        """Free the place of a job that has no row. By RabbitMQ: dead-letter the message."""


#: Called for each delivery. It returns at once; the work is done in a task.
Receive = Callable[[Delivery], None]


class Dispatcher(AbstractAsyncContextManager["Dispatcher"], Protocol):
    """Hands out jobs to this worker.

    Entering it connects, or begins to: it waits for no server. Leaving it closes the connections,
    after which what was not settled is handed out to others.
    """

    @property
    def checks(self) -> Mapping[str, Callable[[], Awaitable[object]]]:
        """The readiness checks, such as `{"rabbitmq": ...}`; that of Postgres is not among them."""

    async def start(self, receive: Receive) -> None:
        """Begin to hand out jobs, in the background."""

    async def stop(self) -> None:
        """Hand out no more jobs. Those that are under way keep their places."""
