"""Migrations use the service's `DATABASE_URL`, and concurrent runs are safe."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import asyncpg
import pytest

from app.settings import load_settings
from scripts.dev_services import Postgres, free_port, postgres
from tests.service_process import PROJECT

pytestmark = pytest.mark.process

TIMEOUT_SECONDS = 60


def start_alembic(url: str, *command: str) -> subprocess.Popen[bytes]:
    """Start an alembic command on a database: `upgrade head` unless given."""
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", *(command or ("upgrade", "head"))],
        cwd=PROJECT,
        env=os.environ | {"DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def empty_server() -> Iterator[Postgres]:
    """A Postgres of its own, without the tables of the other tests."""
    with postgres() as server:
        yield server


def test_concurrent_runs_are_safe_and_a_repeat_changes_nothing(empty_server: Postgres) -> None:
    runs = [start_alembic(empty_server.url) for _ in range(2)]
    outputs = [run.communicate(timeout=TIMEOUT_SECONDS) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    repeat = start_alembic(empty_server.url)
    output, _ = repeat.communicate(timeout=TIMEOUT_SECONDS)
    assert repeat.returncode == 0
    assert b"Running upgrade" not in output


def test_migration_has_its_own_name_in_postgres(empty_server: Postgres) -> None:
    """`application_name`: "Error Reporting and Logging" in the documentation of Postgres."""
    first = start_alembic(empty_server.url)
    first.communicate(timeout=TIMEOUT_SECONDS)
    assert first.returncode == 0

    async def name_during_migration() -> str:
        holder = await asyncpg.connect(empty_server.url)
        observer = await asyncpg.connect(empty_server.url)
        transaction = holder.transaction()
        await transaction.start()
        await holder.execute("lock table alembic_version in access exclusive mode")
        waiting = start_alembic(empty_server.url)
        query = "select application_name from pg_stat_activity where wait_event_type = 'Lock'"
        while not (name := await observer.fetchval(query)):
            assert waiting.poll() is None
        await transaction.rollback()
        await holder.close()
        await observer.close()
        waiting.communicate(timeout=TIMEOUT_SECONDS)
        return str(name)

    assert asyncio.run(name_during_migration()) == f"{load_settings().service_name}-migrate"


def test_every_migration_can_be_downgraded(empty_server: Postgres) -> None:
    for command in (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
        run = start_alembic(empty_server.url, *command)
        outputs = run.communicate(timeout=TIMEOUT_SECONDS)
        assert run.returncode == 0, outputs


@pytest.mark.parametrize("problem", ["port", "password", "database"])
def test_failed_connection_is_one_log_line_without_the_password(
    empty_server: Postgres, problem: str
) -> None:
    server = empty_server.url.rpartition("/")[0]
    urls = {
        "port": f"postgresql://app:hunter2@127.0.0.1:{free_port()}/app",
        "password": f"postgresql://app:hunter2@127.0.0.1:{empty_server.port}/postgres",
        "database": f"{server}/missing",
    }
    password = urlsplit(urls[problem]).password
    assert password
    run = start_alembic(urls[problem])
    output, errors = run.communicate(timeout=TIMEOUT_SECONDS)
    assert run.returncode != 0
    line = json.loads(output)
    assert line["logger"] == "app.migrations"
    assert line["message"].startswith("the database of DATABASE_URL cannot be reached")
    assert errors == b""
    assert password.encode() not in output
