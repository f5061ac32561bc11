"""The job of a conversation, from its end over HTTP to its score."""

from typing import Any, ClassVar

import httpx
import pytest

from app.conversations import repository
from app.conversations.schemas import ENDED, ConversationEnded
from app.jobs import table
from app.jobs.consume import Inbox, subscriptions
from app.storage.postgres import Database
from tests.conversations.factory import store
from tests.run_jobs import RunJobs

pytestmark = pytest.mark.usefixtures("clean_database")
UNKNOWN = "00000000-0000-4000-8000-000000000000"


async def test_ended_conversation_gets_a_score(
    client: httpx.AsyncClient, database: Database, run_jobs: RunJobs
) -> None:
    """The client that polls the job sees the result, and then no `Retry-After`."""
    path = f"/conversations/{(await store(database, 'Thanks!', 'Bad.')).conversation_id}"
    ended = await client.post(f"{path}/end")
    await run_jobs()
    response = await client.get(ended.headers["location"])
    job = response.json()
    assert job["status"] == "succeeded"
    assert job["result"] == {"score": 50}
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert "retry-after" not in response.headers
    assert (await client.get(path)).json()["score"] == 50


async def test_end_after_the_job_shows_its_outcome(
    client: httpx.AsyncClient, database: Database, run_jobs: RunJobs
) -> None:
    path = f"/conversations/{(await store(database)).conversation_id}/end"
    await client.post(path)
    await run_jobs()
    repeated = await client.post(path)
    assert repeated.status_code == 202
    assert repeated.json()["status"] == "succeeded"
    assert "retry-after" not in repeated.headers


async def test_score_and_end_of_the_job_are_one_transaction(
    client: httpx.AsyncClient,
    database: Database,
    run_jobs: RunJobs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An effect that fails leaves a job that has not succeeded, and no score."""
    path = f"/conversations/{(await store(database)).conversation_id}"
    ended = await client.post(f"{path}/end")
    store_score = repository.store_score

    async def store_and_fail(*arguments: object) -> None:
        await store_score(*arguments)  # type: ignore[arg-type]
        raise OSError("after the effect")

    monkeypatch.setattr(repository, "store_score", store_and_fail)
    await run_jobs(raises=False)
    assert (await client.get(ended.headers["location"])).json()["status"] == "queued"
    assert (await client.get(path)).json()["score"] is None


async def test_cancelled_job_leaves_no_score(
    client: httpx.AsyncClient, database: Database, run_jobs: RunJobs
) -> None:
    path = f"/conversations/{(await store(database)).conversation_id}"
    ended = await client.post(f"{path}/end")
    assert (await client.delete(ended.headers["location"])).status_code == 204
    await run_jobs()
    assert (await client.get(path)).json()["score"] is None


async def test_message_about_an_unknown_conversation_fails_at_once(
    database: Database, run_jobs: RunJobs
) -> None:
    """From another service: a retry would not help."""
    payload = ConversationEnded.model_validate({"conversation_id": UNKNOWN})
    async with database.acquire() as connection, connection.transaction():
        job_id = await table.enqueue(connection, ENDED, payload)
    await run_jobs(raises=False)
    row = await database.pool.fetchrow("select status, error from jobs where job_id = $1", job_id)
    assert row
    assert row["status"] == "failed"
    assert "there is no such conversation" in row["error"]


class Message:
    """A message of another service, without RabbitMQ."""

    headers: ClassVar[dict[str, str]] = {}
    message_id = "message-1"

    def __init__(self, body: str) -> None:
        self.body = body.encode()
        self.is_acknowledged = False

    async def ack(self) -> None:
        self.is_acknowledged = True


async def test_message_of_another_service_is_the_same_job(
    client: httpx.AsyncClient, database: Database, run_jobs: RunJobs
) -> None:
    """Whether the request comes first or the message: the conversation gets one score."""
    conversation = await store(database)
    (subscription,) = [each for each in subscriptions.all if each.kind == ENDED]
    not_used: Any = None
    ended_there = ConversationEnded(conversation_id=conversation.conversation_id)
    message: Any = Message(ended_there.model_dump_json())
    await Inbox(subscription, database, not_used).receive(message)
    assert message.is_acknowledged
    ended = await client.post(f"/conversations/{conversation.conversation_id}/end")
    (job_id,) = await run_jobs()
    assert ended.json()["job_id"] == str(job_id)
