"""`GET` and `DELETE /jobs/{job_id}`: the outcome of a 202, without the error of a failure."""

import subprocess
import sys
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic import BaseModel, RootModel

from app.jobs import starts, table
from app.jobs.starts import Job
from app.main import create_app
from app.settings import Settings
from app.storage.postgres import Database
from tests.service_process import PROJECT

pytestmark = pytest.mark.usefixtures("clean_database")
PROBLEM = "application/problem+json"


class Content(BaseModel):
    """A payload, and a result."""

    number: int = 7


@pytest.fixture
def dispatcher() -> dict[str, str]:
    """None: the routes do not depend on it."""
    return {}


async def enqueue(database: Database) -> UUID:
    async with database.acquire() as connection, connection.transaction():
        return await table.enqueue(connection, "report.wanted", Content())


async def start(database: Database, job_id: UUID) -> Job:
    async with database.acquire() as connection:
        job = await starts.claim(connection, job_id)
    assert job
    return job


async def test_job_is_shown_from_its_start_to_its_result(
    client: httpx.AsyncClient, database: Database
) -> None:
    """`Retry-After` is present until it has ended; no cache keeps a status."""
    job_id = await enqueue(database)
    queued = await client.get(f"/jobs/{job_id}")
    job = await start(database, job_id)
    running = await client.get(f"/jobs/{job_id}")
    async with database.acquire() as connection:
        await starts.succeed(connection, job, Content())
    succeeded = await client.get(f"/jobs/{job_id}")

    statuses = [each.json()["status"] for each in (queued, running, succeeded)]
    assert statuses == ["queued", "running", "succeeded"]
    retries = [each.headers.get("retry-after") for each in (queued, running, succeeded)]
    assert retries == ["1", "1", None]
    assert {each.headers["cache-control"] for each in (queued, running, succeeded)} == {"no-store"}
    assert queued.json()["started_at"] is None
    assert running.json()["result"] is None
    assert succeeded.json()["result"] == {"number": 7}
    assert succeeded.json()["finished_at"] is not None


@pytest.mark.parametrize("value", [[1, 2], "a\x00", 0, None])
async def test_result_may_be_any_json(
    client: httpx.AsyncClient, database: Database, value: object
) -> None:
    job = await start(database, await enqueue(database))
    async with database.acquire() as connection:
        await starts.succeed(connection, job, RootModel[object](value))
    response = await client.get(f"/jobs/{job.job_id}")
    assert (response.status_code, response.json()["result"]) == (200, value)


async def test_error_of_a_failed_job_is_not_shown(
    client: httpx.AsyncClient, database: Database
) -> None:
    """It may contain secrets, as the text of any exception may."""
    job = await start(database, await enqueue(database))
    async with database.acquire() as connection:
        await starts.fail(connection, job, "password=hunter2")
    response = await client.get(f"/jobs/{job.job_id}")
    assert response.json()["status"] == "failed"
    assert "hunter2" not in response.text
    assert "error" not in response.json()


@pytest.mark.parametrize("is_running", [False, True])
async def test_cancelled_job_stays_cancelled(
    client: httpx.AsyncClient, database: Database, is_running: bool
) -> None:
    """A repeated `DELETE` has the same response: RFC 9110, section 9.2.2."""
    job_id = await enqueue(database)
    if is_running:
        job = await start(database, job_id)
    for _ in range(2):
        response = await client.delete(f"/jobs/{job_id}")
        assert response.status_code == 204
        assert response.content == b""
    assert (await client.get(f"/jobs/{job_id}")).json()["status"] == "cancelled"
    if is_running:
        async with database.acquire() as connection:
            with pytest.raises(starts.SupersededError):
                await starts.succeed(connection, job)


@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
async def test_ended_job_cannot_be_cancelled(
    client: httpx.AsyncClient, database: Database, outcome: str
) -> None:
    job = await start(database, await enqueue(database))
    async with database.acquire() as connection:
        if outcome == "succeeded":
            await starts.succeed(connection, job)
        else:
            await starts.fail(connection, job, "reason")
    response = await client.delete(f"/jobs/{job.job_id}")
    assert response.status_code == 409
    assert response.headers["content-type"] == PROBLEM
    assert response.json()["code"] == "job_ended"
    assert (await client.get(f"/jobs/{job.job_id}")).json()["status"] == outcome


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_unknown_job_is_404_and_an_invalid_id_is_422(
    client: httpx.AsyncClient, method: str
) -> None:
    for job_id, status in ((str(uuid4()), 404), ("seven", 422)):
        response = await client.request(method, f"/jobs/{job_id}")
        assert response.status_code == status
        assert response.headers["content-type"] == PROBLEM


def test_openapi_describes_headers_and_errors(settings: Settings) -> None:
    routes = create_app(settings).openapi()["paths"]["/jobs/{job_id}"]
    assert {"200", "404", "422", "503"} <= routes["get"]["responses"].keys()
    assert {"204", "404", "409", "422", "503"} <= routes["delete"]["responses"].keys()
    assert "Retry-After" in routes["get"]["responses"]["200"]["headers"]


def test_api_imports_no_client_of_rabbitmq_and_no_handler() -> None:
    """Each web worker would pay for them, in memory and in the time of its start."""
    program = "import sys, app.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True)
    modules = set(done.stdout.decode().split())
    assert "app.jobs.table" in modules
    assert not modules & {"aio_pika", "cronsim", "app.jobs_main", "app.jobs.runner"}
