"""Idempotency keys: one effect per key, under concurrency, repetition and failures."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from hypothesis.configuration import set_hypothesis_home_dir

from app.errors import UnavailableError
from app.patterns import idempotency
from app.patterns.idempotency import Claim, IdempotencyError, IdempotencyKey, StoredResponse
from app.settings import Settings
from app.storage.postgres import Database
from app.web import problems

# By default hypothesis makes a directory in the project.
set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))


#: An effect that fails for the name null.
EFFECT = "insert into effects"
#: Claim and effect in one statement.
ONE_STATEMENT = f"""
    with claimed as ({idempotency.CLAIM}), effect as ({EFFECT} select $7 from claimed)
    select true from claimed
"""


class Effects:
    """Requests with an effect: a row in the database, and a response that is unique."""

    def __init__(self, database: Database, has_steps: bool) -> None:
        self.database = database
        self.apply = self._apply_in_steps if has_steps else self._apply_at_once
        self.requests = 0

    async def request(
        self, key: str, content: bytes = b"", fails: bool = False, scope: str = "test"
    ) -> httpx.Response:
        self.requests += 1
        new = StoredResponse(201, {"Location": f"/{self.requests}"}, b"%d" % self.requests)
        name = None if fails else f"{scope} {key}"
        stored = await self.apply(Claim(scope, key, content, new), name)
        rendered = stored.render()
        headers = dict(rendered.headers)
        return httpx.Response(rendered.status_code, headers=headers, content=bytes(rendered.body))

    async def _apply_in_steps(self, claim: Claim, name: str | None) -> StoredResponse:
        async with self.database.acquire() as connection:
            async with connection.transaction():
                if await idempotency.claim(connection, claim):
                    await asyncio.sleep(0)
                    await connection.execute(f"{EFFECT} values ($1)", name)
                    return claim.response
            return await idempotency.replay(connection, claim)

    async def _apply_at_once(self, claim: Claim, name: str | None) -> StoredResponse:
        async with self.database.acquire() as connection:
            if await connection.fetchval(ONE_STATEMENT, *claim.arguments(), name):
                return claim.response
            return await idempotency.replay(connection, claim)

    async def count(self) -> Counter[str]:
        async with self.database.acquire() as connection:
            rows = await connection.fetch("select name from effects")
        return Counter(row["name"] for row in rows)

    async def clear(self) -> None:
        async with self.database.acquire() as connection:
            await connection.execute("create table if not exists effects (name text not null)")
            await connection.execute("truncate idempotency_keys, effects")


@pytest.fixture(params=[True, False], ids=["steps", "one statement"])
def has_steps(request: pytest.FixtureRequest) -> bool:
    """Whether the claim is a statement before those of the effects, or a part of theirs."""
    return bool(request.param)


@pytest.fixture
async def effects(database: Database, has_steps: bool) -> Effects:
    effects = Effects(database, has_steps)
    await effects.clear()
    return effects


async def test_repeated_request_gets_the_stored_response(effects: Effects) -> None:
    first = await effects.request("a")
    second = await effects.request("a")
    for response in (first, second):
        assert response.status_code == 201
        assert response.content == b"1"
        assert response.headers["location"] == "/1"
        assert response.headers["content-type"] == "application/json"
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert await effects.count() == {"test a": 1}


async def test_key_of_different_content_is_rejected_with_422(effects: Effects) -> None:
    await effects.request("a", b"1")
    with pytest.raises(IdempotencyError) as rejected:
        await effects.request("a", b"2")
    assert rejected.value.status_code == 422


async def test_key_is_unique_within_its_scope_only(effects: Effects) -> None:
    await effects.request("a", scope="one")
    await effects.request("a", scope="other")
    assert await effects.count() == {"one a": 1, "other a": 1}


async def test_failed_request_stores_nothing(effects: Effects) -> None:
    with pytest.raises(asyncpg.NotNullViolationError):
        await effects.request("a", fails=True)
    assert await effects.count() == {}
    assert (await effects.request("a")).status_code == 201
    assert await effects.count() == {"test a": 1}


async def test_claim_outside_a_transaction_is_rejected(database: Database) -> None:
    claim = Claim("test", "a", b"", StoredResponse(201, {}, b""))
    async with database.acquire() as connection:
        with pytest.raises(RuntimeError, match="transaction"):
            await idempotency.claim(connection, claim)


async def test_concurrent_requests_with_one_key_run_once(effects: Effects) -> None:
    """The others get the stored response, or 409 while the first one is in progress."""
    requests = [effects.request("a") for _ in range(50)]
    results = await asyncio.gather(*requests, return_exceptions=True)
    statuses = [
        result.status_code
        for result in results
        if isinstance(result, httpx.Response | IdempotencyError)
    ]
    assert len(statuses) == 50
    assert set(statuses) <= {201, 409}
    errors = [result for result in results if isinstance(result, IdempotencyError)]
    assert all(error.headers == {"Retry-After": "1"} for error in errors)
    assert await effects.count() == {"test a": 1}


#: A key, a content, and whether the request fails.
REQUEST = strategies.tuples(
    strategies.sampled_from("abc"), strategies.sampled_from([b"1", b"2"]), strategies.booleans()
)
#: Concurrent requests.
WAVE = strategies.lists(REQUEST, max_size=24)


@given(waves=strategies.lists(WAVE, max_size=3))
@hypothesis_settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mix_of_requests_has_one_effect_per_key(
    settings: Settings, has_steps: bool, waves: list[list[tuple[str, bytes, bool]]]
) -> None:
    """Each response is that of the effect; each error has a cause in the requests."""
    asyncio.run(run_waves(settings, has_steps, waves))


async def run_waves(
    settings: Settings, has_steps: bool, waves: list[list[tuple[str, bytes, bool]]]
) -> None:
    async with Database(settings, 11) as database:
        effects = Effects(database, has_steps)
        await effects.clear()
        done: dict[str, tuple[bytes, bytes]] = {}
        for wave in waves:
            requests = [effects.request(*each) for each in wave]
            results = await asyncio.gather(*requests, return_exceptions=True)
            check_wave(wave, results, done)
        assert await effects.count() == {f"test {key}": 1 for key in done}


def check_wave(
    wave: list[tuple[str, bytes, bool]],
    results: list[httpx.Response | BaseException],
    done: dict[str, tuple[bytes, bytes]],
) -> None:
    """Check the results of concurrent requests.

    `done` has the content and the response of each key that was used.
    """
    for (key, content, _), result in zip(wave, results, strict=True):
        if isinstance(result, httpx.Response):
            effect = (content, result.content)
            assert done.setdefault(key, effect) == effect
    for (key, content, fails), result in zip(wave, results, strict=True):
        if isinstance(result, IdempotencyError):
            is_of_another_request = key in done and done[key][0] != content
            assert result.status_code in {409, 422}
            assert result.status_code == 409 or is_of_another_request
        elif isinstance(result, BaseException):
            assert isinstance(result, asyncpg.NotNullViolationError)
            assert fails


def claim_of(scope: str, key: str) -> Claim:
    return Claim(scope, key, b"", StoredResponse(201, {}, b""))


async def a_known_key_is_not_claimed(database: Database) -> None:
    async with database.acquire() as connection:
        for is_new in (True, False):
            async with connection.transaction():
                assert await idempotency.claim(connection, claim_of("test", "a")) is is_new


async def a_key_in_use_delays_no_request(database: Database) -> None:
    async with database.acquire() as first, first.transaction():
        assert await idempotency.claim(first, claim_of("test", "a"))
        async with database.acquire() as second, second.transaction():
            await second.execute("set local lock_timeout = 500")
            assert not await idempotency.claim(second, claim_of("test", "a"))


async def another_scope_is_not_in_use(database: Database) -> None:
    async with database.acquire() as first, first.transaction():
        assert await idempotency.claim(first, claim_of("tes", "ta"))
        async with database.acquire() as second, second.transaction():
            assert await idempotency.claim(second, claim_of("test", "a"))


Scenario = Callable[[Database], Awaitable[None]]


@pytest.mark.parametrize(
    ("guard", "replacement", "scenario"),
    [
        ("on conflict do nothing", "", a_known_key_is_not_claimed),
        ("where pg_try_advisory_xact_lock(", "where 0 <> (", a_key_in_use_delays_no_request),
        (" || chr(31) || ", " || ", another_scope_is_not_in_use),
    ],
)
async def test_each_guard_of_the_claim_is_necessary(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    guard: str,
    replacement: str,
    scenario: Scenario,
) -> None:
    await scenario(database)
    assert idempotency.CLAIM.count(guard) == 1
    monkeypatch.setattr(idempotency, "CLAIM", idempotency.CLAIM.replace(guard, replacement))
    await database.pool.execute("truncate idempotency_keys")
    with pytest.raises((AssertionError, asyncpg.PostgresError, UnavailableError)):
        await scenario(database)


async def test_expired_keys_are_deleted_in_batches(effects: Effects, database: Database) -> None:
    for key in "abcd":
        await effects.request(key)
    async with database.acquire() as connection:
        await connection.execute("""
            update idempotency_keys set created_at = now() - interval '25 h' where key <> 'd'
        """)
        deleted = [await idempotency.delete_expired(connection, 2) for _ in range(3)]
        assert deleted == [2, 1, 0]
        assert await connection.fetchval("select string_agg(key, '') from idempotency_keys") == "d"


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("a", "a"),
        ('"a"', "a"),
        ("x" * 255, "x" * 255),
        ('"' + "x" * 255 + '"', "x" * 255),
        ("with space", "with space"),
        (None, None),
        ("", None),
        ('""', None),
        ("x" * 256, None),
        ("caf\u00e9", None),
        ("a\tb", None),
        ("a\nb", None),
    ],
)
async def test_key_has_1_to_255_printable_characters(header: str | None, key: str | None) -> None:
    """Quotes are optional. A line break stands for two headers."""
    app = FastAPI()
    problems.install_handlers(app)

    @app.post("/")
    async def route(key: IdempotencyKey) -> str:
        return key

    values = [] if header is None else header.encode("latin-1").split(b"\n")
    headers = [(b"Idempotency-Key", value) for value in values]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/", headers=headers)
    if key is None:
        assert response.status_code == 400
        assert "Idempotency-Key" in response.json()["detail"]
    else:
        assert response.json() == key
