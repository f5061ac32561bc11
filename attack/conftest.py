"""Fixtures: one Postgres and one Redis for the session."""

from pathlib import Path

import pytest
from scripts.dev_services import Redis

ATTACK = Path(__file__).parent
pytest_plugins = ["tests.conftest"]  # the generated project's: postgres, redis, database_url


@pytest.fixture(scope="session")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    """Settings that name Postgres, with the migrations applied, and Redis; and the path of the apps in this folder."""
    limit = {"RATE_LIMIT_PER_MINUTE": "1000000"}  # all the load is one caller
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "PYTHONPATH": str(ATTACK),
        **limit,
    }
