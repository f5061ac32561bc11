"""Runs the jobs that a dispatcher delivers, and keeps their leases."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from pydantic import ValidationError

from app.errors import UnavailableError
from app.jobs import job_metrics, outcomes, starts
from app.jobs.alone import Alone
from app.jobs.dispatcher import Delivery
from app.jobs.handlers import Handler, Handlers, PoisonError, Run
from app.jobs.outcomes import DONE, Outcome, outcome_of
from app.jobs.starts import Job
from app.process_pool.pool import ProcessPool
from app.storage.postgres import Connection, Database
from app.tasks import StateLog, describe
from app.telemetry import tracing
from app.telemetry.context import request_context

#: Pause between attempts to reach Postgres, for what must be stored.
HOLD_SECONDS = 0.5
#: Time limit for a cancelled job to release its row.
RELEASE_SECONDS = 2.0
#: Starts of a job whose type has no handler. During a rollout a newer worker may have one.
UNKNOWN_ATTEMPTS = 5
Result = TypeVar("Result")
logger = logging.getLogger("app.jobs")


class Runner:
    """Runs each delivery in a task. The dispatcher limits how many there are."""

    def __init__(self, handlers: Handlers, database: Database, processes: ProcessPool) -> None:
        self.handlers = handlers
        self.database = database
        self.processes = processes
        self.alone = Alone()
        self.is_stopping = False
        self.tasks: set[asyncio.Task[None]] = set()
        #: The starts whose leases are renewed.
        self.under_way: list[Job] = []

    def receive(self, delivery: Delivery) -> None:
        """Run a delivery in the background. A worker that shuts down leaves it to others."""
        if self.is_stopping:
            return
        task = asyncio.create_task(self._serve(delivery))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def finish(self, grace_seconds: float) -> None:
        """Wait for the jobs under way. After the grace, release those that are left."""
        self.is_stopping = True
        running = set(self.tasks)
        if running:
            _, running = await asyncio.wait(running, timeout=grace_seconds)
        for task in running:
            task.cancel()
        if running:
            logger.warning("%d jobs are released: they did not end in time", len(running))
            _, running = await asyncio.wait(running, timeout=RELEASE_SECONDS)
        for task in running:
            task.cancel()
        if running:
            logger.error("%d jobs have not ended since their cancellation", len(running))

    async def renew_leases(self, database: Database) -> None:
        """Renew the leases of the jobs under way, until cancelled.

        `database` is not that of the handlers, which may hold all its connections.
        """
        state = StateLog(logger, "leases of jobs cannot be renewed", "leases are renewed again")
        while True:
            try:
                if self.under_way:
                    async with database.acquire() as connection:
                        await starts.renew(connection, self.under_way)
                state.succeeded()
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                state.failed(describe(error))
            await asyncio.sleep(HOLD_SECONDS if state.is_failing else starts.RENEW_SECONDS)

    async def _serve(self, delivery: Delivery) -> None:
        """Follow the protocol of app/jobs/dispatcher.py."""
        try:
            with job_metrics.UNDER_WAY.track_inprogress():
                has_row = await self._start(delivery)
        except Exception:
            # Such as a table that a migration has changed. The lease of the job expires.
            logger.exception("job interrupted", extra={"job_id": str(delivery.job_id)})
            has_row = True
        if has_row:
            await delivery.settle()
        else:
            job_metrics.HANDLED.labels("unknown", "unreadable").inc()
            logger.error("no such job", extra={"job_id": str(delivery.job_id)})
            await delivery.discard()

    async def _start(self, delivery: Delivery) -> bool:
        """Start the job and run it, unless there is nothing to do. Return whether it has a row."""
        async with self.alone.enter(alone=False):
            # Not before: a job that waits for its turn has not started.
            job = delivery.job or await self._claim(delivery.claim)
            if job is not None:
                await self._run(job)
                return True
        if await self._hold(delivery.is_suspect):
            async with self.alone.enter(alone=True):
                job = await self._claim(delivery.claim_expired)
                if job is not None:
                    await self._run(job)
                    return True
        job_metrics.HANDLED.labels("unknown", "stale").inc()
        return await self._hold(partial(starts.exists, job_id=delivery.job_id))

    async def _claim(self, claim: Callable[[Connection], Awaitable[Job | None]]) -> Job | None:
        """Start a job, unless the shutdown has begun: then another worker gets its delivery."""
        if self.is_stopping:
            raise asyncio.CancelledError
        return await self._hold(claim)

    async def _run(self, job: Job) -> None:
        """Run a job that has been started, as a span of the trace that has created it."""
        job_id = str(job.job_id)
        context = job.context | {"job_id": job_id}
        written = context.pop("traceparent", None)
        context.pop("tracestate", None)
        with tracing.handling("postgresql", job.type, job_id, written):
            request_context.set(context | tracing.active_keys())
            await self._run_and_store(job)

    async def _run_and_store(self, job: Job) -> None:
        """Run a job, and store its outcome. Release it if cancelled."""
        job_metrics.WAIT.labels(job.type).observe(job.waited_seconds)
        begin = time.monotonic()
        name = "released"
        self.under_way.append(job)
        try:
            outcome = await self._attempt(job)
            if outcome.error or outcome.name == "failed":
                tracing.mark_failed(outcome.error or outcome.name)
            _log(job, outcome, time.monotonic() - begin)
            await self._hold(partial(outcomes.store, job=job, outcome=outcome))
            name = outcome.name
        except asyncio.CancelledError:
            await asyncio.shield(self._hold(partial(starts.release, job=job)))
            raise
        finally:
            self.under_way.remove(job)
            job_metrics.HANDLED.labels(job.type, name).inc()
            job_metrics.DURATION.labels(job.type).observe(time.monotonic() - begin)

    async def _attempt(self, job: Job) -> Outcome:
        """Call the handler, and return what becomes of the job."""
        handler = self.handlers.by_type.get(job.type)
        max_attempts = handler.attempts if handler else UNKNOWN_ATTEMPTS
        if job.attempts > max_attempts:
            reason = f"{max_attempts} starts have not ended: it may kill its workers"
            # This start only records the failure.
            return Outcome("failed", reason, is_counted=False)
        run = Run(job, self.database, self.processes)
        try:
            await self._call(handler, run)
        # Any other would end the worker, or this task, whose place would stay taken.
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and self.is_stopping:
                raise
            if run.is_done:
                logger.warning("handler raised after the end of its job", exc_info=error)
                return DONE
            return outcome_of(error, job.attempts, max_attempts)
        return DONE

    async def _call(self, handler: Handler | None, run: Run) -> None:
        """Call the handler, and end the job if the handler has not. Raises what either raises."""
        if handler is None:
            msg = f"no handler for {run.job.type}"
            raise LookupError(msg)
        payload = _parse(handler, run.job)
        try:
            async with asyncio.timeout(handler.timeout_seconds) as limit:
                await handler.function(run, payload)
                if not run.is_done:
                    async with run.done():
                        pass
        except TimeoutError as error:
            if limit.expired():
                msg = f"not done within {handler.timeout_seconds:g} s"
                raise TimeoutError(msg) from error
            raise

    async def _hold(self, work: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Call `work` with a connection, again and again while Postgres is unavailable."""
        while True:
            with contextlib.suppress(UnavailableError):
                async with self.database.acquire() as connection:
                    return await work(connection)
            await asyncio.sleep(HOLD_SECONDS)


def _parse(handler: Handler, job: Job) -> object:
    """Return the payload. Raises `PoisonError` with the problems, without the values."""
    try:
        return handler.payload.model_validate_json(job.payload)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}"
            for each in error.errors(include_input=False, include_url=False)
        ]
        msg = f"invalid payload: {'; '.join(problems)}"
        raise PoisonError(msg) from None


def _log(job: Job, outcome: Outcome, seconds: float) -> None:
    """Log what became of a start."""
    extra: dict[str, object] = {
        "job_type": job.type,
        "attempts": job.attempts if outcome.is_counted else job.attempts - 1,
        "duration_ms": round(seconds * 1000),
    }
    level, text = outcomes.LOG_LINES[outcome.name]
    if outcome.reason:
        extra["reason"] = outcome.reason
    logger.log(level, text, exc_info=outcome.error, extra=extra)
