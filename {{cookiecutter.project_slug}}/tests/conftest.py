"""Fixtures: a real Postgres and Redis for the session, the app in-process, and the service as a process."""

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

for name in (
    Settings.model_fields
):  # whoever runs the tests may have settings of the service in their environment
    os.environ.pop(name.upper(), None)

from app.main import create_app

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[dev_services.Postgres]:
    with dev_services.postgres() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[dev_services.Redis]:
    with dev_services.redis() as server:
        yield server


@pytest.fixture(scope="session")
def database_url(postgres: dev_services.Postgres) -> str:
    """A database with the migrations applied."""
    run = [sys.executable, "-m", "alembic", "upgrade", "head"]
    subprocess.run(
        run,
        check=True,
        cwd=PROJECT,
        env=os.environ | {"DATABASE_URL": postgres.url},
        stdout=subprocess.PIPE,
    )
    return postgres.url


@pytest.fixture
def settings(database_url: str, redis: dev_services.Redis) -> Settings:
    return Settings(
        database_url=SecretStr(database_url),
        redis_url=SecretStr(redis.url),
        log_format="json",
        access_log_flush_ms=0,
        readiness_timeout_seconds=10,  # connecting may take over a second where other tests run beside this one
        database_acquire_timeout_seconds=10,
    )


class InProcess:
    """An ASGI app for httpx, with the state that a server would take from the lifespan."""

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
    async with InProcess(create_app(settings)) as client:
        yield client
