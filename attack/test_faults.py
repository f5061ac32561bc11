"""Faults of Postgres and Redis under load.

Reads survive, acknowledged writes are never lost, and every wait is bounded.
"""

import asyncio
import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import httpx
import psutil
import pytest
from scripts.dev_services import Postgres, Redis
from tests.service_process import Service, eventually, frozen, serving

import watch
from load import get, load

APP = "dependency_routes:app"
LIVE = get("/health/live", "live", pause=0.05)
SLEEPING = "select 1 from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
CLIENT_BACKENDS = """
select 1 from pg_stat_activity
where backend_type = 'client backend' and pid <> pg_backend_pid()
"""
TERMINATE_OTHERS = """
select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()
"""


class Write(NamedTuple):
    """A POST, identified by its reference, and its response."""

    reference: str
    response: httpx.Response


def sql(url: str, query: str, *arguments: object) -> list[Any]:
    """Return the rows of a query, over a new connection."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    return asyncio.run(run())


@pytest.fixture(scope="module", autouse=True)
def durable(database_url: str) -> None:
    """Make Postgres write to disk before it acknowledges a commit.

    The temporary Postgres does not by default, and would lose acknowledged writes.
    """
    sql(database_url, "alter database postgres set synchronous_commit = on")


@contextlib.contextmanager
def writing(service: Service, clients: int = 4) -> Iterator[list[Write]]:
    """Post payments during the block, each once and with its own reference."""
    stop = threading.Event()
    writes: list[Write] = []

    def post_payments() -> None:
        while not stop.is_set():
            reference = str(uuid4())
            payment = {"amount": 1, "currency": "EUR", "reference": reference}
            key = {"Idempotency-Key": reference}
            response = service.http.post("/payments", json=payment, headers=key)
            writes.append(Write(reference, response))

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(post_payments) for _ in range(clients)]
        try:
            yield writes
        finally:
            stop.set()
            for each in running:
                each.result()


def assert_nothing_lost(writes: list[Write], url: str) -> None:
    """Assert that each write was stored and acknowledged, or got `Retry-After`."""
    assert {write.response.status_code for write in writes} <= {201, 503}
    acknowledged = {write.reference for write in writes if write.response.status_code == 201}
    rejected = [write for write in writes if write.response.status_code == 503]
    assert all(write.response.headers["retry-after"] for write in rejected)
    query = "select reference from payments where reference = any($1)"
    rows = sql(url, query, [write.reference for write in writes])
    stored = [row["reference"] for row in rows]
    # None is stored twice.
    assert len(stored) == len(set(stored))
    assert acknowledged
    assert acknowledged <= set(stored)


def assert_quiet(service: Service) -> None:
    """Assert that outages are logged as single warnings, without errors or tracebacks."""
    assert [line for line in service.lines if line["level"] not in {"info", "warning"}] == []
    assert "Traceback" not in service.text


def sample(service: Service, name: str) -> list[float]:
    """Return the values of a metric; its name may include the beginning of its labels."""
    line = rf"^{re.escape(name)}(?!\w)\S* (\S+)$"
    return [float(value) for value in re.findall(line, service.metrics(), re.MULTILINE)]


def dependency_up(service: Service, dependency: str) -> list[float]:
    """Return the state of a dependency in the metrics: [1] is up, [0] is down."""
    return sample(service, f'dependency_up{{dependency="{dependency}"}}')


def workers(service: Service) -> list[psutil.Process]:
    """Return the processes of the running workers."""
    return [psutil.Process(pid) for pid in watch.workers(service)]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the CPU time of processes, in user and kernel mode."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def terminate(postgres: Postgres) -> None:
    """Terminate all connections, ten times in three seconds."""
    for _ in range(10):
        sql(postgres.url, TERMINATE_OTHERS)
        time.sleep(0.3)


def restart(postgres: Postgres) -> None:
    """Stop in order, and start a second later."""
    postgres.stop("fast")
    time.sleep(1)
    postgres.start()


def crash(postgres: Postgres) -> None:
    """Stop without a checkpoint, and start a second later."""
    postgres.stop("immediate")
    time.sleep(1)
    postgres.start()


@pytest.mark.parametrize("fault", [terminate, restart, crash])
def test_short_outage_fails_no_read_and_loses_no_write(
    urls: dict[str, str], postgres: Postgres, fault: Callable[[Postgres], None]
) -> None:
    with serving(APP, **urls) as service:
        service.wait()
        with load(service.port, 16 * [get("/read")]) as reads, writing(service) as writes:
            time.sleep(1)
            fault(postgres)
            time.sleep(1)
        print(reads, Counter(write.response.status_code for write in writes), "writes")
        assert reads.failures == []
        assert reads.total > 200
        assert_nothing_lost(writes, postgres.url)
        assert_quiet(service)
        connected = "select 1 from pg_stat_activity where application_name = 'service-api'"
        assert sql(postgres.url, connected)


def test_hung_postgres_delays_requests_by_a_bounded_time(
    urls: dict[str, str], postgres: Postgres
) -> None:
    command_timeout = 3
    # Half a second to cancel, and slack; less than the timeout a second time.
    longest = command_timeout + 2
    settings = {
        "DATABASE_COMMAND_TIMEOUT_SECONDS": str(command_timeout),
        "DATABASE_MAX_CONNECTIONS": "12",
    }
    with serving(APP, **urls, **settings) as service:
        service.wait()
        either = (200, 503)
        reads = [get("/read", "read", statuses=either), get("/transaction", statuses=either)]
        with load(service.port, 8 * reads, 2 * [LIVE]) as result, writing(service) as writes:
            time.sleep(0.5)
            with frozen(postgres.pid):
                service.wait("/health/ready", 503)
                eventually(lambda: dependency_up(service, "postgres") == [0])
                time.sleep(2 * command_timeout)
            service.wait("/health/ready", 200)
            resumed = len(writes)
            time.sleep(1)
        print(result, result.slowest_seconds)
        assert result.failures == []
        assert result.slowest_seconds.pop("live") < 2
        assert max(result.slowest_seconds.values()) < longest
        assert max(write.response.elapsed.total_seconds() for write in writes) < longest
        # Four writes may still have begun before.
        assert {write.response.status_code for write in writes[resumed + 4 :]} == {201}
        assert_nothing_lost(writes, postgres.url)
        assert_quiet(service)
        eventually(lambda: dependency_up(service, "postgres") == [1])


def test_exhausted_pool_sheds_requests_and_stays_ready(urls: dict[str, str]) -> None:
    settings = {"DATABASE_MAX_CONNECTIONS": "4", "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "0.5"}
    with serving(APP, **urls, **settings) as service:
        service.wait()
        with ThreadPoolExecutor(16) as threads:
            responses = list(threads.map(service.get, 16 * ["/sleep?seconds=4"]))
            assert service.get("/health/ready").status_code == 200
        shed = [response for response in responses if response.status_code == 503]
        print(sorted((each.status_code, each.elapsed.total_seconds()) for each in responses))
        assert {response.status_code for response in responses} == {200, 503}
        assert all(response.headers["retry-after"] for response in shed)
        # None has waited for a request that was served.
        assert max(response.elapsed.total_seconds() for response in shed) < 3
        assert_quiet(service)


def test_slow_query_is_cancelled_on_the_server(urls: dict[str, str], postgres: Postgres) -> None:
    """By the command timeout with 503, or by the request timeout with 504."""
    settings = urls | {"DATABASE_COMMAND_TIMEOUT_SECONDS": "0.5", "REQUEST_TIMEOUT_SECONDS": "1"}
    with serving(APP, **settings) as service:
        service.wait()
        assert service.get("/sleep?seconds=60").status_code == 503
        assert sql(postgres.url, SLEEPING) == []
    settings["DATABASE_COMMAND_TIMEOUT_SECONDS"] = "60"
    with serving(APP, **settings) as service:
        service.wait()
        assert service.get("/sleep?seconds=60").status_code == 504
        eventually(lambda: sql(postgres.url, SLEEPING) == [])
        assert_quiet(service)


def test_requests_fail_fast_after_the_retry_window(
    urls: dict[str, str], postgres: Postgres
) -> None:
    """Requests wait only at the start of an outage, and without a busy loop."""
    path = "/read"
    with serving(APP, **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        processes = workers(service)
        postgres.stop()
        try:
            begin = time.monotonic()
            used_before = cpu_seconds(processes)
            with ThreadPoolExecutor(16) as threads:
                early = list(threads.map(service.get, 16 * [path]))
            used = cpu_seconds(processes) - used_before
            print(f"{used:.2f} s of CPU in {time.monotonic() - begin:.2f} s")
            # A busy loop in both workers would use twice the time.
            assert used < (time.monotonic() - begin) / 2
            late = [service.get(path) for _ in range(20)]
        finally:
            postgres.start()
        assert {response.status_code for response in early + late} == {503}
        assert max(response.elapsed.total_seconds() for response in early) > 2
        assert max(response.elapsed.total_seconds() for response in late) < 1
        eventually(lambda: service.get(path).status_code == 200)
        assert_quiet(service)


def test_redis_restarts_fail_no_request(urls: dict[str, str], redis: Redis) -> None:
    with serving(APP, **urls) as service:
        service.wait()
        with load(service.port, 16 * [get("/cached")]) as result:
            for _ in range(3):
                time.sleep(1)
                redis.stop()
                redis.start()
            time.sleep(1)
        print(result)
        assert result.failures == []
        assert result.total > 500
        assert_quiet(service)


def test_hung_redis_delays_no_other_requests(urls: dict[str, str], redis: Redis) -> None:
    with serving(APP, **urls) as service:
        service.wait()
        cached = get("/cached", "cached", statuses=(200, 503))
        others = [LIVE, get("/health/ready", "ready", pause=0.05), get("/read", "read")]
        with load(service.port, 50 * [cached], others) as result:
            time.sleep(1)
            with frozen(redis.pid):
                eventually(lambda: dependency_up(service, "redis") == [0])
                time.sleep(1)
            eventually(lambda: dependency_up(service, "redis") == [1])
            rejected = result.responses["cached", 503]
            time.sleep(1)
        print(result, result.slowest_seconds)
        assert result.failures == []
        assert rejected
        # It recovers at once: no request fails later.
        assert result.responses["cached", 503] == rejected
        assert result.slowest_seconds.pop("cached") < 2.5
        # A check may last READINESS_TIMEOUT_SECONDS.
        assert result.slowest_seconds.pop("ready") < 2
        assert max(result.slowest_seconds.values()) < 1
        assert_quiet(service)


def pool_gauge(service: Service, gauge: str, pool: str) -> float:
    """Return a gauge of a connection pool, summed over workers and states."""
    labels = f'{{db_client_connection_pool_name="{pool}"'
    return sum(sample(service, f"db_client_connection_{gauge}{labels}"))


def test_gauges_add_up_over_all_workers(urls: dict[str, str], postgres: Postgres) -> None:
    """Each of the two workers reserves one connection of its budget for readiness."""
    budget = 8
    busy = get("/sleep?seconds=0.05", statuses=(200, 503), keeps_alive=False)
    with serving(APP, **urls, DATABASE_MAX_CONNECTIONS=str(budget)) as service:
        service.wait()
        with load(service.port, 16 * [busy], 8 * [get("/cached", keeps_alive=False)]):
            eventually(lambda: pool_gauge(service, "count", "postgres") == budget - 2)
            assert 0 < pool_gauge(service, "count", "redis") <= 40
            assert len(sql(postgres.url, CLIENT_BACKENDS)) <= budget
        assert pool_gauge(service, "max", "postgres") == budget - 2
        assert pool_gauge(service, "max", "redis") == 40
        assert sample(service, "worker_processes") == [2]
        sizes = sample(service, "worker_resident_memory_bytes")
        assert len(sizes) == 2
        assert min(sizes) > 1 << 20


def test_gauges_forget_a_killed_worker(urls: dict[str, str]) -> None:
    with serving(APP, **urls) as service:
        service.wait()
        eventually(lambda: len(workers(service)) == 2)
        killed = workers(service)[0]
        killed.kill()

        def is_replaced() -> bool:
            pids = watch.workers(service)
            return killed.pid not in pids and len(pids) == 2

        eventually(is_replaced)
        assert sample(service, "worker_processes") == [2]
