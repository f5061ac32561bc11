"""Scheduled jobs: each time once, whichever workers run, are killed, or run another release.

The processes are real: this module is also their program.
"""

import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import pytest

from app.jobs import table
from app.jobs.schedules import BATCH, Missed, Schedule, Schedules, Tick
from app.settings import load_settings
from app.storage.postgres import Connection, Database
from app.tasks import background_task
from tests.patience import patience

PROJECT = Path(__file__).parents[2]
BERLIN = ZoneInfo("Europe/Berlin")
TICKS = 100
MINUTELY = "* * * * *"
MAKE_DUE = "update schedules set next_at = now() - make_interval(secs => $1)"


@pytest.fixture
def dispatcher() -> dict[str, str]:
    """Not parametrized: nothing is handed out here."""
    return {}


def berlin(expression: str, missed: Missed = "once") -> Schedule:
    return Schedule("report", expression, "Europe/Berlin", missed)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(schedule: Schedule, after: str, number: int) -> list[str]:
    """Return the next times of a schedule, as Berlin's clocks show them."""
    found = schedule.after(utc(after))
    return [next(found).astimezone(BERLIN).strftime("%d %H:%M %Z") for _ in range(number)]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("30 2 * * *", ["28 02:30 CET", "29 03:00 CEST", "30 02:30 CEST"]),
        # Both are at 03:00 on the 29th, which is one time.
        ("15,30 2 * * *", ["28 02:15 CET", "28 02:30 CET", "29 03:00 CEST", "30 02:15 CEST"]),
        ("0 3 * * *", ["28 03:00 CET", "29 03:00 CEST", "30 03:00 CEST"]),
    ],
)
def test_times_in_the_hour_skipped_in_spring_are_at_its_end(
    expression: str, expected: list[str]
) -> None:
    """At 02:00 of 29 March 2026 the clocks of Berlin go forward to 03:00, as with Debian's cron."""
    assert times(berlin(expression), "2026-03-28 00:00", len(expected)) == expected


def test_time_in_the_hour_repeated_in_autumn_occurs_once() -> None:
    """At 03:00 of 25 October 2026 the clocks of Berlin go back to 02:00."""
    expected = ["25 02:30 CEST", "26 02:30 CET"]
    assert times(berlin("30 2 * * *"), "2026-10-24 12:00", 2) == expected


def test_hourly_times_occur_in_both_of_the_repeated_hours() -> None:
    expected = ["25 01:30 CEST", "25 02:30 CEST", "25 02:30 CET", "25 03:30 CET"]
    assert times(berlin("30 * * * *"), "2026-10-24 23:00", 4) == expected


def test_next_time_is_after_the_moment_in_the_second_repeated_hour() -> None:
    """cronsim itself starts with 02:30 CEST there, which has passed: it would be due at once."""
    assert times(berlin("30 2 * * *"), "2026-10-25 01:15", 1) == ["26 02:30 CET"]


def test_newest_missed_time_is_the_last_one_until_now() -> None:
    """Found backwards; the same as by counting forwards, around both changes of the clocks."""
    numbers = random.Random(1)
    expressions = ["30 2 * * *", "15,30 2 * * *", "0 * * * *", "*/20 2 * * *", "45 1,2,3 * * *"]
    for change in (utc("2026-03-29 01:00"), utc("2026-10-25 01:00")):
        for expression in expressions * 20:
            schedule = berlin(expression)
            now = change + timedelta(seconds=numbers.randrange(-10_000, 10_000))
            first = next(schedule.after(now - timedelta(days=3)))
            newest = following = first
            for following in schedule.after(first):
                if following > now:
                    break
                newest = following
            assert schedule.due(first, now) == ([newest], following), (expression, now)


def test_missed_times_of_a_year_are_found_at_once() -> None:
    """525,600 of them; forwards that would block the loop for seconds."""
    schedule = berlin(MINUTELY)
    begin = time.process_time()
    due, following = schedule.due(utc("2025-01-01 00:00"), utc("2026-01-01 00:00:30"))
    assert time.process_time() - begin < 0.1
    assert (due, following) == ([utc("2026-01-01 00:00")], utc("2026-01-01 00:01"))


@pytest.mark.parametrize(
    ("missed", "now", "expected"),
    [
        ("once", "08:00:01", ["08:00"]),
        ("once", "08:40:00", ["08:00"]),
        ("skip", "08:00:01", ["08:00"]),
        ("skip", "08:40:00", []),
        ("each", "08:00:01", ["03:00", "04:00", "05:00", "06:00", "07:00", "08:00"]),
    ],
)
def test_missed_times_of_an_hourly_schedule(missed: Missed, now: str, expected: list[str]) -> None:
    """Due since 03:00, found at 08:00 or later, as after five hours without a worker."""
    schedule = Schedule("report", "0 * * * *", "UTC", missed)
    due, following = schedule.due(utc("2026-01-01 03:00"), utc(f"2026-01-01 {now}"))
    assert [time.strftime("%H:%M") for time in due] == expected
    assert following == utc("2026-01-01 09:00")


def test_each_missed_time_is_written_down_in_batches() -> None:
    schedule = Schedule("report", MINUTELY, "UTC", "each")
    first = utc("2026-01-01 00:00")
    now = first + timedelta(minutes=150)
    due, following = schedule.due(first, now)
    assert (len(due), following) == (BATCH, first + timedelta(minutes=BATCH))
    due, following = schedule.due(following, now)
    assert (due[-1], following) == (now, now + timedelta(minutes=1))


@pytest.mark.parametrize(
    ("expression", "options", "problem"),
    [
        ("0 25 * * *", {}, "'0 25 * * *' is not a cron expression: Bad hour"),
        ("0 0 30 2 *", {}, "'0 0 30 2 *' is not a cron expression: Bad day-of-month"),
        ("@daily", {}, "'@daily' must have 5 fields, not 1: for example 0 3 * * *"),
        ("* * * * * *", {}, "'* * * * * *' must have 5 fields, not 6"),
        (MINUTELY, {"zone": "Berlin"}, "zone='Berlin' is not a time zone"),
        (MINUTELY, {"zone": "../x"}, "zone='../x' is not a time zone"),
        (MINUTELY, {"missed": "all"}, "missed='all' must be one of once, skip, each"),
    ],
)
def test_invalid_schedule_ends_the_start_with_its_name(
    expression: str, options: Any, problem: str
) -> None:
    schedules = Schedules()
    schedules.add("good", "0 3 * * *", zone="Europe/Berlin")
    schedules.add("bad", expression, **options)
    with pytest.raises(SystemExit) as exit_info:
        schedules.check({"good", "bad"})
    assert str(exit_info.value).startswith(f"schedule bad: {problem}")


def test_every_invalid_schedule_is_named() -> None:
    schedules = Schedules()
    schedules.add("twice", MINUTELY)
    schedules.add("twice", "0 3 * * *")
    schedules.add("unknown", MINUTELY)
    with pytest.raises(SystemExit) as exit_info:
        schedules.check({"twice"})
    twice = "schedule twice: is added twice; give one of them another type"
    unknown = "schedule unknown: no handler is added for jobs of this type"
    assert str(exit_info.value) == f"{twice}; {unknown}"


def having(*declared: tuple[str, str], **options: Any) -> Schedules:
    schedules = Schedules()
    for kind, expression in declared:
        schedules.add(kind, expression, **options)
    return schedules


async def make_due(database: Database, schedules: Schedules, seconds: float = 0.02) -> None:
    """Create the rows if there are none, and make them due."""
    await schedules.look(database)
    await database.pool.execute(MAKE_DUE, seconds)


async def count(database: Database) -> int:
    number: int = await database.pool.fetchval("select count(*) from jobs")
    return number


async def end_jobs(database: Database) -> None:
    await database.pool.execute("update jobs set status = 'succeeded', finished_at = now()")


async def test_job_and_next_time_of_a_due_schedule(database: Database) -> None:
    schedules = having(("report", MINUTELY))
    await make_due(database, schedules, seconds=3600)
    due_at = await database.pool.fetchval("select next_at from schedules")
    assert await schedules.look(database) == 1
    assert await schedules.look(database) == 0
    row: Any = await database.pool.fetchrow("select type, key, payload, status from jobs")
    at = Tick.model_validate_json(row["payload"]).at
    assert (row["type"], row["status"]) == ("report", "queued")
    assert row["key"] == f"schedule {at.isoformat()}"
    assert at - due_at > timedelta(minutes=58)
    assert await database.pool.fetchval("select next_at > now() from schedules")


async def test_time_is_passed_over_while_the_job_before_runs(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.schedules")
    schedules = having(("report", MINUTELY))
    await make_due(database, schedules)
    assert await schedules.look(database) == 1
    for status in ("queued", "running"):
        await database.pool.execute("update jobs set status = $1", status)
        await make_due(database, schedules)
        assert await schedules.look(database) == 0
        assert await database.pool.fetchval("select next_at > now() from schedules")
    assert [" is passed over, since" in message for message in caplog.messages] == [True, True]
    await end_jobs(database)
    await make_due(database, schedules)
    assert await schedules.look(database) == 1


async def test_each_missed_time_has_a_job_although_others_wait(database: Database) -> None:
    schedules = having(("hourly", "0 * * * *"), missed="each")
    await make_due(database, schedules)
    now = await database.pool.fetchval("select date_trunc('hour', now())")
    await database.pool.execute("update schedules set next_at = $1", now - timedelta(hours=4))
    assert await schedules.look(database) == 5
    keys = await database.pool.fetch("select key from jobs order by key")
    expected = [now - timedelta(hours=hours) for hours in range(4, -1, -1)]
    assert [row["key"] for row in keys] == [f"schedule {at.isoformat()}" for at in expected]


async def test_hours_without_a_worker_are_one_job(database: Database) -> None:
    schedules = having(("hourly", "0 * * * *"))
    await make_due(database, schedules, seconds=5 * 3600)
    assert [await schedules.look(database) for _ in range(3)] == [1, 0, 0]
    payload = await database.pool.fetchval("select payload from jobs")
    at = Tick.model_validate_json(payload).at
    assert at == await database.pool.fetchval("select date_trunc('hour', now())")


async def test_changed_expression_or_zone_takes_effect(database: Database) -> None:
    await having(("report", "0 3 * * *")).look(database)
    for expression, zone in (("30 4 * * *", "UTC"), ("30 4 * * *", "Asia/Tokyo")):
        changed = having(("report", expression))
        assert await changed.look(database, zone) == 0
        next_at = await database.pool.fetchval("select next_at from schedules")
        assert next_at.astimezone(ZoneInfo(zone)).strftime("%H:%M") == "04:30"
    assert await count(database) == 0


async def test_releases_that_disagree_lose_and_double_no_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a rolling update the workers of both look by turns, and each sets the row."""
    monkeypatch.setattr("app.jobs.schedules.CHANGE_SECONDS", 90)
    old = having(("report", MINUTELY))
    # The same times in other words: a time that both find is one.
    new = having(("report", "*/1 * * * *"))
    await old.look(database)
    # It passed while the row was that of the other release.
    minute = await database.pool.fetchval("select date_trunc('minute', now())")
    for release in (new, old) * 4:
        await release.look(database)
        await release.look(database)
        await end_jobs(database)
    payloads = await database.pool.fetch("select payload from jobs")
    found = [Tick.model_validate_json(row["payload"]).at for row in payloads]
    assert len(found) == len(set(found))
    assert minute in found


async def test_row_that_another_worker_has_locked_is_left_to_it(
    database: Database, clean_database: str
) -> None:
    schedules = having(("report", MINUTELY))
    await make_due(database, schedules)
    other = await asyncpg.connect(clean_database)
    try:
        async with other.transaction():
            await other.execute("select from schedules for update")
            async with patience(5):
                assert await schedules.look(database) == 0
        assert await schedules.look(database) == 1
    finally:
        await other.close()


async def test_job_and_next_time_are_one_transaction(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules = having(("report", MINUTELY))
    await make_due(database, schedules)
    enqueue = table.enqueue

    async def enqueue_and_fail(*arguments: Any, **options: Any) -> UUID:
        await enqueue(*arguments, **options)
        raise LookupError

    with monkeypatch.context() as patch:
        patch.setattr(table, "enqueue", enqueue_and_fail)
        with pytest.raises(LookupError):
            await schedules.look(database)
    assert await count(database) == 0
    assert await schedules.look(database) == 1


async def test_outage_is_logged_once(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "app.schedules")
    monkeypatch.setattr("app.jobs.schedules.LOOK_SECONDS", 0.01)
    schedules = having(("report", MINUTELY))
    await database.pool.execute("alter table schedules rename to gone")
    looks: list[object] = []
    look = schedules.look

    async def count_looks(*arguments: Any) -> int:
        looks.append(arguments)
        return await look(*arguments)

    monkeypatch.setattr(schedules, "look", count_looks)

    async def has(lines: int, number_of_looks: int) -> bool:
        return len(caplog.messages) >= lines and len(looks) >= number_of_looks

    async with background_task(schedules.run(database, "UTC")):
        await eventually(lambda: has(1, 5))
        await database.pool.execute("alter table gone rename to schedules")
        await eventually(lambda: has(2, 6))
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("schedules failed: ")
    assert caplog.messages[1] == "schedules work again"


class Worker:
    """A process that looks at its schedules without a pause."""

    def __init__(self, url: str, *, hang: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.jobs.test_schedules", *(["hang"] if hang else [])],
            cwd=PROJECT,
            env=os.environ | {"DATABASE_URL": url},
            stdout=subprocess.PIPE,
        )

    def wait(self) -> None:
        """Wait for the line that the process prints: it is ready, or hangs."""
        assert self.process.stdout
        assert self.process.stdout.readline()

    def kill(self) -> None:
        assert self.process.stdout
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def working(url: str, number: int) -> Iterator[list[Worker]]:
    workers = [Worker(url) for _ in range(number)]
    try:
        for worker in workers:
            worker.wait()
        yield workers
    finally:
        for worker in workers:
            worker.kill()


async def test_each_time_is_one_job_of_three_workers_that_are_killed(
    database: Database, clean_database: str
) -> None:
    """100 times; every twentieth time a worker is killed in the middle of its looks."""
    schedules = having(("tick", MINUTELY))
    await schedules.look(database)
    is_done = "select next_at > now() from schedules"
    with working(clean_database, 3) as workers:
        for number in range(TICKS):
            await database.pool.execute(MAKE_DUE, 0.02)
            if number % 20 == 5:
                victim = workers.pop(0)
                victim.kill()
                workers.append(Worker(clean_database))
            await eventually(lambda: database.pool.fetchval(is_done))
            await end_jobs(database)
    assert await count(database) == TICKS


async def test_worker_killed_in_its_transaction_leaves_the_time_to_others(
    database: Database, clean_database: str
) -> None:
    schedules = having(("tick", MINUTELY))
    await make_due(database, schedules)
    worker = Worker(clean_database, hang=True)
    try:
        worker.wait()
        assert await schedules.look(database) == 0
    finally:
        worker.kill()
    await eventually(lambda: schedules.look(database))
    assert await count(database) == 1


async def eventually(look: Callable[[], Awaitable[object]], seconds: float = 30) -> None:
    """Wait until `look` returns something true."""
    async with patience(seconds):
        while not await look():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def main() -> None:
    """Look without a pause. With `hang`: write down a job, and keep the transaction open."""
    if "hang" in sys.argv:
        table.enqueue = hang
    schedules = having(("tick", MINUTELY))
    async with Database(load_settings(), 2) as database:
        await schedules.look(database)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            await schedules.look(database)


async def hang(connection: Connection, *arguments: Any, **options: Any) -> UUID:
    await enqueue(connection, *arguments, **options)
    sys.stdout.write("hangs\n")
    sys.stdout.flush()
    await asyncio.sleep(600)
    raise AssertionError


enqueue = table.enqueue

if __name__ == "__main__":
    asyncio.run(main())
