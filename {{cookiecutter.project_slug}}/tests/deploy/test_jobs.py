"""Production with the components of the jobs, in each combination, and RabbitMQ in compose."""

import re
from pathlib import Path

import pytest

from scripts.compose_secrets import create_secrets
from tests.deploy.checking import find_problems
from tests.deploy.deployed import COMPONENTS, PROJECT, kustomize, read, with_components
from tests.deploy.rules import RULES
from tests.deploy.rules.compose import services

OTHERS = [name for name in ("consumer", "gateway-egress") if name in COMPONENTS]
COMBINATIONS = [
    ["jobs"],
    ["jobs", "jobs-rabbitmq"],
    ["jobs", "jobs-keda"],
    ["jobs", "jobs-keda", "jobs-rabbitmq"],
]
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


def number(text: str, pattern: str) -> int:
    """Return the bytes that a pattern finds: a number and its unit."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found, pattern
    return int(found[1]) * UNITS[found[2]]
