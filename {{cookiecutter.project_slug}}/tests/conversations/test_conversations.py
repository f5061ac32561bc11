"""The routes of conversations, each test on a clean database."""

from uuid import uuid4

import httpx
import pytest

from app.main import create_app
from app.settings import Settings
from app.storage.postgres import Database
from tests.conftest import InProcess
from tests.conversations.factory import store

pytestmark = pytest.mark.usefixtures("clean_database")
PROBLEM = "application/problem+json"


async def test_created_conversation_is_found_at_its_location(client: httpx.AsyncClient) -> None:
    created = await client.post("/conversations", json={"lines": ["Hello."]})
    assert created.status_code == 201
    found = await client.get(created.headers["location"])
    assert found.status_code == 200
    assert found.json() == created.json()
    assert found.json()["score"] is None
    assert found.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "#/lines"),
        ({"lines": []}, "#/lines"),
        ({"lines": [""]}, "#/lines/0"),
        ({"lines": ["x" * 2001]}, "#/lines/0"),
        ({"lines": ["Hello.", "a\u0000b"]}, "#/lines/1"),
        ({"lines": ["x"] * 101}, "#/lines"),
        ({"lines": ["Hello."], "score": 100}, "#"),
    ],
)
async def test_invalid_conversation_is_rejected(
    client: httpx.AsyncClient, body: dict[str, object], pointer: str
) -> None:
    response = await client.post("/conversations", json=body)
    assert response.status_code == 422
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


async def test_lines_are_added_until_the_end(client: httpx.AsyncClient, database: Database) -> None:
    path = f"/conversations/{(await store(database)).conversation_id}"
    added = await client.post(f"{path}/lines", json={"text": "Bye."})
    assert added.status_code == 204
    await client.post(f"{path}/end")
    rejected = await client.post(f"{path}/lines", json={"text": "Wait!"})
    assert rejected.status_code == 409
    assert rejected.json()["code"] == "conversation_ended"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", "", None), ("POST", "/end", None), ("POST", "/lines", {"text": "Hello."})],
)
async def test_unknown_conversation_is_404(
    client: httpx.AsyncClient, database: Database, method: str, path: str, body: object
) -> None:
    response = await client.request(method, f"/conversations/{uuid4()}{path}", json=body)
    assert response.status_code == 404
    assert response.headers["content-type"] == PROBLEM
    assert await database.pool.fetchval("select count(*) from jobs") == 0


async def test_end_is_accepted_with_the_url_of_its_job(
    client: httpx.AsyncClient, database: Database
) -> None:
    """A 202 refers to a status monitor: RFC 9110, section 15.3.3."""
    conversation = await store(database)
    ended = await client.post(f"/conversations/{conversation.conversation_id}/end")
    assert ended.status_code == 202
    job_id = ended.json()["job_id"]
    location = f"/jobs/{job_id}"
    assert ended.json() == {"job_id": job_id, "status": "queued", "monitor": location}
    assert ended.headers["location"] == location
    assert ended.headers["retry-after"] == "1"
    assert ended.headers["cache-control"] == "no-store"
    job = await client.get(location)
    assert job.status_code == 200
    assert job.json()["type"] == "conversation.ended"


async def test_repeated_end_is_the_same_job(client: httpx.AsyncClient, database: Database) -> None:
    path = f"/conversations/{(await store(database)).conversation_id}"
    first = await client.post(f"{path}/end")
    ended_at = (await client.get(path)).json()["ended_at"]
    second = await client.post(f"{path}/end")
    assert second.status_code == 202
    assert second.json() == first.json()
    assert (await client.get(path)).json()["ended_at"] == ended_at
    assert await database.pool.fetchval("select count(*) from jobs") == 1


async def test_location_of_the_job_includes_the_root_path(
    settings: Settings, database: Database
) -> None:
    conversation = await store(database)
    application = InProcess(create_app(settings))
    transport = httpx.ASGITransport(application, root_path="/api")
    base = "http://test/api"
    async with application, httpx.AsyncClient(transport=transport, base_url=base) as client:
        ended = await client.post(f"/conversations/{conversation.conversation_id}/end")
    assert ended.headers["location"] == f"/api/jobs/{ended.json()['job_id']}"
    assert ended.json()["monitor"] == ended.headers["location"]


def test_openapi_describes_the_202(settings: Settings) -> None:
    end = create_app(settings).openapi()["paths"]["/conversations/{conversation_id}/end"]["post"]
    assert end["responses"]["202"]["headers"].keys() == {"Location", "Retry-After"}
    assert end["responses"]["202"]["content"]["application/json"]["schema"]


async def test_body_that_is_no_json_is_400_as_documented(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    """FastAPI responds 400 to a body that is not UTF-8."""
    headers = {"Content-Type": "application/json"}
    response = await client.post("/conversations", content=b"\xc3", headers=headers)
    assert response.status_code == 400
    paths = create_app(settings).openapi()["paths"]
    for path in ("/conversations", "/conversations/{conversation_id}/lines"):
        assert "400" in paths[path]["post"]["responses"]
