"""A periodic job that one process of the whole fleet runs, such as a nightly report.

A row in Postgres decides. The process that has locked it runs the job, in the same transaction. So
an effect in the database happens once, and a holder that is killed releases the job. The lock
belongs to a transaction, so it also works through PgBouncer.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from prometheus_client import Counter, Gauge

from app.storage.postgres import Connection, Database
from app.tasks import StateLog, describe

#: Longest pause between two looks at the row while another process has locked it.
LOOK_SECONDS = 5.0
#: Part of the interval by which processes look at different times.
JITTER = 0.1
#: Postgres ends the transaction of a holder that hangs this much longer than its time limit.
HANG_SECONDS = 5.0
_CREATE = "insert into schedule (name, due_at) values ($1, now()) on conflict do nothing"
_LOCK = """
    select extract(epoch from due_at - now())::float8 as seconds_left,
        extract(epoch from succeeded_at)::float8 as succeeded_at
    from schedule where name = $1 for update skip locked
"""
_LIMIT = """
    select set_config('statement_timeout', $1, true),
        set_config('idle_in_transaction_session_timeout', $1, true)
"""
# The ticks keep their distance, however long the job takes. Those that were missed are left out. If
# the interval has become shorter, the row is due much later than one interval.
_ADVANCE = """
    update schedule set
        due_at = least(due_at, now())
            + make_interval(secs => $2::float8 * (1 + floor(
                extract(epoch from clock_timestamp() - least(due_at, now())) / $2::float8))),
        succeeded_at = case when $3 then clock_timestamp() else succeeded_at end
    where name = $1
"""
_RUNS = Counter("schedule_runs", "Runs of a job, by outcome.", ["job", "outcome"])
_SUCCEEDED = Gauge(
    "schedule_last_success_timestamp_seconds",
    "Unix time of the last success of a job, in any process.",
    ["job"],
    multiprocess_mode="max",
)
#: Works on the connection, in a transaction. What it does elsewhere may happen twice.
Job = Callable[[Connection], Awaitable[None]]
logger = logging.getLogger("app.schedule")


async def every(
    database: Database, seconds: float, job: Job, *, name: str = "", timeout_seconds: float = 60
) -> None:
    """Run a job every `seconds` in one process of the fleet, until cancelled.

    `name` identifies it, by default that of the function. The first run is at once. A run that
    fails or exceeds its time limit is logged and rolled back; the next one is at the next tick.
    """
    schedule = _Schedule(seconds, job, name or job.__qualname__, timeout_seconds)
    while True:
        try:
            async with database.acquire() as connection:
                pause = await schedule.look(connection)
            schedule.database_state.succeeded()
        except Exception as error:  # noqa: BLE001 - no error ends the loop
            pause = schedule.longest_pause
            schedule.database_state.failed(describe(error))
        jitter = random.uniform(0, JITTER * schedule.longest_pause)  # noqa: S311
        await asyncio.sleep(pause + jitter)


class _Schedule:
    """A job, its interval, and its state in this process."""

    def __init__(self, seconds: float, job: Job, name: str, timeout_seconds: float) -> None:
        self.seconds = seconds
        self.job = job
        self.name = name
        self.timeout_seconds = timeout_seconds
        self.longest_pause = min(seconds, LOOK_SECONDS)
        text = f"scheduled job {name}"
        self.state = StateLog(logger, f"{text} failed", f"{text} succeeded again")
        database = f"database of {text}"
        self.database_state = StateLog(logger, f"{database} failed", f"{database} works again")
        self.succeeded_runs = _RUNS.labels(name, "succeeded")
        self.failed_runs = _RUNS.labels(name, "failed")

    async def look(self, connection: Connection) -> float:
        """Run the job if it is due, and no other process runs it. Return the next pause."""
        # A transaction of its own, or all others would wait for the first run.
        await connection.execute(_CREATE, self.name)
        async with connection.transaction():
            row = await connection.fetchrow(_LOCK, self.name)
            if row is None:
                return self.longest_pause
            if row["succeeded_at"]:
                _SUCCEEDED.labels(self.name).set(row["succeeded_at"])
            if 0 < row["seconds_left"] <= self.seconds:
                return float(row["seconds_left"])
            try:
                error = await self._run(connection)
            except Exception:  # the database has rolled the run back
                self.failed_runs.inc()
                raise
        if error is None:
            self.succeeded_runs.inc()
            self.state.succeeded()
        else:
            self.failed_runs.inc()
            self.state.failed(describe(error))
        return 0

    async def _run(self, connection: Connection) -> Exception | None:
        """Run the job in a savepoint, advance the row, and return the job's error."""
        limit_ms = round((self.timeout_seconds + HANG_SECONDS) * 1000)
        await connection.execute(_LIMIT, str(limit_ms))
        failure = None
        try:
            async with asyncio.timeout(self.timeout_seconds), connection.transaction():
                await self.job(connection)
        except Exception as error:  # noqa: BLE001 - a job may raise anything
            failure = error
        await connection.execute(_ADVANCE, self.name, self.seconds, failure is None)
        return failure
