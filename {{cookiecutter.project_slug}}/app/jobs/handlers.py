"""Handlers: the functions that do jobs, by type. A feature adds its own.

@handlers.add("report.wanted", Wanted, attempts=5, timeout_seconds=60)
async def report(run: Run, wanted: Wanted) -> None:
    text = await run.processes.run(render, wanted.report_id)
    async with run.done() as connection:
        await repository.store(connection, wanted.report_id, text)
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from app.jobs import starts
from app.jobs.starts import Job
from app.process_pool.pool import ProcessPool
from app.storage.postgres import Connection, Database

#: The longest delay of `LaterError`: a year.
MAX_LATER_SECONDS = 366 * 86400.0
Payload = TypeVar("Payload", bound=BaseModel)


class PoisonError(Exception):
    """This job can never succeed: it fails at once. The message is stored with it."""


class LaterError(Exception):
    """The job must wait, through no fault of its own: the start does not count.

    Raises `ValueError` if `seconds` is not between 0 and a year.
    """

    def __init__(self, reason: str, seconds: float = 10.0) -> None:
        super().__init__(reason)
        # Not a number is not between them either.
        if not 0 <= seconds <= MAX_LATER_SECONDS:
            msg = f"LaterError: seconds={seconds} must be between 0 and {MAX_LATER_SECONDS:.0f}"
            raise ValueError(msg)
        self.seconds = seconds


class Run:
    """One start of a job, and what its handler works with."""

    def __init__(self, job: Job, database: Database, processes: ProcessPool) -> None:
        self.job = job
        self.database = database
        #: For computations: `await run.processes.run(function, argument)`.
        self.processes = processes
        self.is_done = False

    @contextlib.asynccontextmanager
    async def done(self, result: BaseModel | None = None) -> AsyncIterator[Connection]:
        """Open the transaction of the job's effect, which also ends the job: both or neither.

        `result` is what `GET /jobs/{job_id}` returns. Raises `SupersededError` at the end of the
        block if the job was cancelled, or has been started again: the effect is rolled back.
        """
        async with self.database.acquire() as connection, connection.transaction():
            yield connection
            await starts.succeed(connection, self.job, result)
        self.is_done = True


Function = Callable[[Run, Payload], Awaitable[None]]


class Handler(NamedTuple):
    """How jobs of a type are done."""

    payload: type[BaseModel]
    function: Function[Any]
    #: Starts before the job fails.
    attempts: int
    timeout_seconds: float


class Handlers:
    """The handlers of a worker, by type of job."""

    def __init__(self) -> None:
        self.by_type: dict[str, Handler] = {}

    def add(
        self, kind: str, payload: type[Payload], *, attempts: int = 5, timeout_seconds: float = 60
    ) -> Callable[[Function[Payload]], Function[Payload]]:
        """Have the decorated function do the jobs of a type.

        A job that raises is retried after about 5 s, 20 s, 80 s and so on, up to an hour, and fails
        after `attempts` starts. At `timeout_seconds` the function is cancelled, and its computation
        killed. A function that ends without `run.done()` may run more than once.

        Raises `ValueError` if the type has a handler.
        """
        if kind in self.by_type:
            msg = f"there are two handlers for {kind}"
            raise ValueError(msg)

        def add(function: Function[Payload]) -> Function[Payload]:
            self.by_type[kind] = Handler(payload, function, attempts, timeout_seconds)
            return function

        return add


#: The handlers of the features, which add theirs when they are imported.
handlers = Handlers()
