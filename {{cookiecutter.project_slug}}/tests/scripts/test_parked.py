"""`make parked`: lists failed jobs, runs them again, deletes one; wrong IDs are one line."""

import os
import subprocess
import sys
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel

from app.jobs import starts, table
from app.storage.postgres import Database
from scripts.dev_services import Postgres, free_port
from scripts.parked import main
from tests.service_process import PROJECT

KIND = "report.wanted"


class Payload(BaseModel):
    """A payload without fields."""


class Parked:
    """The command in this process, on the database of the test."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self.captured = captured

    async def output(self, *arguments: str) -> str:
        """Run it; return its output."""
        self.captured.readouterr()
        await main(list(arguments))
        return self.captured.readouterr().out

    async def problem(self, *arguments: str) -> str:
        """Run it; return the line with which it fails."""
        with pytest.raises(SystemExit) as exit_:
            await main(list(arguments))
        message = str(exit_.value.code)
        assert "\n" not in message
        return message


@pytest.fixture
def parked(
    clean_database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Parked:
    monkeypatch.setenv("DATABASE_URL", clean_database)
    return Parked(capsys)


async def enqueue(database: Database) -> UUID:
    async with database.acquire() as connection, connection.transaction():
        return await table.enqueue(connection, KIND, Payload())


async def fail(database: Database, error: str) -> UUID:
    """Create a job, and have it fail."""
    job_id = await enqueue(database)
    async with database.acquire() as connection:
        job = await starts.claim(connection, job_id)
        assert job
        await starts.fail(connection, job, error)
    return job_id


async def status(database: Database, job_id: UUID) -> object:
    return await database.pool.fetchval("select status from jobs where job_id = $1", job_id)


async def test_failed_jobs_are_listed_in_a_table(database: Database, parked: Parked) -> None:
    assert await parked.output() == "No job has failed.\n"
    job_id = await fail(database, "first line\nsecond \x1b[31m line" + " x" * 500)
    await enqueue(database)
    heading, row, *rest = (await parked.output()).splitlines()
    assert heading.split() == ["JOB", "ID", "TYPE", "ATTEMPTS", "FAILED", "(UTC)", "ERROR"]
    assert row.split()[:3] == [str(job_id), KIND, "1"]
    assert row.index("first line second [31m line x") == heading.index("ERROR")
    assert len(row) < 400
    assert rest[1] == "Failed jobs: 1. Fix the cause, then run them again:"


async def test_job_runs_again_with_all_its_attempts(database: Database, parked: Parked) -> None:
    first = await fail(database, "one")
    second = await fail(database, "two")
    assert (await parked.output("--again", str(first))).startswith("Enqueued again: 1.")
    assert await status(database, first) == "queued"
    assert await status(database, second) == "failed"
    async with database.acquire() as connection:
        (job,) = await starts.claim_due(connection, 10)
    assert (job.job_id, job.attempts) == (first, 1)


async def test_all_failed_jobs_run_again(database: Database, parked: Parked) -> None:
    failed = [await fail(database, "one"), await fail(database, "two")]
    assert (await parked.output("--again", "all")).startswith("Enqueued again: 2.")
    assert [await status(database, job_id) for job_id in failed] == ["queued", "queued"]
    assert (await parked.output("--again", "all")).startswith("Enqueued again: 0.")


async def test_failed_job_is_deleted(database: Database, parked: Parked) -> None:
    job_id = await fail(database, "one")
    assert await parked.output("--drop", str(job_id)) == f"Deleted: {job_id}.\n"
    assert await status(database, job_id) is None


@pytest.mark.parametrize(("option", "name"), [("--again", "AGAIN"), ("--drop", "DROP")])
async def test_wrong_ids_are_one_line_with_the_reason(
    database: Database, parked: Parked, option: str, name: str
) -> None:
    queued = await enqueue(database)
    unknown = uuid4()
    assert f"{name}=seven: must be the ID of a failed job" in await parked.problem(option, "seven")
    assert f"{name}={unknown}: there is no such job" in await parked.problem(option, str(unknown))
    reason = f"{name}={queued}: the job is queued, not failed"
    assert reason in await parked.problem(option, str(queued))
    assert await status(database, queued) == "queued"


def test_database_without_the_table_or_server_is_one_line(postgres: Postgres) -> None:
    unavailable = f"postgresql://app:hunter2@127.0.0.1:{free_port()}/app"
    empty = f"{postgres.url.rpartition('/')[0]}/template1"
    for url, problem in (
        (unavailable, "DATABASE_URL: cannot connect: "),
        (empty, "the database has no table of jobs: run `make migrate`"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "scripts.parked"],
            cwd=PROJECT,
            env=os.environ | {"DATABASE_URL": url},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(problem)
        assert done.stderr.count("\n") == 1
        assert "hunter2" not in done.stderr
