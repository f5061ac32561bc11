"""Fixtures: Postgres, Redis, settings, and a client of the application."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from app.settings import Settings
from scripts import dev_services
from tests.service_process import DEADLINE_SECONDS

# Settings of the service in the developer's environment must not reach the tests.
for name in Settings.model_fields:
    os.environ.pop(name.upper(), None)

# It reads the settings when it is imported.
from app.main import create_app

PROJECT = Path(__file__).parent.parent
#: What the template brings, and an update of the template may change. All other tests are the
#: team's: those of its features, and those of its settings, migrations and manifests.
FRAMEWORK = {
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
    "test_urls.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the framework's tests, and run them after the team's, which are quicker."""
    for item in items:
        if item.path.relative_to(PROJECT / "tests").parts[0] in FRAMEWORK:
            item.add_marker("framework")
    items.sort(key=lambda item: item.get_closest_marker("framework") is not None)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of asynchronous tests and fixtures: asyncio's own."""
    return "asyncio"


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
    return postgres.url


@pytest.fixture
def settings(database_url: str, redis: dev_services.Redis) -> Settings:
    """Settings for the servers of this session; access lines are written at once.

    Its timeouts are longer than the defaults: while other tests run, a connect can last over 1 s,
    and a query over 5 s.
    """
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis.url),
        log_format="json",
        access_log_flush_ms=0,
        readiness_timeout_seconds=10,
        database_acquire_timeout_seconds=10,
        database_command_timeout_seconds=DEADLINE_SECONDS,
    )


class InProcess:
    """An application for httpx, without a server.

    It runs the lifespan, and passes its state on to each request.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "state": dict(self.state)}, receive, send)

    async def __aenter__(self) -> httpx.AsyncClient:
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.state = await self.lifespan.__aenter__() or {}
        return httpx.AsyncClient(transport=httpx.ASGITransport(self), base_url="http://test")

    async def __aexit__(self, *error: object) -> None:
        await self.lifespan.__aexit__(None, None, None)


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, in this process."""
    async with InProcess(create_app(settings)) as client:
        yield client
