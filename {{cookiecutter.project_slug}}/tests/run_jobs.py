"""Runs jobs in a test: no worker, no RabbitMQ, no process for computations."""

import asyncio
import pickle
from collections.abc import Callable
from typing import Any
from uuid import UUID

# Its imports add the handlers of all features.
from app import jobs_main  # noqa: F401
from app.jobs import starts
from app.jobs.handlers import handlers
from app.jobs.runner import Runner
from app.jobs.starts import Job
from app.storage.postgres import Connection, Database


class InlineProcesses:
    """Runs computations in this process, pickled as they are for another one."""

    async def run(
        self, function: Callable[..., Any], *arguments: Any, timeout_seconds: float | None = None
    ) -> Any:
        """Call the function. Raises what it raises."""
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        return pickle.loads(pickle.dumps(function(*arguments)))


class StartedJob:
    """A job that is handed out to the runner (app/jobs/dispatcher.py)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.job_id = job.job_id

    async def is_suspect(self, _: Connection) -> bool:
        return False

    async def claim(self, _: Connection) -> Job | None:
        return self.job

    async def claim_expired(self, _: Connection) -> Job | None:
        return None

    async def settle(self) -> None:
        pass

    async def discard(self) -> None:
        pass


class RunJobs:
    """Runs the jobs that are due in a database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        processes: Any = InlineProcesses()
        self.runner = Runner(handlers, database, processes)

    async def __call__(self, *, raises: bool = True) -> list[UUID]:
        """Run each job that is due, and those that these create; return their IDs.

        One after another, each once: a job that fails is due again later, as in production. With
        `raises`, it fails the test with its error; the traceback is in the captured log.
        """
        ran: list[UUID] = []
        while job := await self._start_next():
            self.runner.receive(StartedJob(job))
            await asyncio.gather(*self.runner.tasks)
            ran.append(job.job_id)
            query = "select status, error from jobs where job_id = $1"
            row = await self.database.pool.fetchrow(query, job.job_id)
            assert row is None or row["status"] != "running", f"{job.type} was interrupted"
            if raises and row and row["error"]:
                raise AssertionError(f"{job.type}: {row['error']}")
        return ran

    async def _start_next(self) -> Job | None:
        async with self.database.acquire() as connection:
            jobs = await starts.claim_due(connection, 1)
        return jobs[0] if jobs else None
