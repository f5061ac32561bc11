"""Fixtures: Postgres, Redis, settings, and a client of the application."""

import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from app.settings import Settings
from app.storage.postgres import Database
from scripts import dev_services
from tests import default_token
from tests.databases import TEMPLATE, copy_database, drop_database
from tests.run_jobs import RunJobs  # jobs
from tests.service_process import DEADLINE_SECONDS, Service, serving
from tests.session_state import no_session_state
from tests.streams import Client

# Settings of the service in the developer's environment must not reach the tests.
for name in Settings.model_fields:
    os.environ.pop(name.upper(), None)

# It reads the settings when it is imported.
from app.main import app, create_app

PROJECT = Path(__file__).parent.parent
#: For the names of databases.
_numbers = itertools.count(1)
#: What the template brings, and an update of the template may change. All other tests are the
#: team's: those of its features, and those of its settings, migrations and manifests.
FRAMEWORK = {
    "auth",
    "jobs",  # jobs
    "labs",  # example
    "network",
    "outbound",
    "patterns",
    "process_pool",
    "scripts",
    "serving",
    "sizing",
    "storage",
    "telemetry",
    "web",
    "test_lifespan.py",
    "test_migration_commands.py",
    "test_process.py",
    "test_setting_types.py",
    "test_tasks.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the framework's tests, and run them after the team's, which are quicker.

    Tests that start the service are marked as well.
    """
    tests = PROJECT / "tests"
    framework = {tests / name for name in FRAMEWORK}
    # Not the tests of another suite that uses these fixtures: it has no such markers.
    for item in (each for each in items if tests in each.path.parents):
        if framework & {item.path, *item.path.parents}:
            item.add_marker("framework")
        if "service" in getattr(item, "fixturenames", ()):
            item.add_marker("process")
    items.sort(key=lambda item: item.get_closest_marker("framework") is not None)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of asynchronous tests and fixtures: asyncio's own."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _default_token() -> Iterator[None]:
    """Have the clients of tests send a token, if the application asks each caller for one."""
    with default_token.sending(app):
        yield


@pytest.fixture(autouse=True)
def _no_session_state() -> Iterator[None]:
    """Fail a test that leaves state in a Postgres session, such as `set statement_timeout`."""
    with no_session_state():
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[dev_services.Postgres]:
    """A Postgres server, empty at first."""
    with dev_services.postgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[dev_services.Redis]:
    """A Redis server, empty at first."""
    with dev_services.redis() as server:
        yield server


@pytest.fixture(scope="session")
def database_url(postgres: dev_services.Postgres) -> str:
    """The URL of a database with the migrations applied."""
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    environment = os.environ | {"DATABASE_URL": postgres.url}
    subprocess.run(command, check=True, cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
    # Before any other test connects to it: Postgres copies only databases without connections.
    copy_database(postgres.url, "postgres", TEMPLATE)
    return postgres.url


@pytest.fixture
def clean_database(database_url: str) -> Iterator[str]:
    """The URL of a new database for one test, with the migrations applied.

    `settings`, `client`, `database` and `service` use it, if the test requests it.
    """
    name = f"test_{next(_numbers)}"
    yield copy_database(database_url, TEMPLATE, name)
    drop_database(database_url, name)


@pytest.fixture
def settings(request: pytest.FixtureRequest, redis: dev_services.Redis) -> Settings:
    """Settings for the servers of this session; access lines are written at once.

    Each test that requests `clean_database` has its own database, and its own keys in Redis.

    Its timeouts are longer than the defaults: while other tests run, a connect can last over 1 s,
    and a query over 5 s.
    """
    is_clean = "clean_database" in request.fixturenames
    url = request.getfixturevalue("clean_database" if is_clean else "database_url")
    own = {"redis_key_prefix": urlsplit(url).path.strip("/")} if is_clean else {}
    found = Settings(
        **own,
        database_url=SecretStr(url),
        redis_url=SecretStr(redis.url),
        log_format="json",
        access_log_flush_ms=0,
        readiness_timeout_seconds=10,
        database_acquire_timeout_seconds=10,
        database_command_timeout_seconds=DEADLINE_SECONDS,
    )
    trusted = {name.lower(): value for name, value in default_token.settings.items()}
    return found.model_copy(update=trusted)


class InProcess:
    """An application for httpx, without a server.

    It runs the lifespan, and passes its state on to each request.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "state": dict(self.state)}, receive, send)

    async def __aenter__(self) -> Client:
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.state = await self.lifespan.__aenter__() or {}
        return Client(self)

    async def __aexit__(self, *error: object) -> None:
        await self.lifespan.__aexit__(None, None, None)


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[Client]:
    """A client of the application, in this process."""
    mandatory = app.mandatory_dependencies
    async with InProcess(create_app(settings, dependencies=mandatory)) as client:
        yield client


@pytest.fixture
async def database(clean_database: str, settings: Settings) -> AsyncIterator[Database]:
    """The connections of a test to a database of its own: what services expect.

    `database.pool` has `fetch`, `fetchval` and `execute` for plain SQL.
    """
    async with Database(settings, connections=3, process="test") as database:
        yield database


# jobs: begin
@pytest.fixture
def run_jobs(database: Database) -> RunJobs:
    """Runs the jobs that are due in the clean database: `await run_jobs()`."""
    return RunJobs(database)


# jobs: end
@pytest.fixture
def service(clean_database: str, settings: Settings) -> Iterator[Service]:
    """The service as a real process, ready, on a database of its own. A start needs 2 s.

    A module with several such tests has a fixture of its own, see tests/serving.
    """
    variables = {
        "DATABASE_URL": clean_database,
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "REDIS_KEY_PREFIX": settings.redis_key_prefix,
    }
    with serving(WEB_CONCURRENCY="1", **variables) as service:
        service.wait()
        yield service
