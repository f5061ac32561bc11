"""A payment is taken, stored and looked up; nonsense is refused without an echo."""

from uuid import uuid4

import httpx
import pytest

GOOD = {"amount": 1250, "currency": "EUR", "reference": "order-1"}


async def test_a_payment_is_stored_and_found_again(client: httpx.AsyncClient) -> None:
    created = await client.post("/payments", json=GOOD)
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


@pytest.mark.parametrize(("amount", "status"), [(1, 201), (2**63 - 1, 201), (2**63, 422), (0, 422), (-1, 422)])
async def test_an_amount_is_positive_and_fits_a_bigint(client: httpx.AsyncClient, amount: int, status: int) -> None:
    assert (await client.post("/payments", json=GOOD | {"amount": amount})).status_code == status


@pytest.mark.parametrize("reference", ["a", "x" * 64, "café 東京 💶", "'; drop table payments; --"])
async def test_a_reference_comes_back_as_it_was_sent(client: httpx.AsyncClient, reference: str) -> None:
    answer = await client.post("/payments", json=GOOD | {"reference": reference})
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
    answer = await client.post("/payments", json=GOOD | change)
    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
    assert "4111" not in answer.text


async def test_a_payment_id_that_is_no_uuid_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.get("/payments/4111111111111111")
    assert (answer.status_code, answer.json()["errors"]) == (
        422,
        [{"detail": "Input should be a valid UUID", "pointer": "path/payment_id"}],
    )
