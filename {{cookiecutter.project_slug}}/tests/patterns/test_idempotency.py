"""Idempotency keys: one effect per key, under concurrency, repetition and failures."""

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from hypothesis.configuration import set_hypothesis_home_dir

from app.patterns import idempotency
from app.patterns.idempotency import IdempotencyError, IdempotencyKey, StoredResponse
from app.settings import Settings
from app.storage.postgres import Connection, Database
from app.web import problems

# By default hypothesis makes a directory in the project.
set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))


class Effects:
    """Requests with an effect: a row in the database, and a response that is unique."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.attempts = 0

    async def request(
        self, key: str, content: bytes = b"", fails: bool = False, scope: str = "test"
    ) -> httpx.Response:
        async with self.database.acquire() as connection, connection.transaction():
            response = await idempotency.replay(connection, scope, key, content)
            if response is None:
                response = await self._apply(connection, f"{scope} {key}", fails)
                await idempotency.remember(connection, scope, key, content, response)
        rendered = response.render()
        headers = dict(rendered.headers)
        return httpx.Response(rendered.status_code, headers=headers, content=bytes(rendered.body))

    async def _apply(self, connection: Connection, name: str, fails: bool) -> StoredResponse:
        self.attempts += 1
        await connection.execute("insert into effects values ($1)", name)
        await asyncio.sleep(0)
        if fails:
            raise KeyError(name)
        return StoredResponse(201, {"Location": f"/{self.attempts}"}, b"%d" % self.attempts)

    async def count(self) -> Counter[str]:
        async with self.database.acquire() as connection:
            rows = await connection.fetch("select name from effects")
        return Counter(row["name"] for row in rows)

    async def clear(self) -> None:
        async with self.database.acquire() as connection:
            await connection.execute("create table if not exists effects (name text)")
            await connection.execute("truncate idempotency_keys, effects")


@pytest.fixture
async def effects(database: Database) -> Effects:
    effects = Effects(database)
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
    with pytest.raises(KeyError):
        await effects.request("a", fails=True)
    assert await effects.count() == {}
    assert (await effects.request("a")).status_code == 201
    assert await effects.count() == {"test a": 1}


async def test_keys_outside_a_transaction_are_rejected(database: Database) -> None:
    response = StoredResponse(201, {}, b"")
    async with database.acquire() as connection:
        with pytest.raises(RuntimeError, match="transaction"):
            await idempotency.replay(connection, "test", "a", b"")
        with pytest.raises(RuntimeError, match="transaction"):
            await idempotency.remember(connection, "test", "a", b"", response)


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
    assert effects.attempts == 1
    assert await effects.count() == {"test a": 1}


#: A key, a content, and whether the request fails.
REQUEST = strategies.tuples(
    strategies.sampled_from("abc"), strategies.sampled_from([b"1", b"2"]), strategies.booleans()
)
#: Concurrent requests.
WAVE = strategies.lists(REQUEST, max_size=24)


@given(waves=strategies.lists(WAVE, max_size=3))
@hypothesis_settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mix_of_requests_has_one_effect_per_key(
    settings: Settings, waves: list[list[tuple[str, bytes, bool]]]
) -> None:
    """Each response is that of the effect; each error has a cause in the requests."""
    asyncio.run(run_waves(settings, waves))


async def run_waves(settings: Settings, waves: list[list[tuple[str, bytes, bool]]]) -> None:
    async with Database(settings, 11) as database:
        effects = Effects(database)
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
            assert isinstance(result, KeyError)
            assert fails


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
