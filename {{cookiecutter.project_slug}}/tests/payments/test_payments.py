"""Payments over HTTP: created, read and listed; invalid input is rejected without an echo."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic import SecretStr

from app.errors import UnavailableError
from app.main import create_app
from app.patterns import cache_aside, outbox, rate_limit
from app.patterns.idempotency import KeyInUseError
from app.payments import repository
from app.payments.schemas import NewPayment
from app.payments.service import Payments
from app.settings import Settings
from app.storage import redis
from app.storage.postgres import Connection, Database
from app.storage.redis import RedisClient, create_redis
from tests import default_token
from tests.conftest import InProcess
from tests.tcp_proxy import proxying

VALID = {"amount": 1250, "currency": "EUR", "reference": "order-1"}
#: Of one key, after the faults.
MAX_ATTEMPTS = 50
PROBLEM = "application/problem+json"


@pytest.fixture
async def redis_client(settings: Settings) -> AsyncIterator[RedisClient]:
    async with create_redis(settings) as client:
        yield client


async def post(
    client: httpx.AsyncClient, key: str | None = None, /, **changes: object
) -> httpx.Response:
    """Create a payment, with a new key unless one is given."""
    headers = {"Idempotency-Key": key or str(uuid4())}
    return await client.post("/payments", json=VALID | changes, headers=headers)


async def test_created_payment_is_found_at_its_location(client: httpx.AsyncClient) -> None:
    created = await post(client)
    assert created.status_code == 201
    payment = created.json()
    assert created.headers["location"] == f"/payments/{payment['payment_id']}"
    assert {name: payment[name] for name in VALID} == VALID
    assert payment["status"] == "pending"
    found = await client.get(created.headers["location"])
    assert found.status_code == 200
    assert found.json() == payment
    assert created.headers["cache-control"] == "no-store"
    assert found.headers["cache-control"] == "no-store"


async def test_location_includes_the_root_path(settings: Settings) -> None:
    """A repeated request gets the same one."""
    service = InProcess(create_app(settings))
    transport = httpx.ASGITransport(service, root_path="/api")
    key = str(uuid4())
    async with (
        service,
        httpx.AsyncClient(
            transport=transport, base_url="http://test/api", headers=default_token.headers
        ) as client,
    ):
        first = await post(client, key)
        second = await post(client, key)
    location = f"/api/payments/{first.json()['payment_id']}"
    assert first.headers["location"] == location
    assert second.headers["location"] == location


async def test_unknown_payment_is_404(client: httpx.AsyncClient) -> None:
    response = await client.get(f"/payments/{uuid4()}")
    assert response.status_code == 404
    assert response.json()["detail"] == "There is no such payment."


@pytest.mark.parametrize(
    ("amount", "status"), [(1, 201), (2**63 - 1, 201), (2**63, 422), (0, 422), (-1, 422)]
)
async def test_amount_must_be_positive_and_fit_a_bigint(
    client: httpx.AsyncClient, amount: int, status: int
) -> None:
    response = await post(client, amount=amount)
    assert response.status_code == status


@pytest.mark.parametrize("reference", ["a", "x" * 64, "café 東京 💶", "'; drop table payments; --"])
async def test_reference_is_returned_unchanged(client: httpx.AsyncClient, reference: str) -> None:
    response = await post(client, reference=reference)
    assert response.json()["reference"] == reference


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"amount": 12.5}, "#/amount"),
        ({"amount": "1250"}, "#/amount"),
        ({"amount": True}, "#/amount"),
        ({"currency": "EURO"}, "#/currency"),
        ({"currency": "eur"}, "#/currency"),
        ({"currency": "ABC"}, "#/currency"),
        ({"reference": ""}, "#/reference"),
        ({"reference": "x" * 65}, "#/reference"),
        ({"reference": "a\nb"}, "#/reference"),
        ({"reference": "a\u0000b"}, "#/reference"),
        ({"card": "4111111111111111"}, "#"),
    ],
)
async def test_invalid_payment_is_rejected_without_an_echo(
    client: httpx.AsyncClient, changes: dict[str, object], pointer: str
) -> None:
    response = await post(client, **changes)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
    assert "41111111" not in response.text


async def test_invalid_payment_id_is_rejected(client: httpx.AsyncClient) -> None:
    response = await client.get("/payments/4111111111111111")
    assert response.status_code == 422
    assert response.json()["errors"] == [
        {"detail": "Input should be a valid UUID", "pointer": "path/payment_id"}
    ]


async def test_repeated_request_gets_the_same_payment(client: httpx.AsyncClient) -> None:
    first = await post(client, "again")
    second = await post(client, "again")
    assert first.status_code == second.status_code
    assert first.content == second.content
    for name in ("location", "cache-control", "content-type"):
        assert first.headers[name] == second.headers[name]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = await post(client, "again", amount=1)
    assert other.status_code == 422
    assert other.headers["content-type"] == PROBLEM
    without_key = await client.post("/payments", json=VALID)
    assert without_key.status_code == 400


async def test_payment_is_one_round_trip_and_its_replay_two(
    settings: Settings, redis_client: RedisClient
) -> None:
    """Counted between the service and Postgres."""
    url = urlsplit(settings.database_url.get_secret_value())
    with proxying(url.port or 5432) as proxy:
        server = url.netloc.rpartition("@")[0] + f"@127.0.0.1:{proxy.port}"
        through_proxy = SecretStr(url._replace(netloc=server).geturl())
        changed = settings.model_copy(update={"database_url": through_proxy})
        async with Database(changed, 2, "test") as database:
            payments = Payments(changed, database, redis_client)

            async def count(work: Awaitable[object]) -> int:
                before = proxy.requests
                await work
                return proxy.requests - before

            def create(key: str) -> Awaitable[object]:
                return payments.create(NewPayment.model_validate(VALID), key, "", "")

            # Connects, and prepares the statements.
            for work in (create("first"), create("first"), payments.get(uuid4())):
                await work
            one = await count(payments.get(uuid4()))
            second = str(uuid4())
            assert await count(create(second)) == one == 1
            assert await count(create(second)) == 2


def test_each_key_pays_once_when_clients_leave_and_connections_are_lost(
    settings: Settings, clean_database: str
) -> None:
    """One payment, one event and one response, from two workers without a relay.

    By `asyncio.run`: asyncpg leaves futures with errors of lost connections, which fail a test on
    the loop of the session.
    """
    responses = asyncio.run(pay_under_faults(settings, [f"key-{number}" for number in range(40)]))
    assert {len(bodies) for bodies in responses.values()} == {1}


async def pay_under_faults(settings: Settings, keys: list[str]) -> dict[str, set[bytes]]:
    """Send 8 requests for each key; return the different responses."""
    responses: dict[str, set[bytes]] = {key: set() for key in keys}
    choices = random.Random(1)
    end_connections = """
        select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()
    """
    async with (
        create_redis(settings) as redis_client,
        Database(settings, 8, "one") as one,
        Database(settings, 8, "other") as other,
        Database(settings, 2, "admin") as admin,
    ):
        workers = [Payments(settings, each, redis_client) for each in (one, other)]

        async def pay(key: str, patience_seconds: float | None = None) -> None:
            new = NewPayment.model_validate(VALID)
            with contextlib.suppress(KeyInUseError, UnavailableError, TimeoutError):
                async with asyncio.timeout(patience_seconds):
                    stored = await choices.choice(workers).create(new, key, "", "")
                responses[key].add(stored.body)

        for key in keys:
            requests = [pay(key, choices.choice((None, 0.001, 0.005))) for _ in range(8)]
            await asyncio.gather(*requests, admin.pool.execute(end_connections))
        attempts = 0
        while set() in responses.values() and attempts < MAX_ATTEMPTS:
            attempts += 1
            await asyncio.gather(*[pay(key) for key in keys])
        for table in ("payments", "outbox", "idempotency_keys"):
            count = f"select count(*) from {table}"
            assert await admin.pool.fetchval(count) == len(keys)
    return responses


async def test_equal_json_in_another_notation_is_the_same_request(
    client: httpx.AsyncClient,
) -> None:
    contents = (
        '{"amount":1,"currency":"EUR","reference":"a"}',
        '{ "reference": "\\u0061", "currency": "EUR", "amount": 1 }',
    )
    headers = {"Idempotency-Key": str(uuid4()), "Content-Type": "application/json"}
    responses = [
        await client.post("/payments", content=content, headers=headers) for content in contents
    ]
    assert [response.status_code for response in responses] == [201, 201]
    assert responses[0].json() == responses[1].json()


async def test_pages_list_each_payment_once_newest_first(client: httpx.AsyncClient) -> None:
    """New payments between two pages change nothing."""
    sent = []
    for _ in range(7):
        response = await post(client)
        sent.append(response.json()["payment_id"])
    found: list[str] = []
    path = "/payments?limit=3"
    while path:
        page = (await client.get(path)).json()
        assert len(page["items"]) <= 3
        found += [item["payment_id"] for item in page["items"]]
        await post(client)
        is_complete = set(sent) <= set(found)
        cursor = page["next_cursor"]
        path = f"/payments?limit=3&cursor={cursor}" if cursor and not is_complete else ""
    assert [payment_id for payment_id in found if payment_id in sent] == sent[::-1]
    assert len(found) == len(set(found))


async def test_page_has_50_payments_by_default(client: httpx.AsyncClient) -> None:
    for _ in range(51):
        await post(client)
    page = (await client.get("/payments")).json()
    assert len(page["items"]) == 50
    assert page["next_cursor"]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "cursor=", "cursor=" + "x" * 45, "cursor=" + "0" * 44],
)
async def test_invalid_limit_or_cursor_is_rejected(client: httpx.AsyncClient, query: str) -> None:
    response = await client.get(f"/payments?{query}")
    assert response.status_code == 422


async def test_extreme_cursors_are_valid(client: httpx.AsyncClient) -> None:
    oldest = await client.get("/payments?cursor=" + "0" * 45)
    assert oldest.json() == {"items": [], "next_cursor": None}
    newest = await client.get("/payments?cursor=" + "f" * 45)
    assert newest.status_code == 200


async def test_totals_are_of_the_last_day_and_cached(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query is too dear for each request: see `cache_aside`, whose own tests are elsewhere."""
    monkeypatch.setattr(cache_aside, "BUDGET_SECONDS", 10.0)
    monkeypatch.setattr(redis, "TIMEOUT_SECONDS", 10.0)

    async def read(client: httpx.AsyncClient) -> dict[str, int]:
        response = await client.get("/payments/totals")
        assert response.status_code == 200
        items = response.json()["items"]
        return {item["status"]: item["amount"] for item in items if item["currency"] == "XTS"}

    def with_empty_cache() -> InProcess:
        prefix = {"redis_key_prefix": uuid4().hex}
        return InProcess(create_app(settings.model_copy(update=prefix)))

    async with with_empty_cache() as client:
        # Their sum is larger than a bigint.
        old, settled, *_ = [await post(client, currency="XTS", amount=2**62) for _ in range(5)]
        await database.retry(lambda connection: age(connection, old.json()["payment_id"]))
        settled_id = UUID(settled.json()["payment_id"])
        await database.retry(lambda connection: repository.settle(connection, uuid4(), settled_id))
        totals = {"pending": 3 * 2**62, "settled": 2**62}
        assert await read(client) == totals
        await post(client, currency="XTS", amount=1)
        assert await read(client) == totals
    async with with_empty_cache() as client:
        assert await read(client) == totals | {"pending": 3 * 2**62 + 1}


async def test_delivered_event_settles_once_in_one_statement(
    client: httpx.AsyncClient, database: Database
) -> None:
    """Concurrent deliveries too; a statement of its own is a transaction of its own."""
    payment_id = UUID((await post(client)).json()["payment_id"])
    event_id = uuid4()
    deliveries = [
        database.retry(lambda connection: repository.settle(connection, event_id, payment_id))
        for _ in range(5)
    ]
    await asyncio.gather(*deliveries)
    async with database.acquire() as connection:
        read = "select status from payments where payment_id = $1"
        assert await connection.fetchval(read, payment_id) == "settled"
        count = "select count(*) from inbox where message_id = $1"
        assert await connection.fetchval(count, event_id) == 1
        # Whatever undid it: a later delivery of the same event has no effect.
        undo = "update payments set status = 'pending' where payment_id = $1"
        await connection.execute(undo, payment_id)
        await repository.settle(connection, event_id, payment_id)
        assert await connection.fetchval(read, payment_id) == "pending"


async def age(connection: Connection, payment_id: str) -> None:
    """Make a payment older than a day."""
    older = "update payments set created_at = now() - interval '25 h' where payment_id = $1"
    await connection.execute(older, payment_id)


async def test_caller_over_the_rate_limit_gets_429(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even for an invalid request. Other callers are not affected."""
    # A Redis that is slow on a busy machine would let every request pass.
    monkeypatch.setattr(rate_limit, "BUDGET_SECONDS", 10.0)
    monkeypatch.setattr(redis, "TIMEOUT_SECONDS", 10.0)
    # An authenticated caller is the same one at each address.
    changes = {"rate_limit_per_minute": 2, "auth_issuer": None}
    app = create_app(settings.model_copy(update=changes))
    async with InProcess(app) as client:
        # An address of this test alone, so that its window begins here.
        client.headers["X-Forwarded-For"] = "203.0.113.8"
        statuses = [(await post(client)).status_code for _ in range(3)]
        rejected = await client.post("/payments", content="nonsense")
        other_caller = {"X-Forwarded-For": "203.0.113.9"}
        other = await client.post("/payments", content="nonsense", headers=other_caller)
    assert statuses[-1] == rejected.status_code == 429
    assert other.status_code == 400
    assert 0 < int(rejected.headers["retry-after"]) <= 60
    assert rejected.headers["ratelimit-policy"] == '"payments";q=2;w=60'


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/payments", {"GET", "HEAD", "POST"}),
        (f"/payments/{uuid4()}", {"GET", "HEAD"}),
        ("/", {"GET", "HEAD"}),
    ],
    ids=["list", "one", "root"],
)
async def test_unsupported_method_gets_the_allowed_ones(
    client: httpx.AsyncClient, path: str, methods: set[str]
) -> None:
    response = await client.delete(path)
    assert response.status_code == 405
    assert response.headers["content-type"] == PROBLEM
    assert set(response.headers["allow"].split(", ")) == methods


async def test_event_of_a_new_payment_is_published_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit wakes the relay, which would otherwise look again after a minute."""
    monkeypatch.setattr(outbox, "POLL_SECONDS", 60.0)
    async with (
        InProcess(create_app(settings)) as client,
        redis.create_redis(settings) as redis_client,
    ):
        for _ in range(2):
            payment_id = (await post(client)).json()["payment_id"]
            async with asyncio.timeout(30):
                while payment_id not in str(  # noqa: ASYNC110
                    await redis_client.xrange(redis_client.key("payment-events"))
                ):
                    await asyncio.sleep(0.05)
