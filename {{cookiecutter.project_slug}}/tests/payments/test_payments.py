"""A payment is taken, stored and looked up; nonsense is refused without an echo."""

from uuid import uuid4

import httpx
import pytest

from app.main import create_app
from app.patterns import rate_limit
from app.settings import Settings
from app.storage import redis
from tests.conftest import InProcess

GOOD = {"amount": 1250, "currency": "EUR", "reference": "order-1"}


async def post(
    client: httpx.AsyncClient, key: str | None = None, /, **change: object
) -> httpx.Response:
    """Send a payment, with a new key unless one is given."""
    return await client.post(
        "/payments", json=GOOD | change, headers={"Idempotency-Key": key or str(uuid4())}
    )


async def test_a_payment_is_stored_and_found_again(client: httpx.AsyncClient) -> None:
    created = await post(client)
    assert created.status_code == 201
    payment = created.json()
    assert created.headers["location"] == f"/payments/{payment['payment_id']}"
    assert {name: payment[name] for name in GOOD} == GOOD
    assert payment["status"] == "pending"
    found = await client.get(created.headers["location"])
    assert (found.status_code, found.json()) == (200, payment)
    assert created.headers["cache-control"] == found.headers["cache-control"] == "no-store"


async def test_an_unknown_payment_is_404(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/payments/{uuid4()}")
    assert (answer.status_code, answer.json()["detail"]) == (404, "There is no such payment.")


@pytest.mark.parametrize(
    ("amount", "status"), [(1, 201), (2**63 - 1, 201), (2**63, 422), (0, 422), (-1, 422)]
)
async def test_an_amount_is_positive_and_fits_a_bigint(
    client: httpx.AsyncClient, amount: int, status: int
) -> None:
    assert (await post(client, amount=amount)).status_code == status


@pytest.mark.parametrize("reference", ["a", "x" * 64, "café 東京 💶", "'; drop table payments; --"])
async def test_a_reference_comes_back_as_it_was_sent(
    client: httpx.AsyncClient, reference: str
) -> None:
    answer = await post(client, reference=reference)
    assert answer.json()["reference"] == reference


@pytest.mark.parametrize(
    ("change", "pointer"),
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
async def test_nonsense_is_refused_without_an_echo(
    client: httpx.AsyncClient, change: dict[str, object], pointer: str
) -> None:
    answer = await post(client, **change)
    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
    assert "41111111" not in answer.text


async def test_a_payment_id_that_is_no_uuid_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.get("/payments/4111111111111111")
    assert (answer.status_code, answer.json()["errors"]) == (
        422,
        [{"detail": "Input should be a valid UUID", "pointer": "path/payment_id"}],
    )


async def test_a_payment_that_is_sent_again_is_the_same_payment(client: httpx.AsyncClient) -> None:
    first, second = await post(client, "again"), await post(client, "again")
    assert (first.status_code, first.content) == (second.status_code, second.content)
    assert first.headers["location"] == second.headers["location"]
    assert second.headers["idempotent-replayed"] == "true"
    other = await post(client, "again", amount=1)
    assert (other.status_code, other.headers["content-type"]) == (422, "application/problem+json")
    assert (await client.post("/payments", json=GOOD)).status_code == 400


async def test_a_payment_that_is_written_in_another_way_is_the_same_payment(
    client: httpx.AsyncClient,
) -> None:
    one, other = (
        '{"amount":1,"currency":"EUR","reference":"a"}',
        '{ "reference": "\\u0061", "currency": "EUR", "amount": 1 }',
    )
    fields = {"Idempotency-Key": str(uuid4()), "Content-Type": "application/json"}
    answers = [
        await client.post("/payments", content=content, headers=fields) for content in (one, other)
    ]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()


async def test_pages_show_every_payment_once_the_newest_first_while_new_ones_come(
    client: httpx.AsyncClient,
) -> None:
    sent = [(await post(client)).json()["payment_id"] for _ in range(7)]
    found: list[str] = []
    path = "/payments?limit=3"
    while path:
        answer = (await client.get(path)).json()
        assert len(answer["items"]) <= 3
        found += [item["payment_id"] for item in answer["items"]]
        await post(client)
        path = (
            f"/payments?limit=3&cursor={answer['next_cursor']}"
            if answer["next_cursor"] and set(sent) - set(found)
            else ""
        )
    assert [payment_id for payment_id in found if payment_id in sent] == sent[::-1]
    assert len(found) == len(set(found))


async def test_a_page_has_50_payments_unless_told_otherwise_and_100_at_most(
    client: httpx.AsyncClient,
) -> None:
    for _ in range(51):
        await post(client)
    page = (await client.get("/payments")).json()
    assert (len(page["items"]), bool(page["next_cursor"])) == (50, True)
    for wrong in (
        "limit=0",
        "limit=101",
        "limit=x",
        "cursor=",
        "cursor=" + "x" * 45,
        "cursor=" + "0" * 44,
    ):
        assert (await client.get(f"/payments?{wrong}")).status_code == 422, wrong
    assert (await client.get("/payments?cursor=" + "0" * 45)).json() == {
        "items": [],
        "next_cursor": None,
    }
    assert (await client.get("/payments?cursor=" + "f" * 45)).status_code == 200


async def test_a_caller_that_sends_too_many_is_told_when_to_come_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((rate_limit, "BUDGET_SECONDS"), (redis, "TIMEOUT_SECONDS")):
        monkeypatch.setattr(
            module, name, 10.0
        )  # a Redis that is slow on a busy machine would let everybody through
    async with InProcess(
        create_app(settings.model_copy(update={"rate_limit_per_minute": 2}))
    ) as client:
        client.headers["X-Forwarded-For"] = "203.0.113.8"  # whose window begins here
        statuses = [(await post(client)).status_code for _ in range(3)]
        refused = await client.post("/payments", content="nonsense")
        other = await client.post(
            "/payments", content="nonsense", headers={"X-Forwarded-For": "203.0.113.9"}
        )
    assert statuses[-1] == refused.status_code == 429
    assert other.status_code == 400
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit-policy"] == '"payments";q=2;w=60'


async def test_a_method_that_is_not_served_is_told_all_that_are(client: httpx.AsyncClient) -> None:
    for path, methods in (
        ("/payments", {"GET", "POST"}),
        (f"/payments/{uuid4()}", {"GET"}),
        ("/", {"GET"}),
    ):
        answer = await client.delete(path)
        assert (answer.status_code, answer.headers["content-type"]) == (
            405,
            "application/problem+json",
        )
        assert set(answer.headers["allow"].split(", ")) == methods
