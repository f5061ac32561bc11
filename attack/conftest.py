"""Fixtures: one Postgres and one Redis for the session.

Two packages are named `tests`. In this suite `tests` and `scripts` are always those of the
generated project, which pytest.ini puts on the path. The template's own are out of reach here:
they need cookiecutter, and this suite runs in the environment of the service.
"""

from pathlib import Path

import pytest
from scripts.dev_services import Redis

ATTACK = Path(__file__).parent
#: The generated project's fixtures: postgres, redis, database_url.
pytest_plugins = ["tests.conftest"]
#: The slowest files. `make attack` runs two at a time. That of the alerts is one of the first two,
#: since rates depend on the other: payments wait most of the time, and need the least CPU.
SLOWEST = [
    "test_alerts.py",
    "test_payments.py",
    "test_rollout.py",
    "test_jobs.py",
    "test_rolling.py",
    "test_faults.py",
    "test_recycling.py",
    "test_authentication.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the slowest files first: xdist distributes whole files in this order."""
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(SLOWEST)))


@pytest.fixture(scope="session")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    """Settings for the service: migrated Postgres, Redis, this directory on the path.

    The rate limit is practically unlimited, since all load comes from one caller.
    """
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "PYTHONPATH": str(ATTACK),
        "RATE_LIMIT_PER_MINUTE": "1000000",
    }
