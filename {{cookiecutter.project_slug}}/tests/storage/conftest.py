"""Fixtures of the tests of Postgres: the workers' event loop, and a second connection."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from app.network.event_loop import EventLoop


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The workers' event loop. It notices a lost connection at another time than asyncio's."""
    return "asyncio", {"loop_factory": EventLoop}


@pytest.fixture
async def admin(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of its own, to act on the server and on the others."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()
