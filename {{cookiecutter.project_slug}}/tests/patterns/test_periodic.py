"""Periodic jobs: full batches are repeated at once, and an error ends no loop."""

import logging

import pytest

from app.patterns import periodic
from app.patterns.periodic import BATCH, run_periodically
from app.storage.postgres import Connection, Database
from app.tasks import background_task
from tests.patterns.conftest import eventually

#: Far below the time for which the tests wait.
SECONDS = 0.01


async def test_full_batches_are_repeated_until_one_is_not_full(database: Database) -> None:
    handled = [BATCH, BATCH, 1]
    connections = []

    async def job(connection: Connection, batch: int) -> int:
        assert batch == BATCH
        assert connection.is_in_transaction()
        connections.append(connection)
        return handled.pop(0)

    await periodic._run(database, job)
    assert handled == []
    assert len(connections) == 3


async def test_failing_job_is_logged_once_and_stops_no_other(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [ValueError("no such table")] * 3
    runs = []

    async def fails_at_first(connection: Connection, batch: int) -> int:
        if failures:
            raise failures.pop()
        return 0

    async def other(connection: Connection, batch: int) -> int:
        runs.append(batch)
        return 0

    def is_over() -> bool:
        return "succeeded again" in caplog.text and len(runs) > 3

    caplog.set_level(logging.INFO, "app.batches")
    async with background_task(run_periodically(database, SECONDS, fails_at_first, other)):
        await eventually(is_over)
    lines = [record.getMessage() for record in caplog.records if record.name == "app.batches"]
    assert len(lines) == 2, lines
    assert "fails_at_first failed, will retry: ValueError('no such table')" in lines[0]
    assert "fails_at_first succeeded again" in lines[1]
