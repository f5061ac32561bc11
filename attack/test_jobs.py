"""Jobs under faults, on both dispatchers: none is lost, and each takes effect once.

Workers are stopped, killed and suspended; Postgres crashes; RabbitMQ is killed and hangs. Each
control runs without a guard, and must fail: so the tests can.
"""

import random
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scripts.dev_rabbitmq import RabbitMQ
from scripts.dev_services import Postgres
from tests.databases import TEMPLATE, copy_database, drop_database
from tests.jobs.broker_server import require_rabbitmq
from tests.jobs.conftest import CREATE_EFFECTS
from tests.jobs.work import ATTEMPTS
from tests.service_process import eventually, frozen

from alerting import NAME, queries_without_data, watching
from conftest import ATTACK
from job_fleet import LEASE_SECONDS, Fleet, working
from scripts import dev_rabbitmq
from test_faults import sql

JOBS = 2000
WORKERS = 4
#: Of each kind: by SIGTERM and by SIGKILL.
STOPS = 6
#: Jobs last 0.1 to 0.5 s. So there is a backlog during all faults.
JOB_SECONDS = 0.3
#: RabbitMQ and a client close a connection on which nothing arrives for two or three times as long.
HEARTBEAT_SECONDS = 2
HANG_SECONDS = 6 * HEARTBEAT_SECONDS
#: A queue that is younger when RabbitMQ 3.10 is killed has no leader afterwards.
QUEUE_IS_STORED_SECONDS = 2
#: Time limit for the jobs to end once everything works again.
DONE_SECONDS = 120
ENQUEUE = """
    insert into jobs (type, payload)
    select $1, format('{"seconds": %s}', $2 * (1 + (random() - 0.5) * 4 / 3))
    from generate_series(1, $3)
"""
RUNNING = "select count(*) from jobs where status = 'running'"
UNFINISHED = "select count(*) from jobs where status in ('queued', 'running')"
FAILED = "select count(*) from jobs where type = $1 and status = 'failed'"
EFFECTS = "select count(*) from effects group by job_id"
SUMMARY = """
    select type, status, max(attempts) as attempts, max(starts) as starts, count(*) from jobs
    where type in ('wait', 'neighbor', 'kill', 'block') group by type, status order by type
"""
Faults = list[Callable[[], None]]


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[RabbitMQ]:
    """A RabbitMQ server, which tests kill."""
    require_rabbitmq()
    with dev_rabbitmq.rabbitmq() as server:
        yield server


@pytest.fixture(params=["postgres", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> RabbitMQ | None:
    """The dispatcher: RabbitMQ, or None for Postgres."""
    return request.getfixturevalue("rabbitmq") if request.param == "rabbitmq" else None


@pytest.fixture
def url(database_url: str) -> Iterator[str]:
    """A database with a table for the effects of jobs. It loses no commit in a crash."""
    url = copy_database(database_url, TEMPLATE, "jobs")
    sql(url, "alter database jobs set synchronous_commit = on")
    sql(url, CREATE_EFFECTS)
    yield url
    drop_database(database_url, "jobs")


@pytest.fixture
def settings(url: str, broker: RabbitMQ | None) -> dict[str, str]:
    """The settings of workers, with a queue of their own."""
    settings = {"DATABASE_URL": url, "PYTHONPATH": str(ATTACK)}
    if broker:
        settings["AMQP_URL"] = f"{broker.url}?heartbeat={HEARTBEAT_SECONDS}"
        settings["SERVICE_NAME"] = f"jobs-{secrets.token_hex(4)}"
    return settings


def number(url: str, query: str, *arguments: object) -> int:
    """Return the number that a query finds."""
    return int(sql(url, query, *arguments)[0][0])


def wait_until_done(url: str) -> None:
    """Wait until all jobs have ended, and print what became of them."""
    eventually(lambda: number(url, UNFINISHED) == 0, DONE_SECONDS)
    for row in sql(url, SUMMARY):
        print(dict(row))


def effects(url: str) -> list[int]:
    """Return how often each job took effect, of those that did."""
    return [row["count"] for row in sql(url, EFFECTS)]


def crash(postgres: Postgres) -> None:
    """End Postgres at once, and start it again after the leases have expired."""
    postgres.stop("immediate")
    time.sleep(2 * LEASE_SECONDS)
    postgres.start()


def kill(broker: RabbitMQ) -> None:
    """End RabbitMQ with SIGKILL, and start it again."""
    broker.kill()
    time.sleep(1)
    broker.start()


def hang(broker: RabbitMQ) -> None:
    """Suspend RabbitMQ until its connections have failed."""
    with frozen(broker.pid):
        time.sleep(HANG_SECONDS)


def plan(fleet: Fleet, postgres: Postgres, broker: RabbitMQ | None) -> Faults:
    """Return the faults in a random order. Those of servers are not among the first."""
    stops = [fleet.terminate, fleet.kill] * STOPS
    random.shuffle(stops)
    outages: Faults = [lambda: crash(postgres), fleet.suspend, fleet.suspend]
    if broker:
        outages += [lambda: kill(broker), lambda: hang(broker), lambda: kill(broker)]
    later = stops[2:] + outages
    random.shuffle(later)
    return stops[:2] + later


def test_no_job_is_lost_and_each_takes_effect_once(
    url: str, settings: dict[str, str], postgres: Postgres, broker: RabbitMQ | None
) -> None:
    with working(settings, WORKERS) as fleet:
        time.sleep(QUEUE_IS_STORED_SECONDS)
        faults = plan(fleet, postgres, broker)
        share = JOBS // len(faults)
        for fault in faults:
            sql(url, ENQUEUE, "wait", JOB_SECONDS, share)
            fault()
        sql(url, ENQUEUE, "wait", JOB_SECONDS, JOBS - share * len(faults))
        wait_until_done(url)
    found = effects(url)
    assert len(found) == JOBS
    assert set(found) == {1}


def test_effects_are_repeated_without_the_fence(url: str, settings: dict[str, str]) -> None:
    """The control: a worker that was suspended goes on with jobs that others have done."""
    with working(settings | {"TEST_WITHOUT": "fence"}, WORKERS) as fleet:
        for _ in range(8):
            sql(url, ENQUEUE, "wait", 2 * JOB_SECONDS, 100)
            eventually(lambda: number(url, RUNNING) > 6 * WORKERS)
            fleet.suspend()
            eventually(lambda: number(url, UNFINISHED) == 0, DONE_SECONDS)
            if max(effects(url)) > 1:
                return
    pytest.fail("no effect was repeated")


@pytest.mark.parametrize("without", ["", "alone"])
def test_neighbors_of_a_killer_are_done_unless_they_run_with_it(
    url: str, settings: dict[str, str], without: str
) -> None:
    """In the control, which runs suspects together, they reach their limit of attempts as well."""
    with working(settings | {"TEST_WITHOUT": without}, 1) as fleet:
        sql(url, ENQUEUE, "neighbor", 2 * JOB_SECONDS, 3)
        sql(url, ENQUEUE, "kill", 0.0, 1)
        sql(url, ENQUEUE, "neighbor", 2 * JOB_SECONDS, 3)

        def has_ended() -> bool:
            fleet.replace_killed()
            return number(url, UNFINISHED) == 0

        eventually(has_ended, DONE_SECONDS)
        wait_until_done(url)
    assert len(fleet.ended) >= ATTEMPTS
    assert number(url, FAILED, "kill") == 1
    if without:
        assert number(url, FAILED, "neighbor") > 0
    else:
        assert len(fleet.ended) == ATTEMPTS
        assert effects(url) == [1] * 6


def test_job_that_blocks_its_worker_fails_and_takes_no_other_along(
    url: str, settings: dict[str, str]
) -> None:
    """The leases expire, and RabbitMQ closes the connection. Its late end has no effect."""
    with working(settings, 2):
        sql(url, ENQUEUE, "block", HANG_SECONDS, 1)
        sql(url, ENQUEUE, "wait", JOB_SECONDS, 40)
        wait_until_done(url)
    assert number(url, FAILED, "block") == 1
    assert effects(url) == [1] * 40


def test_every_panel_of_jobs_has_data(url: str, settings: dict[str, str], tmp_path: Path) -> None:
    """Those of a worker that does jobs; the others of a dashboard are in test_alerts.py."""
    with working(settings, 1) as fleet:
        targets = {f"{NAME}-jobs": fleet.workers[0].port}
        with watching(tmp_path, targets) as watch:

            def has_data() -> bool:
                sql(url, ENQUEUE, "wait", JOB_SECONDS, 4)
                return queries_without_data(watch, "jobs") == []

            eventually(has_data, DONE_SECONDS)
        wait_until_done(url)


def test_jobs_longer_than_the_grace_are_done_by_another_worker(
    url: str, settings: dict[str, str]
) -> None:
    """Of the grace, 5 s are for the release of jobs, whose starts do not count."""
    with working(settings | {"GRACEFUL_TIMEOUT_SECONDS": "6"}, 2) as fleet:
        sql(url, ENQUEUE, "wait", 10 * JOB_SECONDS, 16)
        eventually(lambda: number(url, RUNNING) == 16)
        begin = time.monotonic()
        fleet.terminate()
        assert time.monotonic() - begin < 6
        wait_until_done(url)
    assert number(url, "select max(attempts) from jobs where type = 'wait'") == 1
    assert number(url, "select max(starts) from jobs where type = 'wait'") == 2
    assert effects(url) == [1] * 16
