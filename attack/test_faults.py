"""Postgres and Redis under faults and under load: reads survive, writes are never lost, and every wait is bounded."""

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

from load import get, load

LIVE = get("/health/live", "live", pause=0.05)


class Write(NamedTuple):
    """One POST that is found again by its reference, and its answer."""

    reference: str
    answer: httpx.Response


def sql(url: str, query: str, *arguments: object) -> list[Any]:
    """Return the rows of a query over a connection of its own."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    return asyncio.run(run())


@pytest.fixture(scope="module", autouse=True)
def durable(database_url: str) -> None:
    """Have Postgres write before it acknowledges: the throw-away one does not, and loses what it says it has."""
    sql(database_url, "alter database postgres set synchronous_commit = on")


@contextlib.contextmanager
def writing(service: Service, clients: int = 4) -> Iterator[list[Write]]:
    """Post payments, each with a reference of its own and once only, until the end of the block."""
    stop, writes = threading.Event(), list[Write]()

    def client() -> None:
        while not stop.is_set():
            reference = str(uuid4())
            payment = {"amount": 1, "currency": "EUR", "reference": reference}
            key = {"Idempotency-Key": reference}
            writes.append(
                Write(reference, service.http.post("/payments", json=payment, headers=key))
            )

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client) for _ in range(clients)]
        try:
            yield writes
        finally:
            stop.set()
            for each in running:
                each.result()


def assert_nothing_lost(writes: list[Write], url: str) -> None:
    """Assert that every write was stored and said so, or was refused with the advice to try again."""
    assert {write.answer.status_code for write in writes} <= {201, 503}
    assert all(
        write.answer.headers["retry-after"] for write in writes if write.answer.status_code == 503
    )
    stored = sql(
        url,
        "select reference from payments where reference = any($1)",
        [write.reference for write in writes],
    )
    references = [row["reference"] for row in stored]
    assert len(references) == len(set(references))  # nothing twice
    acknowledged = {write.reference for write in writes if write.answer.status_code == 201}
    assert acknowledged
    assert acknowledged <= set(references)


def assert_quiet(service: Service) -> None:
    """Assert that an outage is told in single lines, and that none is an error of ours."""
    assert [line for line in service.lines if line["level"] not in {"info", "warning"}] == []
    assert "Traceback" not in service.text


def sample(service: Service, name: str) -> list[float]:
    """Return the values of a metric, whose labels may be given too."""
    return [
        float(value)
        for value in re.findall(rf"^{re.escape(name)}\S* (\S+)$", service.metrics(), re.MULTILINE)
    ]


def workers(service: Service) -> list[psutil.Process]:
    """Return the processes that serve."""
    pids = re.findall(
        r'^worker_resident_memory_bytes{pid="(\d+)"}', service.metrics(), re.MULTILINE
    )
    return [psutil.Process(int(pid)) for pid in pids]


def terminate(postgres: Postgres) -> None:
    """Terminate all connections, time and again."""
    for _ in range(10):
        sql(
            postgres.url,
            "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()",
        )
        time.sleep(0.3)


def restart(postgres: Postgres, mode: str) -> None:
    """Stop in one of pg_ctl's modes, and start a second later."""
    postgres.stop(mode)
    time.sleep(1)
    postgres.start()


@pytest.mark.parametrize(
    "fault",
    [
        terminate,
        lambda postgres: restart(postgres, "fast"),
        lambda postgres: restart(postgres, "immediate"),
    ],
    ids=["every connection terminated", "restarted", "crashed"],
)
def test_no_read_fails_and_no_write_is_lost(
    urls: dict[str, str], postgres: Postgres, fault: Callable[[Postgres], None]
) -> None:
    with serving("dependency_routes:app", **urls) as service:
        service.wait()
        with load(service.port, 16 * [get("/read")]) as reads, writing(service) as writes:
            time.sleep(1)
            fault(postgres)
            time.sleep(1)
        print(reads, Counter(write.answer.status_code for write in writes), "writes")
        assert reads.failures == []
        assert reads.total > 200
        assert_nothing_lost(writes, postgres.url)
        assert_quiet(service)
        assert sql(
            postgres.url, "select 1 from pg_stat_activity where application_name = 'service'"
        )


def test_a_frozen_postgres_bounds_every_request(urls: dict[str, str], postgres: Postgres) -> None:
    command_timeout = 3
    settings = urls | {
        "DATABASE_COMMAND_TIMEOUT_SECONDS": str(command_timeout),
        "DATABASE_MAX_CONNECTIONS": "12",
    }
    with serving("dependency_routes:app", **settings) as service:
        service.wait()
        either = (200, 503)
        reads = [get("/read", "read", statuses=either), get("/transaction", statuses=either)]
        with load(service.port, 8 * reads, 2 * [LIVE]) as result, writing(service) as writes:
            time.sleep(0.5)
            with frozen(postgres.pid):
                service.wait("/health/ready", 503)
                eventually(lambda: sample(service, 'dependency_up{dependency="postgres"}') == [0])
                time.sleep(2 * command_timeout)
            service.wait("/health/ready", 200)
            thawed = len(writes)
            time.sleep(1)
        print(result, result.slowest_seconds)
        assert result.failures == []
        assert result.slowest_seconds.pop("live") < 2
        longest = (
            command_timeout + 2
        )  # half a second to cancel, and slack; not the timeout a second time
        assert max(result.slowest_seconds.values()) < longest
        assert max(write.answer.elapsed.total_seconds() for write in writes) < longest
        assert {write.answer.status_code for write in writes[thawed + 4 :]} == {201}
        assert_nothing_lost(writes, postgres.url)
        assert_quiet(service)
        eventually(lambda: sample(service, 'dependency_up{dependency="postgres"}') == [1])


def test_an_exhausted_pool_sheds_what_does_not_fit(urls: dict[str, str]) -> None:
    settings = urls | {"DATABASE_MAX_CONNECTIONS": "4", "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "0.5"}
    with serving("dependency_routes:app", **settings) as service:
        service.wait()
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda _: service.get("/sleep?seconds=4"), range(16)))
            assert service.get("/health/ready").status_code == 200
        shed = [answer for answer in answers if answer.status_code == 503]
        print(sorted((answer.status_code, answer.elapsed.total_seconds()) for answer in answers))
        assert {answer.status_code for answer in answers} == {200, 503}
        # none has waited for one that was served
        assert all(
            answer.headers["retry-after"] and answer.elapsed.total_seconds() < 3 for answer in shed
        )
        assert_quiet(service)


def test_a_slow_query_is_cut_off_at_the_server_too(
    urls: dict[str, str], postgres: Postgres
) -> None:
    settings = urls | {"DATABASE_COMMAND_TIMEOUT_SECONDS": "0.5", "REQUEST_TIMEOUT_SECONDS": "1"}
    running = (
        "select 1 from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
    )
    with serving("dependency_routes:app", **settings) as service:
        service.wait()
        assert service.get("/sleep?seconds=60").status_code == 503
        assert sql(postgres.url, running) == []
    with serving(
        "dependency_routes:app", **settings | {"DATABASE_COMMAND_TIMEOUT_SECONDS": "60"}
    ) as service:
        service.wait()
        assert service.get("/sleep?seconds=60").status_code == 504
        eventually(lambda: sql(postgres.url, running) == [])
        assert_quiet(service)


def test_a_long_outage_is_answered_at_once_and_costs_little(
    urls: dict[str, str], postgres: Postgres
) -> None:
    with serving("dependency_routes:app", **urls) as service:
        service.wait()
        path = "/read"
        eventually(lambda: len(workers(service)) == 2)
        processes = workers(service)
        postgres.stop()
        try:
            begin, used = time.monotonic(), sum(sum(each.cpu_times()[:2]) for each in processes)
            with ThreadPoolExecutor(16) as threads:
                young = list(threads.map(service.get, 16 * [path]))
            used = sum(sum(each.cpu_times()[:2]) for each in processes) - used
            print(f"{used:.2f} s of CPU in {time.monotonic() - begin:.2f} s")
            assert (
                used < (time.monotonic() - begin) / 2
            )  # a busy loop in each would use twice the time
            old = [service.get(path) for _ in range(20)]
        finally:
            postgres.start()
        assert {answer.status_code for answer in young + old} == {503}
        assert max(answer.elapsed.total_seconds() for answer in young) > 2
        assert max(answer.elapsed.total_seconds() for answer in old) < 1
        eventually(lambda: service.get(path).status_code == 200)
        assert_quiet(service)


def test_a_restart_of_redis_costs_no_request(urls: dict[str, str], redis: Redis) -> None:
    with serving("dependency_routes:app", **urls) as service:
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


def test_a_frozen_redis_slows_nothing_else_down(urls: dict[str, str], redis: Redis) -> None:
    with serving("dependency_routes:app", **urls) as service:
        service.wait()
        others = [LIVE, get("/health/ready", "ready", pause=0.05), get("/read", "read")]
        with load(
            service.port, 50 * [get("/cached", "cached", statuses=(200, 503))], others
        ) as result:
            time.sleep(1)
            with frozen(redis.pid):
                eventually(lambda: sample(service, 'dependency_up{dependency="redis"}') == [0])
                time.sleep(1)
            eventually(lambda: sample(service, 'dependency_up{dependency="redis"}') == [1])
            answered = result.answered["cached", 503]
            time.sleep(1)
        print(result, result.slowest_seconds)
        assert result.failures == []
        assert answered
        assert result.answered["cached", 503] == answered  # it recovers at once
        assert result.slowest_seconds.pop("cached") < 2.5
        assert result.slowest_seconds.pop("ready") < 2  # a check may take READINESS_TIMEOUT_SECONDS
        assert max(result.slowest_seconds.values()) < 1
        assert_quiet(service)


def test_gauges_add_up_over_the_workers(urls: dict[str, str], postgres: Postgres) -> None:
    budget = 8
    of_ours = "select 1 from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
    busy = get("/sleep?seconds=0.05", statuses=(200, 503), keeps_alive=False)

    def of_pool(gauge: str, pool: str) -> float:
        return sum(
            sample(
                service, f'db_client_connection_{gauge}{{db_client_connection_pool_name="{pool}"'
            )
        )

    with serving("dependency_routes:app", **urls, DATABASE_MAX_CONNECTIONS=str(budget)) as service:
        service.wait()
        with load(service.port, 16 * [busy], 8 * [get("/cached", keeps_alive=False)]):
            eventually(
                lambda: of_pool("count", "postgres") == budget - 2
            )  # each worker has one for readiness
            assert 0 < of_pool("count", "redis") <= 40
            assert len(sql(postgres.url, of_ours)) <= budget
        assert (of_pool("max", "postgres"), of_pool("max", "redis")) == (budget - 2, 40)
        assert sample(service, "worker_processes") == [2]
        assert [size > 1 << 20 for size in sample(service, "worker_resident_memory_bytes")] == [
            True,
            True,
        ]
        killed = workers(service)[0]
        killed.kill()
        eventually(
            lambda: (
                killed.pid not in {each.pid for each in workers(service)}
                and len(workers(service)) == 2
            )
        )
        assert sample(service, "worker_processes") == [2]
