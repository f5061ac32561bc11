"""Workers as processes: they share the jobs, survive each other's deaths, and end in time."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter

import psutil
import pytest

from app.storage.postgres import Database
from app.telemetry.context import request_context
from tests.documented_metrics import assert_documented
from tests.jobs.conftest import Start, Worker, all_ended, effects, ended, enqueue, ready, row, until
from tests.jobs.work import ATTEMPTS, Seconds
from tests.service_process import DEADLINE_SECONDS, PROJECT, eventually

pytestmark = pytest.mark.process

#: A short lease: a job of a worker that died is done soon after.
LEASE = {"TEST_LEASE_SECONDS": "2"}
IDS = {"request_id": "r-1", "trace_id": "0af7651916cd43dd8448eb211c80319c"}


async def starts_of(database: Database) -> Counter[int]:
    """Return how many jobs were started how often."""
    return Counter(
        found["starts"] for found in await database.pool.fetch("select starts from jobs")
    )


async def test_workers_share_the_jobs_and_end_in_time(database: Database, start: Start) -> None:
    """Each job starts once, in one of them; a SIGTERM lets the short ones finish: exit code 0.

    They need no Redis.
    """
    workers = [start(REDIS_URL="redis://127.0.0.1:1/0", **LEASE) for _ in range(3)]
    await ready(*workers)
    jobs = [await enqueue(database, "wait", Seconds(seconds=0.05)) for _ in range(150)]
    await until(lambda: database.pool.fetchval("select count(*) > 30 from effects"))
    first, *others = workers
    assert_documented(first.get("/metrics").text)
    assert await asyncio.to_thread(first.stop) == 0
    await all_ended(database)
    assert await effects(database) == len(jobs)
    assert await starts_of(database) == {1: len(jobs)}
    done = [worker.text.count('"job done"') for worker in workers]
    assert sum(done) == len(jobs)
    assert min(done) > 0, done
    assert [await asyncio.to_thread(worker.stop) for worker in others] == [0, 0]
    assert "Traceback" not in "".join(worker.text for worker in workers)


async def test_ids_of_the_request_are_in_every_line_of_its_job(
    database: Database, start: Start
) -> None:
    """Those of the processes that compute included."""
    worker = start()
    token = request_context.set(IDS)
    job_id = await enqueue(database, "compute", Seconds())
    request_context.reset(token)
    await ended(database, job_id)
    await until(lambda: _has_logged(worker, "job done"))
    lines = {
        line["message"]: line
        for line in worker.lines
        if line["message"] in ("before the computation", "computing", "job done")
    }
    assert len(lines) == 3
    for line in lines.values():
        assert {name: line.get(name) for name in IDS} == IDS
        assert line["job_id"] == str(job_id)
    assert lines["computing"]["pid"] != lines["job done"]["pid"]


async def _has_logged(worker: Worker, text: str) -> bool:
    return text in worker.messages


async def test_jobs_of_a_killed_worker_are_done_by_another(
    database: Database, start: Start
) -> None:
    """SIGKILL, such as by the kernel for lack of memory: each job has one effect."""
    first = start(**LEASE)
    jobs = [await enqueue(database, "wait", Seconds(seconds=0.4)) for _ in range(12)]
    query = "select count(*) = 8 from jobs where status = 'running'"
    await until(lambda: database.pool.fetchval(query))
    second = start(**LEASE)
    first.stop(signal.SIGKILL)
    await all_ended(database)
    assert [await effects(database, job) for job in jobs] == [1] * len(jobs)
    assert max(await starts_of(database)) == 2
    assert await asyncio.to_thread(second.stop) == 0


async def test_job_that_kills_its_workers_fails_and_takes_no_other_along(
    database: Database, start: Start
) -> None:
    """After `attempts` deaths it fails. Those that ran with it are started once more, alone."""
    neighbours = [await enqueue(database, "wait", Seconds(seconds=0.1)) for _ in range(20)]
    killer = await enqueue(database, "kill")
    neighbours += [await enqueue(database, "wait", Seconds(seconds=0.1)) for _ in range(20)]
    workers = [start(**LEASE)]

    async def has_ended() -> bool:
        if workers[-1].process.poll() is not None:
            assert workers[-1].process.returncode == -signal.SIGKILL, workers[-1].text
            workers.append(start(**LEASE))
        return (await row(database, killer))["finished_at"] is not None

    await until(has_ended, ATTEMPTS * DEADLINE_SECONDS)
    await all_ended(database)
    assert len(workers) == ATTEMPTS + 1
    failed = await row(database, killer)
    assert (failed["status"], failed["attempts"]) == ("failed", ATTEMPTS)
    assert failed["error"] == f"{ATTEMPTS} starts have not ended: it may kill its workers"
    found = [await row(database, job) for job in neighbours]
    assert {job["status"] for job in found} == {"succeeded"}
    assert max(job["starts"] for job in found) <= 2
    assert await effects(database) == len(neighbours)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux has the policy")
@pytest.mark.parametrize("yields", [True, False])
async def test_setting_decides_whether_computations_yield_the_cpu(
    start: Start, *, yields: bool
) -> None:
    worker = start(JOB_YIELDS_CPU=str(yields).lower())
    expected = os.SCHED_IDLE if yields else os.SCHED_OTHER

    def policies() -> list[int]:
        children = psutil.Process(worker.process.pid).children()
        return [os.sched_getscheduler(child.pid) for child in children]

    await asyncio.to_thread(eventually, lambda: policies() == [expected])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"JOB_CONCURRENCY": "0"}, "JOB_CONCURRENCY=0: should be greater than 0"),
        ({"JOB_TIMEZONE": "Mars/Base"}, "JOB_TIMEZONE=Mars/Base: must be a time zone"),
    ],
)
def test_invalid_setting_stops_the_start_with_one_line(
    settings: dict[str, str], expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.jobs_main"],
        cwd=PROJECT,
        env=os.environ | settings,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    [line] = done.stderr.decode().splitlines()
    assert line.startswith(f"configuration error: {expected}")
    assert done.stdout == b""
