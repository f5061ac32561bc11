"""Migrations run over the service's own DATABASE_URL, once, whoever starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from scripts.dev_services import Postgres, free_port, postgres
from tests.service_process import PROJECT


def alembic(url: str, *command: str) -> subprocess.Popen[bytes]:
    run = [sys.executable, "-m", "alembic", *(command or ("upgrade", "head"))]
    return subprocess.Popen(
        run,
        cwd=PROJECT,
        env=os.environ | {"DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def fresh() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


def test_two_at_once_are_safe_and_a_third_changes_nothing(fresh: Postgres) -> None:
    runs = [alembic(fresh.url) for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    again = alembic(fresh.url)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert b"Running upgrade" not in output


def test_every_migration_can_be_taken_back(fresh: Postgres) -> None:
    for command in (("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")):
        run = alembic(fresh.url, *command)
        assert run.communicate(timeout=60)
        assert run.returncode == 0


@pytest.mark.parametrize("wrong", ["away", "password", "database"])
def test_a_database_that_cannot_be_reached_is_one_clear_line(fresh: Postgres, wrong: str) -> None:
    urls = {
        "away": f"postgresql://app:hunter2@127.0.0.1:{free_port()}/app",
        "password": f"postgresql://app:hunter2@127.0.0.1:{fresh.port}/postgres",
        "database": fresh.url.replace("/postgres", "/hunter2")[: fresh.url.rindex("/")]
        + "/nothere",
    }
    run = alembic(urls[wrong])
    output, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert json.loads(output)["message"].startswith(
        "the database of DATABASE_URL cannot be reached"
    )
    assert errors == b""
    assert b"hunter2" not in output + errors
