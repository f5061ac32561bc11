"""Faults of a running service fire the right alert of its rules, and page nobody for another.

A real Prometheus scrapes the service and its consumer; a real Alertmanager routes and inhibits.
alerting.py has the durations of this test.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis as Client
from scripts.dev_services import Postgres, Redis
from scripts.fake_gateway import FakeGateway, run_gateway
from tests.payments.test_consumer import Consumer
from tests.service_process import Service, eventually, frozen, serving

from alerting import NAME, Watch, panels_of, queries_without_data, watching, with_values
from load import get, load, post
from test_faults import workers
from test_payments import STREAM, consuming

#: About the control group, which is here that of the machine with everything else on it.
OF_THE_MACHINE = {"MemoryNearLimit", "CpuThrottled", "OutOfMemory", "WorkersExceedMemory"}
#: Advice on capacity
ADVICE = {"AddWorkers", "RemoveWorkers"}
PAYMENT = {"amount": 1, "currency": "EUR", "reference": "alerts"}
GOOD = 8 * [get("/", pause=0.02)]
PAYING = [post("/payments", PAYMENT, statuses=(201, 503, 504), pause=0.5)]
READING = 32 * [get("/read", statuses=(200, 503, 504), pause=0.1)]
ALERT_SECONDS = 90


@pytest.fixture(scope="module")
def gateway() -> Iterator[FakeGateway]:
    with run_gateway() as server:
        yield server


@pytest.fixture(scope="module")
def settings(urls: dict[str, str], gateway: FakeGateway) -> dict[str, str]:
    return urls | {
        "GATEWAY_URL": gateway.url,
        "LOG_FORMAT": "json",
        "WEB_CONCURRENCY": "2",
        "DATABASE_MAX_CONNECTIONS": "6",
        "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "1",
        "DATABASE_COMMAND_TIMEOUT_SECONDS": "3",
    }


@pytest.fixture(scope="module")
def service(settings: dict[str, str]) -> Iterator[Service]:
    with serving("dependency_routes:app", **settings) as service:
        service.wait()
        service.wait_for_workers()
        yield service


@pytest.fixture(scope="module")
def consumer(settings: dict[str, str], service: Service) -> Iterator[Consumer]:
    with consuming(**settings) as (consumer,):
        eventually(consumer.is_ready)
        yield consumer


@pytest.fixture(scope="module")
def watch(
    service: Service, consumer: Consumer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watch]:
    targets = {NAME: service.metrics_port, f"{NAME}-consumer": consumer.port}
    directory = tmp_path_factory.mktemp("prometheus")
    # Requests and payments during all tests, so that rates exist.
    with watching(directory, targets) as watch, load(service.port, GOOD, PAYING):
        yield watch


def alerts(watch: Watch) -> set[str]:
    return watch.firing() - OF_THE_MACHINE - ADVICE


@contextlib.contextmanager
def expecting(watch: Watch, alert: str, *, pages: bool = False) -> Iterator[None]:
    """Expect an alert during the block, and no page but that one; then wait for its end."""
    watch.pages.clear()
    yield
    eventually(lambda: alert in watch.firing(), ALERT_SECONDS)
    if pages:
        eventually(lambda: watch.pages, ALERT_SECONDS)
    # For notifications that are on their way.
    time.sleep(8)
    assert watch.pages == ({alert} if pages else set())


def test_healthy_service_has_no_alert(watch: Watch, consumer: Consumer) -> None:
    eventually(lambda: watch.query('job:availability:burn_rate1h{job="service"}'), ALERT_SECONDS)
    time.sleep(10)
    assert alerts(watch) == set(), consumer.text[-2000:]
    assert watch.pages == set()


def test_poison_message_fires_dead_letters(watch: Watch, redis: Redis) -> None:
    client = Client.from_url(redis.url)
    with expecting(watch, "DeadLetters"):
        client.xadd(STREAM, {"poison": "yes"})
    assert alerts(watch) == {"DeadLetters"}
    client.delete(f"{STREAM}.dead")
    eventually(lambda: not alerts(watch), ALERT_SECONDS)


def test_killed_worker_fires_workers_crashing(watch: Watch, service: Service) -> None:
    with expecting(watch, "WorkersCrashing"):
        workers(service)[0].kill()
    assert "WorkersCrashing" in alerts(watch)


def test_exhausted_pool_fires_its_alert(watch: Watch, service: Service) -> None:
    """With so many good requests that the error budget hardly burns."""
    busy = get("/sleep?seconds=3", statuses=(200, 503), keeps_alive=False)
    with expecting(watch, "ConnectionPoolExhausted"), load(service.port, 6 * [busy]):
        eventually(lambda: "ConnectionPoolExhausted" in watch.firing(), ALERT_SECONDS)


def test_failing_gateway_fires_the_circuit_breaker(watch: Watch, gateway: FakeGateway) -> None:
    with expecting(watch, "CircuitBreakerOpen"):
        gateway.status = 503
        eventually(lambda: "CircuitBreakerOpen" in watch.firing(), ALERT_SECONDS)
    gateway.status = 201
    eventually(lambda: "CircuitBreakerOpen" not in watch.firing(), ALERT_SECONDS)


def test_every_panel_of_the_example_has_data(watch: Watch, service: Service) -> None:
    """After the faults above. test_panels.py and test_jobs.py have the other dashboards."""
    key = {"Idempotency-Key": "every-panel"}
    created = service.http.post("/payments", json=PAYMENT, headers=key)
    for _ in range(4):
        service.get(created.headers["location"])
        service.get("/payments/totals")
        time.sleep(1.5)
    assert queries_without_data(watch, "payments") == []


def test_hung_postgres_is_one_page(watch: Watch, service: Service, postgres: Postgres) -> None:
    """Requests fail and the budget burns, which Alertmanager inhibits; also after the outage."""
    with expecting(watch, "RequiredDependencyDown", pages=True), load(service.port, READING):
        with frozen(postgres.pid):
            eventually(lambda: "RequiredDependencyDown" in watch.firing(), ALERT_SECONDS)
            eventually(lambda: "ErrorBudgetBurn" in watch.firing(), ALERT_SECONDS)
        time.sleep(10)


@pytest.mark.skipif("DASHBOARD_DATA" not in os.environ, reason="DASHBOARD_DATA names no file")
def test_record_the_panels(watch: Watch) -> None:
    """Write the data of the service's panels for `scripts.dashboard_picture` of the template."""
    end = time.time()
    recorded = {}
    for panel in panels_of("service"):
        for target in panel.get("targets", ()):
            query = with_values(target["expr"])
            recorded[target["expr"]] = watch.query_range(query, end - 240, end, 2)
    Path(os.environ["DASHBOARD_DATA"]).write_text(json.dumps(recorded))
