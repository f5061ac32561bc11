"""Production with the components of the jobs, in each combination, and RabbitMQ in compose."""

import re
from pathlib import Path

import pytest
import yaml

from app.jobs import starts
from app.storage.postgres import Database
from scripts.compose_secrets import create_secrets
from tests.deploy.checking import find_problems
from tests.deploy.deployed import COMPONENTS, K8S, PROJECT, kustomize, read, with_components
from tests.deploy.rules import RULES
from tests.deploy.rules.compose import services

OTHERS = [name for name in ("consumer", "gateway-egress") if name in COMPONENTS]
COMBINATIONS = [
    ["jobs"],
    ["jobs", "jobs-rabbitmq"],
    ["jobs", "jobs-keda"],
    ["jobs", "jobs-keda", "jobs-rabbitmq"],
]
INSERT = """
    insert into jobs (type, payload, status, run_at)
    select 'ping', '{}', $1, now() + make_interval(mins => $2) from generate_series(1, $3)
"""
UNITS = {"m": 1 << 20, "MB": 1_000_000, "": 1}


@pytest.mark.parametrize("others", [[], OTHERS], ids=["alone", "with the consumer"])
@pytest.mark.parametrize("components", COMBINATIONS, ids=" ".join)
def test_production_with_jobs_follows_all_rules(
    components: list[str], others: list[str], tmp_path: Path
) -> None:
    kustomize()
    deployed = read("prod", with_components("prod", tmp_path / "k8s", [*others, *components]))
    problems = [problem for rule in RULES for problem in find_problems(rule, deployed)]
    assert problems == [], "\n".join(problems)


def test_rabbitmq_blocks_publishers_before_its_container_is_killed() -> None:
    """The watermark, and the part of the log in memory, are below `mem_limit`.

    "Memory Alarm Threshold" of RabbitMQ: it does not always detect the limit of a container.
    """
    text = (PROJECT / "deploy/compose/rabbitmq.conf").read_text()
    watermark = number(text, r"^vm_memory_high_watermark\.absolute = (\d+)(MB)$")
    log = number(text, r"^raft\.wal_max_size_bytes = (\d+)()$")
    limit = number(str(services(read("prod"))["rabbitmq"]["mem_limit"]), r"^(\d+)(m)$")
    assert watermark + log < 0.75 * limit


def test_compose_secrets_of_rabbitmq_are_created_once_and_match(tmp_path: Path) -> None:
    """Also for a project whose `.secrets` are older than its jobs."""
    create_secrets(tmp_path)
    for name in ("amqp_url", "rabbitmq.conf"):
        (tmp_path / name).unlink()
    create_secrets(tmp_path)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    password = texts["rabbitmq.conf"].split()[-1]
    assert len(password) >= 24
    assert texts["rabbitmq.conf"].startswith("default_user = app\ndefault_pass = ")
    assert texts["amqp_url"] == f"amqp://app:{password}@rabbitmq:5672/"
    create_secrets(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == texts


async def workers(database: Database) -> float:
    """Return the result of KEDA's query, as KEDA reads it."""
    text = (K8S / "components/jobs-keda/scaledobject.yaml").read_text()
    query = yaml.safe_load(text)["spec"]["triggers"][0]["metadata"]["query"]
    return float(await database.pool.fetchval(query))


async def test_keda_gets_the_workers_for_running_and_waiting_jobs(database: Database) -> None:
    """Eight jobs run in a worker at once, and 160 may wait for it.

    Jobs that are not due, and those that have ended, need none. A long queue needs the maximum.
    """
    for status, minutes in (("queued", 5), ("succeeded", -5), ("failed", -5), ("cancelled", -5)):
        await database.pool.execute(INSERT, status, minutes, 1000)
    assert await workers(database) == 0
    await database.pool.execute(INSERT, "queued", -1, 320)
    assert await workers(database) == 2
    async with database.acquire() as connection:
        assert len(await starts.claim_due(connection, 160)) == 160
    assert await workers(database) == 160 / 8 + 1
    await database.pool.execute("delete from jobs where status = 'running'")
    await database.pool.execute(INSERT, "queued", -1, 5000)
    assert await workers(database) == 10


def number(text: str, pattern: str) -> int:
    """Return the bytes that a pattern finds: a number and its unit."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found, pattern
    return int(found[1]) * UNITS[found[2]]
