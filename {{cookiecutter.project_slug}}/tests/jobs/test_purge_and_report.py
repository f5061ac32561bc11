"""The two scheduled jobs of the runtime: the purge of old jobs, and the report of a day."""

from datetime import UTC, datetime, timedelta

import pytest

from app.jobs import purge, report
from app.storage.postgres import Database

NOW = datetime.now(UTC)
INSERT = """
    insert into jobs (type, payload, status, attempts, started_at, finished_at, run_at)
    values ($1, '{}', $2, $3, $4::timestamptz - make_interval(secs => $5), $4, $6)
"""


@pytest.fixture
def dispatcher() -> dict[str, str]:
    """Not parametrized: nothing is handed out here."""
    return {}


async def insert(
    database: Database,
    status: str,
    *,
    days_ago: float = 0,
    kind: str = "score",
    seconds: float = 1,
    attempts: int = 1,
) -> None:
    """Insert a job that ended, or was due, some days ago."""
    at = NOW - timedelta(days=days_ago)
    finished_at = None if status == "queued" else at
    await database.pool.execute(INSERT, kind, status, attempts, finished_at, seconds, at)


async def test_purge_deletes_old_jobs_that_need_no_decision(database: Database) -> None:
    statuses = ("succeeded", "cancelled", "failed", "queued", "running")
    for status in statuses:
        for days_ago in (purge.KEEP_DAYS - 0.1, purge.KEEP_DAYS + 0.1):
            await insert(database, status, days_ago=days_ago)
    assert await purge.delete_old(database) == 2
    rows = await database.pool.fetch("select status, count(*) as number from jobs group by 1")
    left = {row["status"]: row["number"] for row in rows}
    assert left == {"succeeded": 1, "cancelled": 1, "failed": 2, "queued": 2, "running": 2}


async def test_purge_works_in_batches_for_a_limited_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "BATCH", 2)
    for _ in range(5):
        await insert(database, "succeeded", days_ago=purge.KEEP_DAYS + 1)
    async with database.acquire() as connection:
        assert await purge.delete_batch(connection) == 2
    with monkeypatch.context() as patch:
        patch.setattr(purge, "WORK_SECONDS", -1)
        assert await purge.delete_old(database) == 2
    assert await purge.delete_old(database) == 1


async def test_report_has_the_jobs_of_its_day_by_type_the_slowest_first(database: Database) -> None:
    await insert(database, "succeeded", seconds=1, days_ago=0.1)
    await insert(database, "succeeded", seconds=3, days_ago=0.2, attempts=3)
    await insert(database, "failed", seconds=2, days_ago=0.9, attempts=5)
    await insert(database, "cancelled", seconds=1, days_ago=0.1)
    await insert(database, "succeeded", kind="slow", seconds=60, days_ago=0.1)
    await insert(database, "queued", days_ago=0.5)
    await insert(database, "queued", days_ago=-0.5)
    for status in ("succeeded", "failed"):
        await insert(database, status, days_ago=1.1)
        await insert(database, status, days_ago=-0.1)
    async with database.acquire() as connection:
        found = await report.summarize(connection, NOW - timedelta(days=1), NOW)
    assert (found.succeeded, found.failed, found.cancelled, found.due) == (3, 1, 1, 1)
    seconds_since_start = (datetime.now(UTC) - NOW).total_seconds()
    assert found.oldest_seconds == pytest.approx(43_200 + seconds_since_start, abs=60)
    slow, score = found.types
    assert (slow.type, slow.p95_seconds) == ("slow", 60)
    assert (score.type, score.succeeded, score.failed, score.cancelled) == ("score", 2, 1, 1)
    assert (score.retries, score.p50_seconds) == (6, 1.5)


async def test_report_of_a_day_without_jobs(database: Database) -> None:
    async with database.acquire() as connection:
        found = await report.summarize(connection, NOW - timedelta(days=1), NOW)
    assert (found.succeeded, found.due, found.oldest_seconds, found.types) == (0, 0, 0, [])
