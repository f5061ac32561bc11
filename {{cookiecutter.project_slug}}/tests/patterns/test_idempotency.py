"""A key has its effect once, whoever sends it, however often, and whatever fails meanwhile."""

import asyncio
from collections import Counter

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as some

from app.patterns.idempotency import (
    IdempotencyError,
    IdempotencyKey,
    StoredResponse,
    delete_expired,
    once,
)
from app.settings import Settings
from app.storage.postgres import Connection, Database
from app.web import problems


class Effects:
    """What was done for each key: a row in the database, and an answer that nobody else gets."""

    def __init__(self, database: Database) -> None:
        self.database, self.tries = database, 0

    async def request(
        self, key: str, content: bytes = b"", fails: bool = False, scope: str = "test"
    ) -> httpx.Response:
        async def work(connection: Connection) -> StoredResponse:
            self.tries += 1
            await connection.execute("insert into effects values ($1)", f"{scope} {key}")
            await asyncio.sleep(0)
            if fails:
                raise KeyError(key)
            return StoredResponse(201, {"Location": f"/{self.tries}"}, b"%d" % self.tries)

        async with self.database.acquire() as connection:
            answer = await once(connection, scope, key, content, work)
        return httpx.Response(
            answer.status_code, headers=dict(answer.headers), content=bytes(answer.body)
        )

    async def count(self) -> Counter[str]:
        async with self.database.acquire() as connection:
            return Counter(
                row["name"] for row in await connection.fetch("select name from effects")
            )

    async def clear(self) -> None:
        async with self.database.acquire() as connection:
            await connection.execute("create table if not exists effects (name text)")
            await connection.execute("truncate idempotency_keys, effects")


@pytest.fixture
async def effects(database: Database) -> Effects:
    effects = Effects(database)
    await effects.clear()
    return effects


async def test_a_second_request_gets_the_first_answer_and_has_no_effect(effects: Effects) -> None:
    first, second = await effects.request("a"), await effects.request("a")
    assert (first.status_code, first.content, first.headers["location"]) == (201, b"1", "/1")
    assert (second.status_code, second.content, second.headers["location"]) == (201, b"1", "/1")
    assert second.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert await effects.count() == {"test a": 1}


async def test_another_content_with_the_same_key_is_refused(effects: Effects) -> None:
    await effects.request("a", b"1")
    with pytest.raises(IdempotencyError) as refused:
        await effects.request("a", b"2")
    assert refused.value.status_code == 422


async def test_a_key_is_known_in_its_scope_alone(effects: Effects) -> None:
    await effects.request("a", scope="one")
    await effects.request("a", scope="other")
    assert await effects.count() == {"one a": 1, "other a": 1}


async def test_what_failed_left_nothing_and_is_done_by_the_next_request(effects: Effects) -> None:
    with pytest.raises(KeyError):
        await effects.request("a", fails=True)
    assert await effects.count() == {}
    assert (await effects.request("a")).status_code == 201
    assert await effects.count() == {"test a": 1}


async def test_of_many_at_once_one_has_the_effect_and_the_others_are_told_to_wait(
    effects: Effects,
) -> None:
    answers = await asyncio.gather(
        *(effects.request("a") for _ in range(50)), return_exceptions=True
    )
    statuses = [
        answer.status_code
        for answer in answers
        if isinstance(answer, httpx.Response | IdempotencyError)
    ]
    assert len(statuses) == 50
    assert set(statuses) <= {201, 409}
    assert all(
        error.headers == {"Retry-After": "1"}
        for error in answers
        if isinstance(error, IdempotencyError)
    )
    assert effects.tries == 1
    assert await effects.count() == {"test a": 1}


REQUESTS = some.lists(
    some.tuples(some.sampled_from("abc"), some.sampled_from([b"1", b"2"]), some.booleans()),
    max_size=24,
)


@given(waves=some.lists(REQUESTS, max_size=3))
@how(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_mixture_at_once_has_each_effect_once_and_each_answer_is_that_of_its_effect(
    settings: Settings, waves: list[list[tuple[str, bytes, bool]]]
) -> None:
    async def run() -> None:
        async with Database(settings, 11) as database:
            effects, done = Effects(database), dict[str, tuple[bytes, bytes]]()
            await effects.clear()
            for wave in waves:
                answers = await asyncio.gather(
                    *(effects.request(*each) for each in wave), return_exceptions=True
                )
                for (key, content, _), answer in zip(wave, answers, strict=True):
                    if isinstance(answer, httpx.Response):
                        assert done.setdefault(key, (content, answer.content)) == (
                            content,
                            answer.content,
                        )
                for (key, content, fails), answer in zip(wave, answers, strict=True):
                    if isinstance(answer, IdempotencyError):
                        assert answer.status_code == 409 or (
                            answer.status_code == 422 and done[key][0] != content
                        )
                    elif isinstance(answer, BaseException):
                        assert isinstance(answer, KeyError)
                        assert fails
            assert await effects.count() == {f"test {key}": 1 for key in done}

    asyncio.run(run())


async def test_old_keys_are_purged_in_batches_and_young_ones_stay(
    effects: Effects, database: Database
) -> None:
    for key in "abcd":
        await effects.request(key)
    async with database.acquire() as connection:
        await connection.execute(
            "update idempotency_keys set created_at = now() - interval '25 h' where key <> 'd'"
        )
        assert [await delete_expired(connection, 2) for _ in range(3)] == [2, 1, 0]
        assert await connection.fetchval("select string_agg(key, '') from idempotency_keys") == "d"


@pytest.mark.parametrize(
    ("field", "key"),
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
        ("a\nb", None),  # stands for two fields
    ],
)
async def test_a_key_has_1_to_255_printable_characters_with_or_without_quotes(
    field: str | None, key: str | None
) -> None:
    app = FastAPI()
    problems.install_handlers(app)

    @app.post("/")
    async def route(key: IdempotencyKey) -> str:
        return key

    fields = [] if field is None else field.encode("latin-1").split(b"\n")
    headers = [(b"Idempotency-Key", each) for each in fields]
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        answer = await client.post("/", headers=headers)
    if key is None:
        assert answer.status_code == 400
        assert "Idempotency-Key" in answer.json()["detail"]
    else:
        assert answer.json() == key
