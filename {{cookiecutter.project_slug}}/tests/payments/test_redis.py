"""Payments while Redis fails over, is shared with another service, or restricts its users."""

import asyncio
import re
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import psutil
import pytest
from redis import Redis as Client

from app.settings import Settings
from scripts import dev_services
from scripts.fake_gateway import FakeGateway
from tests.payments.test_consumer import STREAM, consuming, pay, wait_until_settled
from tests.service_process import PROJECT, Service, eventually, serving
from tests.storage.test_redis_failover import READONLY, new, old, proxy  # noqa: F401 - fixtures
from tests.tcp_proxy import TcpProxy

pytestmark = pytest.mark.process

#: More than the second between heartbeats of a consumer; less than the time limit of a call.
PENDING_SECONDS = 1.5


def published(client: Any) -> str:
    """Return all events."""
    return str(client.xrange(STREAM))


def test_service_follows_a_fail_over(
    old: Any,  # noqa: F811
    new: dev_services.Redis,  # noqa: F811
    proxy: TcpProxy,  # noqa: F811
    urls: dict[str, str],
) -> None:
    """The old primary is a replica of the new one; then the name leads to the new one."""
    changed = {"REDIS_URL": proxy.url, "READINESS_REQUIRED": "postgres,redis"}
    with (
        serving(**urls | changed) as service,
        consuming(**urls | changed),
        Client.from_url(new.url) as primary,
    ):
        service.wait()
        before = pay(service)
        eventually(lambda: before in published(old))
        old.replicaof("127.0.0.1", new.port)
        service.wait(status=503)
        during = pay(service)
        paused = f"outbox publishing paused: {READONLY}"
        eventually(lambda: paused in service.messages)
        assert during not in published(primary)
        proxy.target = new.port
        service.wait(status=200)
        eventually(lambda: during in published(primary))
        eventually(lambda: "outbox publishing resumed" in service.messages)
        wait_until_settled(service, during)
        assert 1 <= service.messages.count(paused) <= 2  # once per worker
        assert "Traceback" not in service.text


def post_statuses(service: Service, number: int) -> list[int]:
    """Create payments one after the other."""
    body = {"amount": 1, "currency": "EUR", "reference": "shared"}
    return [
        service.http.post(
            "/payments", json=body, headers={"Idempotency-Key": str(uuid4())}
        ).status_code
        for _ in range(number)
    ]


def has_events(client: Any, service: str, number: int) -> bool:
    return bool(client.xlen(f"{service}:payment-events") == number)


def test_services_on_one_redis_share_no_limit_and_no_event(
    old: Any,  # noqa: F811
    urls: dict[str, str],
) -> None:
    for name in ("orders", "billing"):
        with serving(**urls, SERVICE_NAME=name, RATE_LIMIT_PER_MINUTE="2") as service:
            service.wait()
            assert post_statuses(service, 3) == [201, 201, 429]
            eventually(partial(has_events, old, name, 2))
    old.xadd("orders:payment-events", {"payload": "nonsense"})
    with (
        serving(**urls, SERVICE_NAME="billing") as service,
        consuming(**urls, SERVICE_NAME="billing"),
    ):
        service.wait()
        wait_until_settled(service, pay(service))
    assert old.xinfo_groups("orders:payment-events") == []
    assert not old.exists("billing:payment-events.dead")
    prefixes = {key.split(b":")[0] for key in old.scan_iter()}
    assert prefixes == {b"orders", b"billing"}


def test_key_prefix_may_differ_from_the_name(
    old: Any,  # noqa: F811
    urls: dict[str, str],
) -> None:
    """As staging and production of one service on one Redis need it."""
    with serving(**urls, REDIS_KEY_PREFIX="orders-staging") as service:
        service.wait()
        pay(service)
        eventually(lambda: old.exists("orders-staging:payment-events"))
    assert all(key.startswith(b"orders-staging:") for key in old.scan_iter())


@pytest.fixture
def restricted_url(old: Any) -> Iterator[str]:  # noqa: F811
    """The URL of a user with the rights that the README documents."""
    readme = (PROJECT / "README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("ACL SETUSER ")]
    # The name of the project is not filled in yet where the template itself is tested.
    rules = re.sub("~.*?:", f"~{Settings().redis_key_prefix}:", line.partition(" on ")[2])
    old.execute_command("ACL", "SETUSER", "restricted", "on", *rules.split())
    old.acl_log_reset()
    host = urlsplit(f"redis://127.0.0.1:{old.connection_pool.connection_kwargs['port']}").netloc
    yield f"redis://restricted:password@{host}/0"
    old.acl_deluser("restricted")


def test_documented_rights_suffice_and_others_are_named(
    old: Any,  # noqa: F811
    restricted_url: str,
    urls: dict[str, str],
    gateway: FakeGateway,
) -> None:
    """The rights are those of https://redis.io/docs/latest/operate/oss_and_stack/management/security/acl/."""
    changed = urls | {"REDIS_URL": restricted_url, "READINESS_REQUIRED": "postgres,redis"}
    with serving(**changed) as service, consuming(**changed):
        service.wait()
        payment_id = pay(service)
        # The heartbeat looks for the oldest event that is pending.
        gateway.delay_seconds = PENDING_SECONDS
        wait_until_settled(service, pay(service))
        gateway.delay_seconds = 0.0
        wait_until_settled(service, payment_id)
        assert service.get("/payments/totals").status_code == 200
        eventually(lambda: {b"cache", b"rate"} <= {key.split(b":")[1] for key in old.scan_iter()})
        denied = {entry["object"] for entry in old.acl_log()}
        assert denied <= {"client|setinfo", "client|maint_notifications"}
        # The user loses the right to publish.
        old.execute_command("ACL", "SETUSER", "restricted", "-xadd")
        pay(service)
        rejected = "outbox event rejected: NOPERM "
        eventually(lambda: any(each.startswith(rejected) for each in service.messages))
        old.execute_command("ACL", "SETUSER", "restricted", "+xadd")
        wait_until_settled(service, pay(service))
        assert "password" not in service.text


def add_large_events(url: str, number: int, size: int) -> None:
    """Add events to the outbox as a transaction of the service would."""
    query = """
        insert into outbox (topic, event_id, type, payload)
        select 'payment-events', gen_random_uuid(), 'large', repeat('a', $2)
        from generate_series(1, $1)
    """

    async def insert() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(query, number, size)
        finally:
            await connection.close()

    asyncio.run(insert())


def worker_megabytes(service: Service) -> float:
    """Return the resident memory of the largest process of the service."""
    processes = psutil.Process(service.process.pid).children(recursive=True)
    return float(max(process.memory_info().rss for process in processes) / 2**20)


def test_large_events_pass_a_slow_link_once_in_bounded_memory(
    old: Any,  # noqa: F811
    proxy: TcpProxy,  # noqa: F811
    urls: dict[str, str],
) -> None:
    """200 events of 80 KiB, at 4 MiB/s. Before, a batch had a second, and repeated all of it."""
    with serving(**urls | {"REDIS_URL": proxy.url}) as service:
        service.wait()
        start_megabytes = worker_megabytes(service)
        proxy.bytes_per_second = 4 << 20
        add_large_events(urls["DATABASE_URL"], 200, 80 << 10)
        used_megabytes = []

        def is_drained() -> bool:
            used_megabytes.append(worker_megabytes(service))
            return int(old.xlen(STREAM)) >= 200

        eventually(is_drained, 90)
        proxy.bytes_per_second = 0
        # Another payment is published after these.
        payment_id = pay(service)
        eventually(lambda: payment_id in published(old), 90)
        assert old.xlen(STREAM) == 201
        assert max(used_megabytes) < start_megabytes + 30
