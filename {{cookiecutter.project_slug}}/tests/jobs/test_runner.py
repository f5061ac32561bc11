"""What becomes of a job: its effect and its end are one, and failures have bounds."""

import asyncio
import contextlib
import json
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from app.jobs import relay, starts, table
from app.jobs.alone import Alone
from app.jobs.handlers import Handler, Handlers, Run, handlers
from app.jobs.runner import Runner
from app.jobs.starts import Job
from app.jobs.worker import Clients
from app.settings import Settings
from app.storage.postgres import Database
from tests.jobs.conftest import all_ended, effects, ended, enqueue, row, until, working
from tests.jobs.work import ATTEMPTS, TIMEOUT_SECONDS, Nothing, Seconds, take_effect
from tests.service_process import DEADLINE_SECONDS

#: Leaves a job as a worker that died does.
ORPHAN = """
    update jobs set status = 'running', starts = 1, attempts = 1, started_at = now(),
        lease_until = now() where job_id = $1
"""
FAR = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture
def may_end(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Lets the jobs of the type `hold` end, which take effect then."""
    event = asyncio.Event()

    async def hold(run: Run, _: Nothing) -> None:
        await event.wait()
        await take_effect(run)

    monkeypatch.setitem(handlers.by_type, "hold", Handler(Nothing, hold, 1, 60))
    return event


async def test_effect_and_end_are_one_transaction(database: Database, worker: Clients) -> None:
    job_id = await enqueue(database, "wait", Seconds())
    job = await ended(database, job_id)
    assert (job["status"], job["attempts"], json.loads(job["result"])) == (
        "succeeded",
        1,
        {"score": 1},
    )
    assert await effects(database, job_id) == 1


async def test_failed_commit_leaves_neither_effect_nor_end(
    database: Database, worker: Clients
) -> None:
    await database.pool.execute("insert into effects values (gen_random_uuid(), 1, 1)")
    job = await ended(database, await enqueue(database, "rollback"))
    assert job["status"] == "failed"
    assert job["error"].startswith(asyncpg.UniqueViolationError.__name__)
    assert await effects(database, job["job_id"]) == 0


@pytest.mark.parametrize(
    ("kind", "status", "attempts", "error"),
    [
        ("poison", "failed", 1, "PoisonError: there is no such conversation"),
        ("raise", "failed", ATTEMPTS, "ValueError: no luck"),
        ("exit", "failed", 1, "SystemExit: 3"),
        ("abort", "failed", 1, "AbortError: "),
        (
            "never",
            "failed",
            1,
            "ValueError: LaterError: seconds=inf must be between 0 and 31622400",
        ),
        ("crash", "failed", ATTEMPTS, "CrashError: 500: The computation failed."),
        ("forget", "succeeded", 1, None),
        ("later", "succeeded", 1, None),
        ("outage", "succeeded", 1, None),
        ("slow", "failed", 2, "CommandTimeoutError: 503: The database timed out."),
    ],
)
async def test_each_outcome_has_its_number_of_attempts(
    database: Database, worker: Clients, kind: str, status: str, attempts: int, error: str | None
) -> None:
    """Poison fails at once; outages and `LaterError` do not count, whatever the limit is.

    A command of the job that is too slow does: it may be so forever.
    """
    job = await ended(database, await enqueue(database, kind))
    assert (job["status"], job["attempts"], job["error"]) == (status, attempts, error)


async def test_invalid_payload_fails_without_its_values(
    database: Database, worker: Clients
) -> None:
    job_id = await enqueue(database, "wait", Nothing())
    other = await enqueue(database, "unknown", run_at=datetime.now(UTC) + timedelta(days=1))
    assert (await ended(database, job_id))["status"] == "succeeded"
    update = "update jobs set type = 'wait', payload = $2, run_at = now() where job_id = $1"
    await database.pool.execute(update, other, '{"seconds": "hunter2"}')
    job = await ended(database, other)
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert job["error"].startswith("PoisonError: invalid payload: seconds: ")
    assert "hunter2" not in job["error"]


async def test_timeout_kills_the_computation(database: Database, worker: Clients) -> None:
    begin = asyncio.get_running_loop().time()
    job = await ended(database, await enqueue(database, "hang", Seconds(seconds=600)))
    assert (job["status"], job["attempts"]) == ("failed", 2)
    assert job["error"] == f"TimeoutError: not done within {TIMEOUT_SECONDS:g} s"
    assert asyncio.get_running_loop().time() - begin < 20 * TIMEOUT_SECONDS
    # The only process was killed, and replaced.
    done = await ended(database, await enqueue(database, "compute", Seconds()))
    assert done["status"] == "succeeded"


async def test_type_without_handler_is_retried_then_fails(
    database: Database, worker: Clients
) -> None:
    """During a rollout, workers of the newer release may have a handler."""
    job = await ended(database, await enqueue(database, "unknown"))
    assert (job["status"], job["attempts"]) == ("failed", 5)
    assert job["error"] == "LookupError: no handler for unknown"


async def test_jobs_cancelled_while_running_have_no_effect(
    database: Database, settings: Settings, may_end: asyncio.Event
) -> None:
    async with working(settings.model_copy(update={"job_concurrency": 30})):
        jobs = [await enqueue(database, "hold") for _ in range(21)]
        query = "select count(*) = 21 from jobs where type = 'hold' and status = 'running'"
        await until(lambda: database.pool.fetchval(query))
        async with database.acquire() as connection:
            for job in jobs[1:]:
                assert await table.cancel(connection, job)
        # The shutdown waits for them.
        may_end.set()
    assert await effects(database) == 1
    assert await effects(database, jobs[0]) == 1
    assert {(await row(database, job))["status"] for job in jobs[1:]} == {"cancelled"}


async def test_computations_wait_for_a_process(database: Database, worker: Clients) -> None:
    """The pool of a web process rejects calls when too many wait; here each waits for its turn."""
    jobs = [await enqueue(database, "compute", Seconds(seconds=0.01)) for _ in range(24)]
    assert {(await ended(database, job))["attempts"] for job in jobs} == {1}


async def test_run_at_delays_the_start(database: Database, worker: Clients) -> None:
    due = datetime.now(UTC) + timedelta(seconds=1)
    job = await ended(database, await enqueue(database, "wait", Seconds(), run_at=due))
    assert job["started_at"] >= due


async def test_shutdown_finishes_short_jobs_and_releases_long_ones(
    database: Database, settings: Settings
) -> None:
    """A released start does not count, and is due at once."""
    brief = settings.model_copy(update={"graceful_timeout_seconds": 7})
    async with working(brief):
        short = await enqueue(database, "wait", Seconds(seconds=1))
        long = await enqueue(database, "wait", Seconds(seconds=60))

        async def are_running() -> bool:
            return all([(await row(database, job))["attempts"] for job in (short, long)])

        await until(are_running)
    begin = asyncio.get_running_loop().time()
    assert (await row(database, short))["status"] == "succeeded"
    released = await row(database, long)
    values = [released[name] for name in ("status", "attempts", "starts")]
    assert values == ["queued", 0, 1]
    assert await effects(database) == 1
    assert asyncio.get_running_loop().time() - begin < 5


async def test_suspect_that_waits_does_not_start_during_the_shutdown(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, may_end: asyncio.Event
) -> None:
    """It has not started, so that nothing counts; another worker starts it, alone."""
    monkeypatch.setattr(relay, "RECOVER_SECONDS", 0.1)
    waits = asyncio.Event()
    enter = Alone.enter
    finish = Runner.finish

    def notice(self: Alone, *, alone: bool) -> AbstractAsyncContextManager[None]:
        if alone:
            waits.set()
        return enter(self, alone=alone)

    async def end_and_finish(self: Runner, grace_seconds: float) -> None:
        asyncio.get_running_loop().call_soon(may_end.set)
        await finish(self, grace_seconds)

    monkeypatch.setattr(Alone, "enter", notice)
    monkeypatch.setattr(Runner, "finish", end_and_finish)
    async with working(settings):
        held = await enqueue(database, "hold")
        await until(lambda: _has_started(database, held))
        suspect = await enqueue(database, "wait", Seconds(), run_at=FAR)
        await database.pool.execute(ORPHAN, suspect)
        await asyncio.wait_for(waits.wait(), DEADLINE_SECONDS)
    assert (await row(database, held))["status"] == "succeeded"
    values = [(await row(database, suspect))[name] for name in ("status", "attempts", "starts")]
    assert values == ["running", 1, 1]
    async with working(settings):
        await all_ended(database)
    assert (await row(database, suspect))["starts"] == 2
    assert await effects(database, suspect) == 1


async def test_lease_is_renewed_while_handlers_hold_all_connections(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another worker would start them once more, and count that."""
    monkeypatch.setattr(starts, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(starts, "RENEW_SECONDS", 0.2)

    async def hold(run: Run, payload: Nothing) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(run.database.pool.get_max_size()):
                await stack.enter_async_context(run.database.acquire())
            await asyncio.sleep(2 * starts.LEASE_SECONDS)

    monkeypatch.setitem(handlers.by_type, "hold", Handler(Nothing, hold, 1, 60))
    query = "select count(*) from jobs where status = 'running' and lease_until < now()"
    async with working(settings):
        held = await enqueue(database, "hold")
        while not (await row(database, held))["finished_at"]:
            assert await database.pool.fetchval(query) == 0
            await asyncio.sleep(0.1)
    values = [(await row(database, held))[name] for name in ("status", "starts")]
    assert values == ["succeeded", 1]


async def _has_started(database: Database, job_id: UUID) -> bool:
    return bool((await row(database, job_id))["starts"])


async def test_outage_of_postgres_loses_no_job_and_repeats_no_effect(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker waits for Postgres with what it must store."""
    monkeypatch.setattr(starts, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(starts, "RENEW_SECONDS", 0.5)
    jobs = [await enqueue(database, "wait", Seconds(seconds=0.02)) for _ in range(100)]
    url = settings.database_url.get_secret_value()
    server, _, name = url.rpartition("/")
    admin = await asyncpg.connect(f"{server}/postgres")
    terminate = "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1"
    async with working(settings):
        await until(lambda: database.pool.fetchval("select count(*) > 10 from effects"))
        await admin.execute(f"alter database {name} allow_connections false")
        for _ in range(15):
            await admin.execute(terminate, name)
            await asyncio.sleep(0.1)
        await admin.execute(f"alter database {name} allow_connections true")
        await admin.close()
        await all_ended(database)
    assert await effects(database) == len(jobs)
    assert {(await row(database, job))["status"] for job in jobs} == {"succeeded"}


def test_second_handler_of_a_type_is_rejected() -> None:
    own = Handlers()
    function: Any = None
    own.add("a", Nothing)(function)
    with pytest.raises(ValueError, match="two handlers for a"):
        own.add("a", Nothing)


@pytest.mark.parametrize("has_gate", [True, False])
async def test_suspects_run_alone(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, has_gate: bool
) -> None:
    """The control, which claims suspects as it does others, runs them together."""
    overlaps: list[int] = []
    run = Runner._run

    async def count(self: Runner, job: Job) -> None:
        if job.starts > 1:
            overlaps.append(len(self.under_way))
        await run(self, job)

    monkeypatch.setattr(Runner, "_run", count)
    if not has_gate:
        either = "(status = 'queued' or lease_until < now())"
        for name in ("_CLAIM_DUE", "_CLAIM"):
            claim = getattr(starts, name).replace("status = 'queued'", either)
            monkeypatch.setattr(starts, name, claim)
        monkeypatch.setattr(starts, "_FIND_EXPIRED", "select null::uuid")
        monkeypatch.setattr(starts, "_HAS_EXPIRED", "select $1::uuid is null")
    jobs = [await enqueue(database, "wait", Seconds(seconds=0.1)) for _ in range(20)]
    for job in jobs[:4]:
        await database.pool.execute(ORPHAN, job)
    async with working(settings):
        await all_ended(database)
    assert await effects(database) == 20
    if has_gate:
        assert overlaps == [0] * 4
    else:
        assert max(overlaps) > 0
