"""The commands of Alembic, and migrations under faults: signals, locks, parallel branches.

Alembic's documentation: "Working with Branches", "Generating SQL Scripts (a.k.a. Offline Mode)",
`MigrationContext.autocommit_block` and `transaction_per_migration`. PostgreSQL's: ALTER TYPE (a new
enum value cannot be used before the commit), CREATE INDEX CONCURRENTLY, `lock_timeout`.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from scripts.dev_services import Postgres, postgres
from tests.service_process import PROJECT, eventually

TIMEOUT_SECONDS = 60


class Migrations:
    """The migrations without the example's, in a directory of their own, on an empty database."""

    def __init__(self, directory: Path, url: str) -> None:
        self.versions = directory / "migrations" / "versions"
        self.versions.mkdir(parents=True)
        shutil.copy(PROJECT / "alembic.ini", directory)
        for name in ("env.py", "script.py.mako"):
            shutil.copy(PROJECT / "migrations" / name, directory / "migrations")
        self.directory = directory
        self.url = url

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "alembic", *command],
            cwd=self.directory,
            env=os.environ | {"DATABASE_URL": self.url, "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, code: int = 0) -> str:
        process = self.start(*command)
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == code, output + errors
        return output

    def add(self, name: str, *statements: str, after: str | None = None, body: str = "") -> None:
        """Write a migration of some statements; `body` is Python."""
        lines = [f"    op.execute({statement!r})" for statement in statements]
        upgrade = "\n".join(["def upgrade():", *lines, body or "    pass"])
        head = f"from alembic import op\nrevision = {name!r}\ndown_revision = {after!r}\n"
        downgrade = "def downgrade():\n    pass\n"
        (self.versions / f"{name}.py").write_text(f"{head}\n{upgrade}\n\n{downgrade}")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A Postgres of its own."""
    with postgres() as server:
        yield server


def fetch(server: Postgres, query: str) -> Any:
    """Return the first value of a query."""

    async def run() -> Any:
        connection = await asyncpg.connect(server.url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(run())


def wait_for(server: Postgres, condition: str) -> None:
    """Wait until another connection meets a condition."""
    others = "pid <> pg_backend_pid() and backend_type = 'client backend'"
    query = f"select count(*) from pg_stat_activity where {others} and ({condition})"
    eventually(lambda: fetch(server, query), TIMEOUT_SECONDS)


@pytest.fixture
def migrations(server: Postgres, tmp_path: Path) -> Migrations:
    fetch(server, "drop schema public cascade")
    fetch(server, "create schema public")
    return Migrations(tmp_path, server.url)


def test_every_command_works_with_generated_revisions(migrations: Migrations) -> None:
    revision = ("revision", "--message", 'add "a" \\d to it')
    migrations.run(*revision, "--rev-id", "one", "--branch-label", "main")
    migrations.run(*revision, "--rev-id", "two")
    migrations.run(*revision, "--rev-id", "three", "--head", "one", "--splice")
    migrations.run("merge", "heads", "--message", "merge", "--rev-id", "four")
    migrations.run(*revision, "--rev-id", "five", "--depends-on", "one", "--depends-on", "two")
    history = migrations.run("history")
    assert "-> four (main) (mergepoint)" in history
    assert "four (one, two) -> five" in history
    migrations.run("upgrade", "head")
    assert "five (head)" in migrations.run("current").splitlines()
    sql = migrations.run("upgrade", "head", "--sql")
    assert sql.startswith("set lock_timeout = '10s';")
    assert sql.count("BEGIN;") == sql.count("COMMIT;") == 5
    assert "{" not in sql
    migrations.run("downgrade", "base")
    migrations.run("stamp", "head")
    files = sorted(map(str, migrations.versions.glob("*.py")))
    config = str(PROJECT / "pyproject.toml")
    for command in (("check",), ("format", "--check")):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", config, *files]
        done = subprocess.run(ruff, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout.decode()


def test_parallel_branches_are_one_line_with_the_remedy(migrations: Migrations) -> None:
    migrations.add("root")
    migrations.add("left", after="root")
    migrations.add("right", after="root")
    for command in (("upgrade", "head"), ("upgrade", "head", "--sql")):
        process = migrations.start(*command)
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 1
        text = errors if "--sql" in command else json.loads(output.splitlines()[-1])["message"]
        assert "left and right" in text or "right and left" in text
        assert "alembic merge heads" in text
        assert len(errors.splitlines()) == ("--sql" in command)
    migrations.run("upgrade", "heads")
    assert migrations.run("current").count("(head)") == 2


def test_new_enum_value_can_be_used_by_the_next_migration(
    migrations: Migrations, server: Postgres
) -> None:
    migrations.add("one", "create type kind as enum ('a')", "create table t (k kind)")
    migrations.add("two", "alter type kind add value 'b'", after="one")
    migrations.add("three", "insert into t values ('b')", after="two")
    migrations.add("four", "create table half ()", "select 1 / 0", after="three")
    process = migrations.start("upgrade", "head")
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode != 0
    assert fetch(server, "select version_num from alembic_version") == "three"
    assert fetch(server, "select to_regclass('half') is null and (select count(*) = 1 from t)")


AUTOCOMMIT = """
    timeout = "insert into timeouts select setting from pg_settings where name = 'lock_timeout'"
    lock = "insert into locks select count(*) from pg_locks where locktype = 'advisory'"
    with op.get_context().autocommit_block():
        op.execute("create index concurrently on t (id)")
        op.execute(timeout)
        op.execute(lock)
        op.execute("select pg_sleep(2)")
    op.execute(timeout)
    op.execute(lock)
"""


def test_lock_and_lock_timeout_hold_across_an_autocommit_block(
    migrations: Migrations, server: Postgres
) -> None:
    """Two runs at once: the index is not built twice, and neither run waits for the other."""
    tables = (
        "create table t (id int)",
        "create table timeouts (ms text)",
        "create table locks (n int)",
    )
    migrations.add("one", *tables, body=AUTOCOMMIT)
    migrations.add("two", "create table last ()", after="one")
    processes = [migrations.start("upgrade", "head") for _ in range(2)]
    outputs = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert fetch(server, "select array_agg(ms) from timeouts") == ["10000", "10000"]
    assert fetch(server, "select array_agg(n) from locks") == [1, 1]
    assert fetch(server, "select count(*) from pg_locks where locktype = 'advisory'") == 0


def test_commands_that_only_read_do_not_wait_for_the_lock(
    migrations: Migrations, server: Postgres
) -> None:
    migrations.add("one", "select pg_sleep(600)")
    process = migrations.start("upgrade", "head")
    wait_for(server, "query like '%pg_sleep(600)%' and state = 'active'")
    assert migrations.run("current", "--check-heads", code=255)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("in_block", [False, True])
def test_signal_ends_the_migration_and_its_statement(
    migrations: Migrations, server: Postgres, in_block: bool, number: signal.Signals
) -> None:
    sleep = "op.execute('select pg_sleep(600)')"
    block = f"    with op.get_context().autocommit_block():\n        {sleep}"
    migrations.add("one", "create table half ()", body=block if in_block else f"    {sleep}")
    process = migrations.start("upgrade", "head")
    wait_for(server, "query like '%pg_sleep(600)%' and state = 'active'")
    process.send_signal(number)
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert errors == ""
    assert json.loads(output.splitlines()[-1])["message"].endswith(f"stopped: {number.name}")
    wait_for_nothing(server)
    assert fetch(server, "select to_regclass('half') is not null") == in_block


def test_signal_ends_a_run_that_waits_for_the_lock(
    migrations: Migrations, server: Postgres
) -> None:
    migrations.add("one", "select pg_sleep(600)")
    holder = migrations.start("upgrade", "head")
    wait_for(server, "query like '%pg_sleep(600)%' and state = 'active'")
    waiter = migrations.start("upgrade", "head")
    holders = "select pid from pg_locks where locktype = 'advisory'"
    wait_for(server, f"state = 'idle in transaction' and pid not in ({holders})")
    for process in (waiter, holder):
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 1
    wait_for_nothing(server)


def test_run_stops_if_it_loses_the_lock(migrations: Migrations, server: Postgres) -> None:
    migrations.add("one", "select pg_sleep(600)")
    process = migrations.start("upgrade", "head")
    wait_for(server, "query like '%pg_sleep(600)%' and state = 'active'")
    fetch(server, "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory'")
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "lock was lost" in output
    wait_for_nothing(server)


def wait_for_nothing(server: Postgres) -> None:
    """Wait until no other connection does anything."""
    others = "pid <> pg_backend_pid() and backend_type = 'client backend'"
    query = f"select count(*) = 0 from pg_stat_activity where {others}"
    eventually(lambda: fetch(server, query), 10)
