"""Jobs under faults: none is lost, and each takes effect once.

Workers are stopped, killed and suspended, and Postgres crashes. The control runs without the fence
of the starts, and must repeat some effects: so the test can fail.
"""

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from scripts.dev_services import Postgres
from tests.databases import TEMPLATE, copy_database, drop_database
from tests.jobs.conftest import CREATE_EFFECTS, Worker
from tests.service_process import eventually

from conftest import ATTACK
from test_faults import durable, sql  # noqa: F401 - durable is a fixture

JOBS = 2000
JOB_SECONDS = 0.1
WORKERS = 4
FAULT_STEPS = 24
STEP_SECONDS = 0.5
LEASE_SECONDS = 2.0
#: Time limit for the jobs to end once everything works again.
DONE_SECONDS = 120
#: Time limit for a worker to end after SIGTERM.
STOP_SECONDS = 20
ENQUEUE = """
    insert into jobs (type, payload)
    select 'wait', format('{"seconds": %s}', $1::float8) from generate_series(1, $2)
"""
UNFINISHED = "select count(*) from jobs where status in ('queued', 'running')"
EFFECTS = "select job_id, count(*) from effects group by job_id"


@pytest.fixture
def url(database_url: str) -> Iterator[str]:
    """A database of its own, with a table for the effects of jobs."""
    url = copy_database(database_url, TEMPLATE, "jobs")
    sql(url, CREATE_EFFECTS)
    yield url
    drop_database(database_url, "jobs")


class Fleet:
    """Workers that are replaced when a fault ends them, as by a platform."""

    def __init__(self, module: str, url: str) -> None:
        self.module = module
        self.url = url
        self.workers = [self.start() for _ in range(WORKERS)]
        self.ended: list[Worker] = []

    def start(self) -> Worker:
        """Start a worker."""
        lease = str(LEASE_SECONDS)
        settings = {"DATABASE_URL": self.url, "TEST_LEASE_SECONDS": lease}
        return Worker(self.module, PYTHONPATH=str(ATTACK), **settings)

    def stop(self, number: int) -> None:
        """End one worker by a signal once it is ready, and start another."""
        worker = self.workers.pop(random.randrange(WORKERS))
        eventually(worker.is_ready)
        worker.process.send_signal(number)
        expected = 0 if number == signal.SIGTERM else -number
        assert worker.process.wait(STOP_SECONDS) == expected, worker.text
        self.ended.append(worker)
        self.workers.append(self.start())

    def suspend(self) -> None:
        """Suspend one worker for longer than its leases, as a machine that swaps does."""
        worker = psutil.Process(random.choice(self.workers).process.pid)
        worker.suspend()
        time.sleep(2 * LEASE_SECONDS)
        worker.resume()


@contextlib.contextmanager
def working(module: str, url: str) -> Iterator[Fleet]:
    """Run workers until the end of the block."""
    fleet = Fleet(module, url)
    try:
        eventually(lambda: all(worker.is_ready() for worker in fleet.workers))
        yield fleet
        eventually(lambda: all(worker.is_ready() for worker in fleet.workers))
    finally:
        codes = [worker.stop() for worker in fleet.workers]
        for worker in fleet.workers + fleet.ended:
            worker.output.close()
    assert codes == [0] * WORKERS


def run_jobs_under_faults(module: str, url: str, faults: Callable[[Fleet, int], None]) -> list[int]:
    """Run all jobs while faults happen; return how often each job took effect."""
    with working(module, url) as fleet:
        sql(url, ENQUEUE, JOB_SECONDS, JOBS)
        for step in range(FAULT_STEPS):
            faults(fleet, step)
            time.sleep(STEP_SECONDS)
        eventually(lambda: sql(url, UNFINISHED)[0][0] == 0, DONE_SECONDS)
    rows = sql(url, "select status, max(starts), count(*) from jobs group by status")
    print("status, most starts, jobs:", [tuple(row) for row in rows])
    effects = [row["count"] for row in sql(url, EFFECTS)]
    print(f"{len(effects)} jobs took effect, {sum(effects) - len(effects)} effects too many")
    return effects


def test_no_job_is_lost_and_each_takes_effect_once(url: str, postgres: Postgres) -> None:
    def faults(fleet: Fleet, step: int) -> None:
        if step == FAULT_STEPS // 2:
            postgres.stop("immediate")
            time.sleep(2 * LEASE_SECONDS)
            postgres.start()
        elif step % 8 == 0:
            fleet.suspend()
        else:
            fleet.stop(random.choice([signal.SIGTERM, signal.SIGKILL]))

    effects = run_jobs_under_faults("tests.jobs.worker", url, faults)
    assert len(effects) == JOBS
    assert set(effects) == {1}


def test_effects_are_repeated_without_the_fence(url: str) -> None:
    """The control: a worker that was suspended goes on with jobs that others have done."""

    def faults(fleet: Fleet, step: int) -> None:
        if step % 4 == 0:
            fleet.suspend()

    effects = run_jobs_under_faults("worker_without_fence", url, faults)
    assert max(effects) > 1
