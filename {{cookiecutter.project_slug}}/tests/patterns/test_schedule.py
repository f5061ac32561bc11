"""One process of the fleet runs a scheduled job, whichever processes are killed.

The processes are real: this module is also their program.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from app.errors import UnavailableError
from app.patterns import schedule
from app.patterns.schedule import every
from app.settings import Settings, load_settings
from app.storage.postgres import Connection, Database
from app.tasks import background_task
from tests.patience import patience
from tests.patterns.conftest import eventually

PROJECT = Path(__file__).parents[2]
SECONDS = 0.3
CREATE = """
    drop table if exists ticks;
    truncate schedule;
    create table ticks (due_at timestamptz, pid integer, backend integer)
"""
TICK = """
    insert into ticks select due_at, $1, pg_backend_pid() from schedule where name = 'tick'
"""


async def tick(connection: Connection) -> None:
    await connection.execute(TICK, os.getpid())


async def tick_and_hang(connection: Connection) -> None:
    """Note the run on another connection, whose commit survives this process, then hang."""
    async with Database(load_settings(), 2) as other, other.acquire() as committed:
        await committed.execute(TICK, os.getpid())
    await asyncio.sleep(60)


@pytest.fixture
async def ticks(database: Database) -> AsyncIterator[Database]:
    async with database.acquire() as connection:
        await connection.execute(CREATE)
    yield database
    async with database.acquire() as connection:
        await connection.execute("drop table ticks; truncate schedule")


@contextlib.contextmanager
def fleet(
    settings: Settings, job: str, processes: int = 4
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the job in several processes, as two services with two workers each do."""
    url = settings.database_url.get_secret_value()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.patterns.test_schedule", job],
            cwd=PROJECT,
            env=os.environ | {"DATABASE_URL": url, "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "30"},
        )
        for _ in range(processes)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


async def rows(database: Database) -> list[tuple[float, int]]:
    """Return the due time and the process of each run."""
    query = "select extract(epoch from due_at)::float8, pid from ticks order by due_at"
    async with database.acquire() as connection:
        return [tuple(row) for row in await connection.fetch(query)]


async def until(database: Database, number: int) -> list[tuple[float, int]]:
    """Wait for this number of runs, and return them."""
    async with patience(60):
        while True:
            found = await rows(database)
            if len(found) >= number:
                return found
            await asyncio.sleep(0.05)


async def test_one_process_runs_each_tick(ticks: Database, settings: Settings) -> None:
    """Ticks are whole intervals apart, and none is run twice."""
    with fleet(settings, "tick") as processes:
        found = await until(ticks, 12)
        assert all(process.poll() is None for process in processes)
    due = [each for each, _ in found]
    intervals = [(later - earlier) / SECONDS for earlier, later in itertools.pairwise(due)]
    assert all(round(each) >= 1 for each in intervals), intervals
    assert all(abs(each - round(each)) < 0.01 for each in intervals), intervals


async def test_killed_holder_is_replaced_at_once(ticks: Database, settings: Settings) -> None:
    """Postgres releases the row when the connection of the killed process closes."""
    with fleet(settings, "tick_and_hang", processes=2):
        ((due, holder),) = await until(ticks, 1)
        start = time.monotonic()
        os.kill(holder, signal.SIGKILL)
        (_, (due_again, successor)) = await until(ticks, 2)
    assert (due_again, successor != holder) == (due, True)
    assert time.monotonic() - start < 20


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, {"job": "job", **labels}) or 0


async def test_failed_run_is_rolled_back_logged_and_counted(
    ticks: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It has its time limit, and the next run is at the next tick: an error is no hot loop."""
    runs: list[float] = []

    async def job(connection: Connection) -> None:
        runs.append(time.monotonic())
        if len(runs) < 4:
            await connection.execute("insert into ticks values (now(), 0, 0)")
        if len(runs) == 1:
            await asyncio.sleep(60)
        if len(runs) in {2, 3}:
            raise LookupError("no report")

    failed = value("schedule_runs_total", outcome="failed")
    caplog.set_level(logging.INFO, "app.schedule")
    start = time.time()
    loop = every(ticks, SECONDS, job, name="job", timeout_seconds=0.1)
    async with background_task(loop):
        await eventually(lambda: len(runs) >= 6)
    assert runs[2] - runs[1] > SECONDS / 2
    assert await rows(ticks) == []
    assert value("schedule_runs_total", outcome="failed") == failed + 3
    assert value("schedule_last_success_timestamp_seconds") >= start - 1
    assert caplog.messages == [
        "scheduled job job failed: TimeoutError",
        "scheduled job job failed: LookupError: no report",
        "scheduled job job succeeded again",
    ]


async def test_unavailable_database_is_logged_once_and_no_failed_run(
    ticks: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process can run the job meanwhile, but each looks for its row again."""
    looks = 0
    acquire = ticks.acquire

    @contextlib.asynccontextmanager
    async def acquire_after_outage() -> AsyncIterator[Connection]:
        nonlocal looks
        looks += 1
        if looks < 4:
            raise UnavailableError("The database is unavailable.")
        async with acquire() as connection:
            yield connection

    async def job(_: Connection) -> None: ...

    monkeypatch.setattr(ticks, "acquire", acquire_after_outage)
    caplog.set_level(logging.INFO, "app.schedule")
    failed = value("schedule_runs_total", outcome="failed")
    succeeded = value("schedule_runs_total", outcome="succeeded")
    async with background_task(every(ticks, 0.1, job, name="job")):
        await eventually(lambda: value("schedule_runs_total", outcome="succeeded") > succeeded)
        await eventually(lambda: len(caplog.messages) == 2)
    assert value("schedule_runs_total", outcome="failed") == failed
    assert caplog.messages == [
        "database of scheduled job job failed: UnavailableError: 503: The database is unavailable.",
        "database of scheduled job job works again",
    ]


async def test_hanging_holder_loses_the_job(
    ticks: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a virtual machine that is suspended: the server ends its transaction."""
    monkeypatch.setattr(schedule, "HANG_SECONDS", 0.2)
    runs = 0

    async def job(connection: Connection) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            time.sleep(1)  # noqa: ASYNC251 - blocks the loop, and so the time limit

    async with background_task(every(ticks, SECONDS, job, name="hang", timeout_seconds=0.1)):
        await eventually(lambda: runs >= 3)
    labels = {"job": "hang", "outcome": "failed"}
    assert REGISTRY.get_sample_value("schedule_runs_total", labels) == 1


async def test_shorter_interval_takes_effect(ticks: Database) -> None:
    async with ticks.acquire() as connection:
        await connection.execute("insert into schedule values ('job', now() + interval '1 day')")
    runs: list[Connection] = []

    async def job(connection: Connection) -> None:
        runs.append(connection)

    async with background_task(every(ticks, SECONDS, job, name="job")):
        await eventually(lambda: len(runs) >= 2)


async def main() -> None:
    job = {"tick": tick, "tick_and_hang": tick_and_hang}[sys.argv[1]]
    async with Database(load_settings(), 2) as database:
        await every(database, SECONDS, job, name="tick")


if __name__ == "__main__":
    asyncio.run(main())
