"""The guards of the SQL statements: each has a scenario, which fails without the guard."""

import asyncio
import random
import string
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from app.errors import UnavailableError
from app.jobs import starts, table
from app.jobs.starts import Job, SupersededError
from app.storage.postgres import Database
from tests.jobs.conftest import Environment, enqueue, row
from tests.jobs.work import Nothing
from tests.patience import patience

#: Less than the time limit of a command.
BLOCKED_SECONDS = 1.0
Scenario = Callable[[Database], Awaitable[None]]


@pytest.fixture
def dispatcher() -> Environment:
    """No dispatcher: the tests are about the statements that both use."""
    return {}


async def claim(database: Database, limit: int = 10) -> list[Job]:
    async with database.acquire() as connection:
        return await starts.claim_due(connection, limit)


async def expire(database: Database) -> UUID | None:
    """Have all leases expire; return the job of one."""
    await database.pool.execute("update jobs set lease_until = now() - interval '1 second'")
    async with database.acquire() as connection:
        return await starts.find_expired(connection)


async def claim_expired(database: Database, job_id: UUID) -> Job | None:
    async with database.acquire() as connection:
        return await starts.claim_expired(connection, job_id)


async def succeed(database: Database, job: Job) -> bool:
    """Return whether a start can end its job."""
    try:
        async with database.acquire() as connection:
            await starts.succeed(connection, job)
    except SupersededError:
        return False
    return True


async def a_claimed_job_is_not_claimed_again(database: Database) -> None:
    job_id = await enqueue(database, "a")
    assert [job.job_id for job in await claim(database)] == [job_id]
    assert await claim(database) == []


async def a_locked_job_does_not_delay_the_others(database: Database) -> None:
    first = await enqueue(database, "a")
    second = await enqueue(database, "a")
    async with database.acquire() as connection, connection.transaction():
        await connection.execute("select from jobs where job_id = $1 for update", first)
        async with patience(BLOCKED_SECONDS):
            assert [job.job_id for job in await claim(database)] == [second]


async def a_start_does_not_wait_for_the_disk(database: Database) -> None:
    """Its commit only: that of an effect does."""
    job_id = await enqueue(database, "a")
    query = "select current_setting('synchronous_commit')"
    async with database.acquire() as connection:
        await connection.execute("set synchronous_commit = on")
        async with connection.transaction():
            assert await starts.claim(connection, job_id) is not None
            assert await connection.fetchval(query) == "off"
        assert await connection.fetchval(query) == "on"


async def a_job_is_not_claimed_before_its_time(database: Database) -> None:
    await enqueue(database, "a", run_at=datetime.now(UTC) + timedelta(seconds=30))
    assert await claim(database) == []


async def a_claim_is_limited_to_the_free_places(database: Database) -> None:
    for _ in range(3):
        await enqueue(database, "a")
    assert len(await claim(database, limit=2)) == 2


async def each_start_counts(database: Database) -> None:
    job_id = await enqueue(database, "a")
    [first] = await claim(database)
    await expire(database)
    second = await claim_expired(database, job_id)
    assert second is not None
    assert [(each.attempts, each.starts) for each in (first, second)] == [(1, 1), (2, 2)]


async def an_older_start_cannot_end_the_job(database: Database) -> None:
    job_id = await enqueue(database, "a")
    [first] = await claim(database)
    await expire(database)
    second = await claim_expired(database, job_id)
    assert second is not None
    assert not await succeed(database, first)
    assert await succeed(database, second)


async def a_cancelled_job_cannot_succeed(database: Database) -> None:
    job_id = await enqueue(database, "a")
    [job] = await claim(database)
    async with database.acquire() as connection:
        assert await table.cancel(connection, job_id)
    assert not await succeed(database, job)
    assert (await row(database, job_id))["status"] == "cancelled"


async def a_succeeded_job_cannot_be_cancelled(database: Database) -> None:
    job_id = await enqueue(database, "a")
    [job] = await claim(database)
    assert await succeed(database, job)
    async with database.acquire() as connection:
        assert not await table.cancel(connection, job_id)


async def a_job_with_a_lease_is_left_to_its_worker(database: Database) -> None:
    job_id = await enqueue(database, "a")
    await claim(database)
    async with database.acquire() as connection:
        assert await starts.find_expired(connection) is None
    assert await claim_expired(database, job_id) is None


async def deliver(database: Database, job_id: UUID) -> Job | None:
    """Start a job as RabbitMQ hands it out."""
    async with database.acquire() as connection:
        return await starts.claim(connection, job_id)


async def a_message_that_comes_again_starts_nothing(database: Database) -> None:
    job_id = await enqueue(database, "a")
    assert await deliver(database, job_id)
    assert await deliver(database, job_id) is None
    async with database.acquire() as connection:
        assert not await starts.has_expired(connection, job_id)
    await expire(database)
    async with database.acquire() as connection:
        assert await starts.has_expired(connection, job_id)
    assert await deliver(database, job_id) is None
    assert await claim_expired(database, job_id)


async def a_message_that_comes_early_starts_nothing(database: Database) -> None:
    run_at = datetime.now(UTC) + timedelta(minutes=1)
    job_id = await enqueue(database, "a", run_at=run_at)
    assert await deliver(database, job_id) is None


async def a_worker_that_renews_keeps_its_job(database: Database) -> None:
    job_id = await enqueue(database, "a")
    jobs = await claim(database)
    await expire(database)
    async with database.acquire() as connection:
        await starts.renew(connection, jobs)
        assert await starts.find_expired(connection) is None
    assert await claim_expired(database, job_id) is None


async def a_renewal_extends_only_its_own_start(database: Database) -> None:
    job_id = await enqueue(database, "a")
    jobs = await claim(database)
    await expire(database)
    assert await claim_expired(database, job_id)
    await expire(database)
    async with database.acquire() as connection:
        await starts.renew(connection, jobs)
        assert await starts.find_expired(connection) == job_id


async def a_released_start_does_not_count(database: Database) -> None:
    job_id = await enqueue(database, "a")
    [first] = await claim(database)
    async with database.acquire() as connection:
        await starts.release(connection, first)
    [second] = await claim(database)
    assert second.attempts == 1
    # A response that was lost: the release is repeated, and the new start goes on.
    async with database.acquire() as connection:
        await starts.release(connection, first)
    assert (await row(database, job_id))["status"] == "running"
    assert await succeed(database, second)


async def a_retry_is_due_after_its_pause(database: Database) -> None:
    job_id = await enqueue(database, "a")
    [job] = await claim(database)
    async with database.acquire() as connection:
        await starts.retry(connection, job, 30, "later", is_counted=False)
    assert await claim(database) == []
    stored = await row(database, job_id)
    assert (stored["status"], stored["attempts"], stored["error"]) == ("queued", 0, "later")


async def a_key_identifies_one_job(database: Database) -> None:
    first = await enqueue(database, "a", key="1")
    assert await enqueue(database, "a", key="1") == first
    assert (
        len({first, await enqueue(database, "a", key="2"), await enqueue(database, "b", key="1")})
        == 3
    )
    assert await enqueue(database, "a") != await enqueue(database, "a")


class Mutation(NamedTuple):
    """A statement without one of its guards, and the scenario that fails then."""

    statement: str
    guard: str
    replacement: str
    scenario: Scenario


NEWER = " and starts = $2"
MUTATIONS = [
    Mutation("_CLAIM_DUE", "status = 'queued'", "true", a_claimed_job_is_not_claimed_again),
    Mutation("_CLAIM_DUE", " skip locked", "", a_locked_job_does_not_delay_the_others),
    Mutation("_CLAIM_DUE", " and run_at <= now()", "", a_job_is_not_claimed_before_its_time),
    Mutation("_CLAIM_DUE", "limit $2", "limit $2 + 1", a_claim_is_limited_to_the_free_places),
    Mutation("_CLAIM", "status = 'queued' and", "", a_message_that_comes_again_starts_nothing),
    Mutation("_CLAIM", " and run_at <= now()", "", a_message_that_comes_early_starts_nothing),
    Mutation("_CLAIM", "'off', true", "'on', true", a_start_does_not_wait_for_the_disk),
    Mutation("_CLAIM", "'off', true", "'off', false", a_start_does_not_wait_for_the_disk),
    Mutation(
        "_HAS_EXPIRED", " and lease_until < now()", "", a_message_that_comes_again_starts_nothing
    ),
    Mutation("_CLAIM_EXPIRED", "attempts = attempts + 1,", "", each_start_counts),
    Mutation("_CLAIM_EXPIRED", "starts = starts + 1,", "", an_older_start_cannot_end_the_job),
    Mutation("_SUCCEED", NEWER, " and $2 > 0", an_older_start_cannot_end_the_job),
    Mutation("_SUCCEED", " and status = 'running'", "", a_cancelled_job_cannot_succeed),
    Mutation(
        "_FIND_EXPIRED", " and lease_until < now()", "", a_job_with_a_lease_is_left_to_its_worker
    ),
    Mutation(
        "_CLAIM_EXPIRED", " and lease_until < now()", "", a_job_with_a_lease_is_left_to_its_worker
    ),
    Mutation(
        "_RENEW",
        "make_interval(secs => $1)",
        "$1 * interval '0'",
        a_worker_that_renews_keeps_its_job,
    ),
    Mutation("_RENEW", " and jobs.starts = mine.starts", "", a_renewal_extends_only_its_own_start),
    Mutation("_RELEASE", ", attempts = attempts - 1", "", a_released_start_does_not_count),
    Mutation("_RELEASE", NEWER, " and $2 > 0", a_released_start_does_not_count),
    Mutation(
        "_RETRY",
        "attempts = attempts - $4",
        "attempts = attempts - 0 * $4",
        a_retry_is_due_after_its_pause,
    ),
    Mutation(
        "_RETRY",
        "now() + make_interval(secs => $3)",
        "now() - make_interval(secs => $3)",
        a_retry_is_due_after_its_pause,
    ),
]
SCENARIOS = [
    *{each.scenario: None for each in MUTATIONS},
    a_succeeded_job_cannot_be_cancelled,
    a_key_identifies_one_job,
]


async def passes(scenario: Scenario, database: Database) -> bool:
    """Return whether a scenario passes on an empty table."""
    await database.pool.execute("truncate jobs")
    try:
        await scenario(database)
    except (AssertionError, TimeoutError, UnavailableError):
        return False
    return True


async def test_scenarios_pass(database: Database) -> None:
    for scenario in SCENARIOS:
        assert await passes(scenario, database), scenario.__name__


async def test_each_guard_is_needed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    for mutation in MUTATIONS:
        statement = getattr(starts, mutation.statement)
        assert mutation.guard in statement
        mutated = statement.replace(mutation.guard, mutation.replacement)
        with monkeypatch.context() as patch:
            patch.setattr(starts, mutation.statement, mutated)
            assert not await passes(mutation.scenario, database), mutation


async def test_concurrent_claims_give_each_job_to_one_worker(database: Database) -> None:
    jobs = {await enqueue(database, "a") for _ in range(60)}
    claims = await asyncio.gather(*[claim(database, limit=7) for _ in range(12)])
    claimed = [job.job_id for found in claims for job in found]
    claimed += [job.job_id for job in await claim(database, limit=60)]
    assert len(claimed) == len(jobs)
    assert set(claimed) == jobs


async def test_job_of_a_transaction_that_is_rolled_back_does_not_exist(database: Database) -> None:
    async with database.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await table.enqueue(connection, "a", Nothing())
        await transaction.rollback()
    assert await claim(database) == []


async def test_enqueue_outside_a_transaction_is_rejected(database: Database) -> None:
    async with database.acquire() as connection:
        with pytest.raises(RuntimeError, match="transaction"):
            await table.enqueue(connection, "a", Nothing())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"key": "a\x00b"}, "must not contain NUL"),
        ({"key": "ä" * 1001}, "2000 bytes at most, not 2002"),
        (
            {"run_at": datetime(2030, 1, 1, tzinfo=UTC).replace(tzinfo=None)},
            "run_at=2030-01-01T00:00:00 must have a time zone",
        ),
    ],
)
async def test_keys_without_index_and_times_without_zone_are_rejected(
    database: Database, options: dict[str, Any], problem: str
) -> None:
    async with database.acquire() as connection, connection.transaction():
        with pytest.raises(ValueError, match=problem):
            await table.enqueue(connection, "a", Nothing(), **options)


async def test_longest_key_fits_into_the_index(database: Database) -> None:
    """It is random: Postgres compresses others."""
    key = "".join(random.choices(string.printable, k=table.MAX_KEY_BYTES))
    async with database.acquire() as connection, connection.transaction():
        kind = "a" * 100
        job_id = await table.enqueue(connection, kind, Nothing(), key=key)
        assert await table.enqueue(connection, kind, Nothing(), key=key) == job_id
