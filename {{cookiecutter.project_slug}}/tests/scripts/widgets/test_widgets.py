"""The routes of widgets, each test on a clean database."""

from uuid import uuid4

import httpx
import pytest

from app.storage.postgres import Database
from tests.scripts.widgets.factory import store

pytestmark = pytest.mark.usefixtures("clean_database")


async def test_created_one_is_found_at_its_location(client: httpx.AsyncClient) -> None:
    created = await client.post("/widgets", json={"name": "one"})
    assert created.status_code == 201
    found = await client.get(created.headers["location"])
    assert found.status_code == 200
    assert found.json() == created.json()
    assert found.json()["name"] == "one"


async def test_unknown_one_is_404(client: httpx.AsyncClient) -> None:
    response = await client.get(f"/widgets/{uuid4()}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


async def test_newest_is_listed_first(client: httpx.AsyncClient, database: Database) -> None:
    stored = [await store(database, name=name) for name in ("one", "two", "three")]
    page = (await client.get("/widgets?limit=2")).json()
    assert [item["widget_id"] for item in page["items"]] == [
        str(stored[2].widget_id),
        str(stored[1].widget_id),
    ]


@pytest.mark.parametrize("name", ["a", "x" * 100, "café 東京 💶", "'; drop table widgets; --"])
async def test_name_is_returned_unchanged(client: httpx.AsyncClient, name: str) -> None:
    created = await client.post("/widgets", json={"name": name})
    assert created.status_code == 201
    assert created.json()["name"] == name


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "#/name"),
        ({"name": ""}, "#/name"),
        ({"name": "x" * 101}, "#/name"),
        ({"name": "a\u0000b"}, "#/name"),
        ({"name": 1}, "#/name"),
        ({"name": "one", "size": 1}, "#"),
    ],
)
async def test_invalid_body_is_rejected(
    client: httpx.AsyncClient, body: dict[str, object], pointer: str
) -> None:
    response = await client.post("/widgets", json=body)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]
