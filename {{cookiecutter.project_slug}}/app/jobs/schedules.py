"""Jobs at the times of cron expressions: each time once, however many workers run.

Every worker looks at the rows of the schedules each second. The one that locks a due row writes
down the job and the time after it, in one transaction. The lock belongs to that transaction, so it
works through PgBouncer, and a worker that is killed releases it. The key of the job is its time.
So even a row that was set back by hand yields no second job.
"""

import asyncio
import itertools
import logging
import sys
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import BaseModel

from app.jobs import table
from app.storage.postgres import Connection, Database
from app.tasks import StateLog, describe

#: Interval between two looks.
LOOK_SECONDS = 1.0
#: A time that is found later than this was missed: no worker was running.
ON_TIME_SECONDS = 60.0
#: The look-back of a changed expression. During a rolling update the workers of both releases set
#: the row by turns, each within a second or two. No time of either may be lost meanwhile.
CHANGE_SECONDS = 10.0
#: Jobs for missed times that one transaction writes down, with `missed="each"`.
BATCH = 100
FIELDS = 5
#: What happens at the first look after times that passed while no worker was running:
#: one job for all of them, none, or a job for each.
Missed = Literal["once", "skip", "each"]

_ROWS = "select name, expression, zone, next_at <= now() as is_due from schedules"
_SET = """
    insert into schedules (name, expression, zone, next_at) values ($1, $2, $3, $4)
    on conflict (name) do update
    set expression = excluded.expression, zone = excluded.zone, next_at = excluded.next_at
    where (schedules.expression, schedules.zone) <> (excluded.expression, excluded.zone)
"""
_LOCK = """
    select next_at, now() as now from schedules
    where (name, expression, zone) = ($1, $2, $3) and next_at <= now() for update skip locked
"""
_ADVANCE = "update schedules set next_at = $2 where name = $1"
_IS_UNFINISHED = """
    select exists (select from jobs where type = $1 and status in ('queued', 'running'))
"""
logger = logging.getLogger("app.schedules")


class Tick(BaseModel):
    """The payload of a scheduled job: the time that it is for, which may have been missed."""

    at: datetime


class Schedule(NamedTuple):
    """The times of one type of job. The zone of `None` is `JOB_TIMEZONE`."""

    type: str
    expression: str
    zone: str | None
    missed: Missed

    def problem(self) -> str | None:
        """Return the error of the schedule, if it has one."""
        if self.missed not in get_args(Missed):
            return f"missed={self.missed!r} must be one of {', '.join(get_args(Missed))}"
        try:
            _zone(self.zone or "UTC")
        except ValueError as error:
            return str(error)
        fields = len(self.expression.split())
        if fields != FIELDS:
            example = "for example 0 3 * * *, each day at 03:00"
            return f"{self.expression!r} must have {FIELDS} fields, not {fields}: {example}"
        try:
            CronSim(self.expression, datetime.now(UTC))
        except CronSimError as error:
            return f"{self.expression!r} is not a cron expression: {error}"
        if next(self.after(datetime.now(UTC)), None) is None:
            return f"{self.expression!r} has no time in the next 50 years"
        return None

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Yield the times after a moment, in UTC.

        A time in the hour that a zone skips in spring is at the end of that hour. One in the hour
        that occurs twice in autumn is in the first of the two.
        """
        newest = moment
        # In the second of the two hours cronsim starts with the times of the first.
        for time in CronSim(self.expression, moment.astimezone(_zone(self.zone or "UTC"))):
            in_utc = time.astimezone(UTC)
            if in_utc > newest:
                newest = in_utc
                yield in_utc

    def due(self, first: datetime, now: datetime) -> tuple[list[datetime], datetime]:
        """Return the times that get a job, of those from `first` until now, and the next one."""
        if self.missed == "each":
            times = itertools.chain([first], self.after(first))
            several = list(itertools.islice(times, BATCH + 1))
            due = [time for time in several[:BATCH] if time <= now]
            return due, several[len(due)]
        newest, following = self._newest(first, now)
        is_on_time = now - newest <= timedelta(seconds=ON_TIME_SECONDS)
        return ([newest] if self.missed == "once" or is_on_time else []), following

    def _newest(self, first: datetime, now: datetime) -> tuple[datetime, datetime]:
        """Return the last time until now, and the one after it.

        Found backwards: a schedule of each minute misses half a million times in a year.
        """
        zone = _zone(self.zone or "UTC")
        # With a fraction of a second, the first step backwards may be to the second itself.
        start = now.astimezone(zone).replace(microsecond=1)
        newest = next(CronSim(self.expression, start, reverse=True)).astimezone(UTC)
        newest = max(first, newest)
        # Backwards, cronsim passes over times in the hour that occurs twice.
        for time in self.after(newest):
            if time > now:
                return newest, time
            newest = time
        raise AssertionError  # unreachable: `problem` has found a time


class Schedules:
    """The schedules of a worker, by the type of their jobs."""

    def __init__(self) -> None:
        self.by_type: dict[str, Schedule] = {}
        self.problems: list[str] = []

    def add(
        self, kind: str, expression: str, *, zone: str | None = None, missed: Missed = "once"
    ) -> None:
        """Have a job of this type at the times of a cron expression, such as `0 3 * * *`.

        Its handler has the payload `Tick`. `zone` is a name such as Europe/Berlin, by default
        `JOB_TIMEZONE`. `missed` decides about times that pass while no worker is running.

        While a job of the type has not ended, a time is passed over, except with `missed="each"`.
        """
        if kind in self.by_type:
            self.problems.append(f"schedule {kind}: is added twice; give one of them another type")
        self.by_type[kind] = Schedule(kind, expression, zone, missed)

    def check(self, types: Collection[str]) -> None:
        """Raise `SystemExit` with one line that names each wrong schedule.

        `types` are those that have a handler.
        """
        problems = list(self.problems)
        for kind, schedule in self.by_type.items():
            if problem := schedule.problem():
                problems.append(f"schedule {kind}: {problem}")
            elif kind not in types:
                problems.append(f"schedule {kind}: no handler is added for jobs of this type")
        if problems:
            sys.exit("; ".join(problems))

    async def run(self, database: Database, zone: str) -> None:
        """Write down jobs when they become due, until cancelled. `zone` is the default one."""
        state = StateLog(logger, "schedules failed", "schedules work again")
        while True:
            try:
                await self.look(database, zone)
                state.succeeded()
            except Exception as error:  # noqa: BLE001 - no error ends the loop
                state.failed(describe(error))
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, database: Database, zone: str = "UTC") -> int:
        """Write down the jobs that are due now; return how many this call has written."""
        jobs = 0
        async with database.acquire() as connection:
            rows = {row["name"]: row for row in await connection.fetch(_ROWS)}
            for declared in self.by_type.values():
                schedule = declared._replace(zone=declared.zone or zone)
                row = rows.get(schedule.type)
                if row is None or (row["expression"], row["zone"]) != schedule[1:3]:
                    await _set(connection, schedule, is_new=row is None)
                elif row["is_due"]:
                    jobs += await _write_down(connection, schedule)
        return jobs


async def _set(connection: Connection, schedule: Schedule, *, is_new: bool) -> None:
    """Insert the row of a schedule, or give it the expression of this release."""
    now: datetime = await connection.fetchval("select now()")
    start = now if is_new else now - timedelta(seconds=CHANGE_SECONDS)
    following = next(schedule.after(start))
    await connection.execute(_SET, *schedule[:3], following)


async def _write_down(connection: Connection, schedule: Schedule) -> int:
    """Write down the jobs of a row that is due, unless another worker does; return how many."""
    async with connection.transaction():
        row: Any = await connection.fetchrow(_LOCK, *schedule[:3])
        if row is None:
            return 0
        times, following = schedule.due(row["next_at"], row["now"])
        may_overlap = schedule.missed == "each"
        if times and not may_overlap and await connection.fetchval(_IS_UNFINISHED, schedule.type):
            message = "schedule %s: %s is passed over, since the job before has not ended"
            logger.info(message, schedule.type, times[-1].isoformat())
            times = []
        for time in times:
            await table.enqueue(connection, schedule.type, Tick(at=time), key=_key(time))
        await connection.execute(_ADVANCE, schedule.type, following)
    return len(times)


def _key(time: datetime) -> str:
    return f"schedule {time.isoformat()}"


def _zone(name: str) -> ZoneInfo:
    """Return a time zone. Raises `ValueError`, which names it."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        msg = f"zone={name!r} is not a time zone: use a name such as Europe/Berlin"
        raise ValueError(msg) from None


#: The schedules of this project: `schedules.add` in the module of a feature.
schedules = Schedules()
