"""Schedules in a worker, with each dispatcher: the purge and the report are done when due."""

import logging
from typing import Any

import pytest

from app.jobs import purge, report, schedules
from app.jobs.purge import Purged
from app.jobs.report import Report
from app.jobs.worker import Clients
from app.storage.postgres import Database
from tests.jobs.conftest import Start, ended, enqueue, ready, until
from tests.jobs.work import Seconds

MAKE_DUE = "update schedules set next_at = now() - interval '1 second' where name = $1"
IS_DECLARED = "select true from schedules where name = $1"
INSERT_OLD = """
    insert into jobs (type, payload, status, finished_at)
    select 'wait', '{}', 'succeeded', now() - interval '30 days' from generate_series(1, 3)
"""


async def result_of(database: Database, kind: str) -> str:
    """Make a schedule due, and return the result of its job."""

    async def is_declared() -> bool:
        return bool(
            await database.pool.fetchval("select true from schedules where name = $1", kind)
        )

    async def result() -> Any:
        return await database.pool.fetchval("select result from jobs where type = $1", kind)

    await until(is_declared)
    await database.pool.execute(MAKE_DUE, kind)
    await until(result)
    return str(await result())


async def test_purge_and_report_are_done_when_due(
    worker: Clients,
    database: Database,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "app.jobs")
    monkeypatch.setattr(schedules, "LOOK_SECONDS", 0.05)
    await ended(database, await enqueue(database, "wait", Seconds()))
    found = Report.model_validate_json(await result_of(database, report.TYPE))
    # Due at the last 04:00, which may be before the job of this test.
    assert found.succeeded <= 1
    assert "jobs of a day" in caplog.messages
    await database.pool.execute(INSERT_OLD)
    purged = Purged.model_validate_json(await result_of(database, purge.TYPE))
    assert purged.deleted == 3


async def test_worker_with_an_invalid_schedule_does_not_start(start: Start) -> None:
    """One line that names it, no traceback, and exit code 1."""
    worker = start(TEST_SCHEDULE="0 25 * * *")
    assert worker.process.wait(30) == 1
    problem = "'0 25 * * *' is not a cron expression: Bad hour"
    assert worker.text == f"schedule wait: {problem}\n"


async def test_schedule_of_a_feature_runs_in_the_worker_process(
    start: Start, database: Database
) -> None:
    """Its payload is a time, of which the handler needs nothing."""
    worker = start(TEST_SCHEDULE="0 3 * * *")
    await ready(worker)
    await result_of(database, "wait")
    count = "select count(*) from jobs where type = 'wait' and status = 'succeeded'"
    assert await database.pool.fetchval(count) == 1
