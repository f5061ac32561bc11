"""The list of payments from a streaming standby, over sockets: its own writes, hangs, a failover.

The last test exchanges the roles of the servers, so the tests of this module run in their order.
"""

import asyncio
import itertools
import os
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from scripts import dev_services
from scripts.dev_services import Postgres
from tests.documented_metrics import assert_documented
from tests.otlp_receiver import Receiver, receiving
from tests.service_process import PROJECT, Service, eventually, frozen, serving
from tests.standby import Standby, demote, standby

pytestmark = pytest.mark.process

HEADER = "Write-Position"
MAX_LAG_SECONDS = 1.0
#: What a read of a replica that hangs would cost.
COMMAND_TIMEOUT_SECONDS = 8.0


@pytest.fixture(scope="module")
def primary() -> Iterator[Postgres]:
    with dev_services.postgres() as server:
        command = [sys.executable, "-m", "alembic", "upgrade", "head"]
        environment = os.environ | {"DATABASE_URL": server.url}
        subprocess.run(command, check=True, cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
        yield server


@pytest.fixture(scope="module")
def replica(primary: Postgres) -> Iterator[Standby]:
    with standby(primary) as server:
        yield server


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def service(
    primary: Postgres, replica: Standby, redis: dev_services.Redis, receiver: Receiver
) -> Iterator[Service]:
    """Both URLs list both servers, as they do where a failover exchanges their roles."""
    variables = {
        "DATABASE_URL": both(primary, replica, "primary"),
        "DATABASE_REPLICA_URL": both(replica, primary, "prefer-standby"),
        "DATABASE_REPLICA_MAX_LAG_SECONDS": str(MAX_LAG_SECONDS),
        "DATABASE_COMMAND_TIMEOUT_SECONDS": str(COMMAND_TIMEOUT_SECONDS),
        # Each host gets its share: while other tests run, a connect can last over 0.25 s.
        "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "4",
        "READINESS_TIMEOUT_SECONDS": "3",
        "REDIS_URL": redis.url,
        "REDIS_KEY_PREFIX": "payments-replica",
        "LOG_FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    with serving(WEB_CONCURRENCY="1", **variables) as service:
        service.wait()
        eventually(lambda: is_healthy(service))
        yield service


def both(first: Postgres, second: Postgres, attributes: str) -> str:
    """Return a URL of two servers, for those that have the attributes."""
    url = urlsplit(first.url)
    hosts = f"{url.netloc},127.0.0.1:{second.port}"
    query = f"target_session_attrs={attributes}"
    return url._replace(netloc=hosts, query=query).geturl()


def is_healthy(service: Service) -> bool:
    check = service.get("/health/ready").json()["checks"].get("replica", {})
    return bool(check.get("status") == "healthy")


def pay(service: Service, reference: str = "") -> tuple[int, str]:
    """Create a payment; return the status, and the position of the write."""
    body = {"amount": 100, "currency": "EUR", "reference": reference or str(uuid4())}
    headers = {"Idempotency-Key": str(uuid4())}
    response = service.http.post("/payments", json=body, headers=headers)
    return response.status_code, response.headers.get(HEADER, "")


def newest(service: Service, **headers: str) -> str:
    items = service.get("/payments?limit=1", **headers).json()["items"]
    return str(items[0]["reference"]) if items else ""


def reads(service: Service) -> Counter[str]:
    """Return the number of reads by result."""
    samples = {
        sample.labels["result"]: int(sample.value)
        for family in text_string_to_metric_families(service.metrics())
        if family.name == "db_replica_reads"
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    return Counter(samples)


def query(server: Postgres, statement: str, *arguments: object) -> list[asyncpg.Record]:
    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(server.url)
        try:
            return list(await connection.fetch(statement, *arguments))
        finally:
            await connection.close()

    return asyncio.run(fetch())


def references(server: Postgres) -> set[str]:
    return {row[0] for row in query(server, "select reference from payments")}


def test_list_comes_from_the_replica(
    service: Service, replica: Standby, receiver: Receiver
) -> None:
    """Its span has the replica's address. A payment itself is read from the primary."""
    receiver.clear()
    before = reads(service)
    assert service.get("/payments").status_code == 200
    span = receiver.wait_for("SELECT payments")
    assert span.attributes["server.address"] == "127.0.0.1"
    assert span.attributes["server.port"] == replica.port
    eventually(lambda: reads(service) - before == {"replica": 1})
    assert_documented(service.metrics(strip_prefix=False))


def test_caller_reads_its_own_write(service: Service, replica: Standby) -> None:
    query(replica, "select pg_wal_replay_pause()")
    try:
        before = reads(service)
        status, position = pay(service, "mine")
        assert status == 201
        assert newest(service, **{HEADER: position}) == "mine"
        assert newest(service) != "mine"
        eventually(lambda: reads(service) - before == {"replica": 1, "position": 1})
        # Too old by then: all reads see it.
        eventually(lambda: newest(service) == "mine")
        eventually(lambda: reads(service)["lag"])
        eventually(lambda: not is_healthy(service))
        assert service.get("/health/ready").status_code == 200
    finally:
        query(replica, "select pg_wal_replay_resume()")
    eventually(lambda: is_healthy(service))


def test_hung_replica_fails_no_read(service: Service, replica: Standby) -> None:
    """Reads in flight wait for the next comparison, all later ones for nothing."""
    seconds = []
    with frozen(replica.pid):
        for _ in range(50):
            response = service.get("/payments?limit=1")
            assert response.status_code == 200
            seconds.append(response.elapsed.total_seconds())
    assert max(seconds) < COMMAND_TIMEOUT_SECONDS
    assert statistics.median(seconds) < 0.5, sorted(seconds)
    eventually(lambda: is_healthy(service))


class Load:
    """Payments and lists, each by a thread, as fast as they get responses."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.payments: dict[str, int] = {}
        self.lists: Counter[int] = Counter()
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=each) for each in (self._pay, self._list)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _pay(self) -> None:
        for number in itertools.count():
            if self.ended.is_set():
                return
            reference = f"load-{number}"
            self.payments[reference], _ = pay(self.service, reference)

    def _list(self) -> None:
        while not self.ended.is_set():
            self.lists[self.service.get("/payments?limit=1").status_code] += 1

    def accepted(self) -> set[str]:
        return {reference for reference, status in list(self.payments.items()) if status == 201}


def test_failover_under_load_fails_no_read(
    service: Service, primary: Postgres, replica: Standby, receiver: Receiver
) -> None:
    """Writes wait, or get 503, then reach the new primary, and never the old one.

    The old primary comes back as a standby, and reads go there.
    """
    with Load(service) as load:
        eventually(lambda: len(load.accepted()) > 10)
        primary.stop("fast")
        before = load.accepted()
        eventually(lambda: 503 in load.payments.values())
        assert load.accepted() >= before
        replica.promote()
        served = len(load.accepted())
        eventually(lambda: len(load.accepted()) > served + 10)
        demote(primary, replica)
        receiver.clear()
        eventually(lambda: ports(receiver)[-1:] == [primary.port])
        served = len(load.accepted())
        eventually(lambda: len(load.accepted()) > served + 10)
    assert set(load.lists) == {200}
    assert set(load.payments.values()) == {201, 503}
    on_new = references(replica)
    assert load.accepted() <= on_new
    # A row that only the old primary has would keep it from following the new one.
    eventually(lambda: references(primary) == on_new)


def ports(receiver: Receiver) -> list[object]:
    """Return the ports of the servers that have served lists."""
    return [span.attributes["server.port"] for span in receiver.named("SELECT payments")]
