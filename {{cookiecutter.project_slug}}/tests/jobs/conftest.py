"""Fixtures: a dispatcher, a worker in this process, and workers as processes."""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import BaseModel, SecretStr

import tests.jobs.work  # noqa: F401 - adds the handlers
from app.jobs import outcomes, table
from app.jobs.worker import Clients, open_clients, run_worker
from app.settings import Settings
from app.storage.postgres import Database
from scripts import dev_rabbitmq
from scripts.dev_rabbitmq import RabbitMQ
from scripts.dev_services import free_port
from tests.jobs.broker_server import Certificate, require_rabbitmq
from tests.jobs.work import Nothing
from tests.patience import patience
from tests.service_process import DEADLINE_SECONDS, PROJECT, Running, eventually

CREATE_EFFECTS = """
    create table effects (
        job_id uuid not null,
        starts integer not null,
        unique_at_commit integer unique deferrable initially deferred
    )
"""
Environment = dict[str, str]
#: For the names of queues.
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def amqp_certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """The certificate of the RabbitMQ server."""
    return Certificate(tmp_path_factory.mktemp("amqp"))


@pytest.fixture(scope="session")
def rabbitmq(amqp_certificate: Certificate) -> Iterator[RabbitMQ]:
    """A RabbitMQ server, shared by all tests: each has queues of its own."""
    require_rabbitmq()
    with dev_rabbitmq.rabbitmq(**amqp_certificate.settings) as server:
        yield server


@pytest.fixture(params=["postgres", "rabbitmq"])
def dispatcher(request: pytest.FixtureRequest) -> Environment:
    """The settings of each dispatcher, for a worker in this process or for a process."""
    if request.param == "postgres":
        return {}
    server: RabbitMQ = request.getfixturevalue("rabbitmq")
    # The name of the queue begins with it.
    return {"AMQP_URL": server.url, "SERVICE_NAME": f"test-{next(_numbers)}"}


@pytest.fixture
def settings(settings: Settings, dispatcher: Environment) -> Settings:
    """Settings of a worker with one process, on this dispatcher."""
    own = {
        "amqp_url": SecretStr(dispatcher.get("AMQP_URL", "")),
        "service_name": dispatcher.get("SERVICE_NAME", settings.service_name),
        "job_processes": 1,
        # The suite shares its CPUs with others, which may want all of them for minutes.
        "job_yields_cpu": False,
        "graceful_timeout_seconds": 10,
    }
    return settings.model_copy(update=own)


@pytest.fixture
async def database(database: Database) -> Database:
    """A database of its own, with a table for the effects of jobs."""
    await database.pool.execute(CREATE_EFFECTS)
    return database


@pytest.fixture
async def worker(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Clients]:
    """A worker in this process, whose retries have short pauses."""
    monkeypatch.setattr(outcomes, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(outcomes, "OUTAGE_SECONDS", 0.01)
    async with working(settings) as clients:
        yield clients


@contextlib.asynccontextmanager
async def working(settings: Settings) -> AsyncIterator[Clients]:
    """Do jobs in this process during the block."""
    unused: Any = None
    async with open_clients(settings, 10, "jobs") as clients, run_worker(settings, clients, unused):
        yield clients


async def enqueue(
    database: Database, kind: str, payload: BaseModel | None = None, **options: Any
) -> UUID:
    async with database.acquire() as connection, connection.transaction():
        return await table.enqueue(connection, kind, payload or Nothing(), **options)


async def row(database: Database, job_id: UUID) -> dict[str, Any]:
    found = await database.pool.fetchrow("select * from jobs where job_id = $1", job_id)
    assert found is not None
    return dict(found)


async def effects(database: Database, job_id: UUID | None = None) -> int:
    """Return the number of effects of a job, or of all jobs."""
    query = "select count(*) from effects where job_id = coalesce($1, job_id)"
    found: int = await database.pool.fetchval(query, job_id)
    return found


async def until(
    condition: Callable[[], Awaitable[object]], seconds: float = DEADLINE_SECONDS
) -> None:
    """Wait until a condition returns something true."""
    async with patience(seconds):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ended(database: Database, job_id: UUID) -> dict[str, Any]:
    """Wait for the end of a job, and return its row."""

    async def has_ended() -> bool:
        return bool((await row(database, job_id))["finished_at"])

    await until(has_ended)
    return await row(database, job_id)


async def all_ended(database: Database) -> None:
    """Wait until no job is queued or running."""
    query = "select not exists (select from jobs where status in ('queued', 'running'))"
    await until(lambda: database.pool.fetchval(query))


class Worker(Running):
    """A worker process with the handlers of the tests."""

    def __init__(self, module: str = "tests.jobs.worker", /, **settings: str) -> None:
        self.port = free_port()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by running()
        own = {
            "METRICS_BIND": f"127.0.0.1:{self.port}",
            "LOG_FORMAT": "json",
            "JOB_PROCESSES": "1",
            "JOB_YIELDS_CPU": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=PROJECT,
            env=os.environ | own | settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=DEADLINE_SECONDS)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.text
        return self.get("/health/ready").status_code == 200


Start = Callable[..., Worker]


@pytest.fixture
def start(settings: Settings, dispatcher: Environment) -> Iterator[Start]:
    """Starts worker processes, which the end of the test stops."""
    urls = {"DATABASE_URL": settings.database_url.get_secret_value(), **dispatcher}
    workers: list[Worker] = []

    def start(**own: str) -> Worker:
        workers.append(Worker(**(urls | own)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.wait()
        worker.output.close()


async def ready(*workers: Worker) -> None:
    """Wait until workers are ready."""
    for worker in workers:
        await asyncio.to_thread(eventually, worker.is_ready)
