"""Metrics of the real gunicorn that alerts are about, as README.md describes them.

Sources: the semantic conventions of OpenTelemetry (`process.cpu.time`, `db.client.connection.*`);
https://github.com/prometheus/prometheus/issues/1673: a series that begins with 1 has no increase.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from app.settings import Settings
from app.telemetry.pod_metrics import EXIT_REASONS
from scripts.dev_services import Redis
from tests.documented_metrics import assert_documented, documented, exposed
from tests.service_process import Service, eventually, serving

APP = "tests.metric_routes:app"
DELAY = "worker_event_loop_delay_seconds"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    """One service for the tests that end no worker."""
    with serving("tests.fault_routes:app", **urls, MAX_IN_FLIGHT="40") as service:
        service.wait()
        service.wait_for_workers()
        yield service


def value(scrape: str, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels."""
    expected = [f'{label}="{text}"' for label, text in labels.items()]
    labels_and_value = r"(?:\{(.*)\})? (\S+)$"
    lines = re.findall(f"^{name}{labels_and_value}", scrape, re.MULTILINE)
    return sum(float(number) for found, number in lines if all(each in found for each in expected))


def running_workers(scrape: str) -> list[int]:
    """Return the pids of the workers."""
    found = re.findall(r'worker_resident_memory_bytes{pid="(\d+)"}', scrape)
    return sorted(map(int, found))


def exits(scrape: str) -> dict[str, float]:
    return {reason: value(scrape, "worker_exits_total", reason=reason) for reason in EXIT_REASONS}


def test_metrics_have_the_documented_types_and_labels(service: Service) -> None:
    service.get("/bug")
    with service.events("/events?seconds=0.1") as events:
        assert list(events)
    eventually(lambda: "dependency_up" in service.metrics())
    scrape = service.metrics(strip_prefix=False)
    assert_documented(scrape)
    table = documented()
    assert len(table) > 20
    always = {name for name, row in table.items() if not row.is_of_part}
    # Without a control group there are only the limits.
    optional = {name for name in always if name.startswith("cgroup_") and "limit" not in name}
    # Without a read replica
    optional |= {name for name in always if name.startswith("db_replica_")}
    # Without authentication, and without calls to other services
    callers = ("auth_", "circuit_breaker_", "http_client_", "stamina_")
    optional |= {name for name in always if name.startswith(callers)}
    # While traces are off
    optional.add("otel_sdk_exporter_span_exported_total")
    assert always - optional <= exposed(scrape).keys()


def test_configuration_is_exposed(service: Service) -> None:
    eventually(lambda: value(service.metrics(), "worker_processes_planned") == 2)
    scrape = service.metrics()
    assert value(scrape, "worker_processes") == 2
    limit = Settings.model_fields["postgres_max_connections"].default
    assert value(scrape, "http_server_active_requests_limit") == 80
    assert value(scrape, "db_server_connections_limit") == limit
    assert value(scrape, "dependency_required", dependency="postgres") == 1
    assert value(scrape, "dependency_required", dependency="redis") == 0
    name = Settings.model_fields["service_name"].default
    assert value(scrape, "target_info", service_name=name) == 1
    assert value(scrape, "cgroup_memory_limit_bytes") > 1 << 20


def test_unhandled_exceptions_are_counted_from_zero(service: Service) -> None:
    before = value(service.metrics(), "http_server_unhandled_exceptions_total")
    assert "http_server_unhandled_exceptions_total" in service.metrics()
    assert service.get("/bug").status_code == 500
    assert service.get("/absent").status_code == 404
    assert value(service.metrics(), "http_server_unhandled_exceptions_total") == before + 1


def test_blocked_event_loop_is_in_the_histogram(urls: dict[str, str]) -> None:
    """A block of half a second, which no request but this one would show. It computes."""
    with serving(APP, **urls, WEB_CONCURRENCY="1") as service:
        service.wait()

        def late() -> float:
            """Return the number of delays over a quarter of a second."""
            text = service.metrics()
            return value(text, f"{DELAY}_count") - value(text, f"{DELAY}_bucket", le="0.25")

        def cpu_seconds() -> float:
            return value(service.metrics(), "process_cpu_time_seconds_total")

        eventually(lambda: f"{DELAY}_count" in service.metrics())
        before = late()
        cpu_before = cpu_seconds()
        service.get("/block?seconds=0.5")
        eventually(lambda: late() > before)
        eventually(lambda: cpu_seconds() > cpu_before + 0.2)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the context switches of Linux")
def test_idle_worker_wakes_up_rarely(service: Service) -> None:
    """Each wake-up costs 0.1 to 0.2 ms of CPU, which is most of what an idle worker costs."""
    time.sleep(2)  # the requests of other tests
    workers = [psutil.Process(pid) for pid in running_workers(service.metrics())]
    before = sum(each.num_ctx_switches().voluntary for each in workers)
    start = time.monotonic()
    time.sleep(4)
    wake_ups = sum(each.num_ctx_switches().voluntary for each in workers) - before
    assert wake_ups / len(workers) / (time.monotonic() - start) < 14


def test_exits_of_workers_are_counted_by_reason(urls: dict[str, str]) -> None:
    """Each kind of exit once; CPU time of the exited workers is kept."""

    def signal_one(number: signal.Signals) -> None:
        os.kill(running_workers(service.metrics())[0], number)

    def count(reason: str, number: int = 1) -> None:
        expected[reason] += number

        def is_counted() -> bool:
            scrape = service.metrics()
            return exits(scrape) == expected and len(running_workers(scrape)) == 2

        eventually(is_counted)

    with serving(APP, **urls, WORKER_TIMEOUT_SECONDS="3") as service:
        service.wait()
        expected = dict.fromkeys(EXIT_REASONS, 0)
        count("crashed", 0)
        assert all(f'reason="{reason}"' in service.metrics() for reason in EXIT_REASONS)
        signal_one(signal.SIGKILL)
        count("crashed")
        signal_one(signal.SIGTERM)
        count("stopped")
        service.process.send_signal(signal.SIGHUP)
        count("recycled", 2)
        cpu = value(service.metrics(), "process_cpu_time_seconds_total")
        signal_one(signal.SIGSTOP)
        count("timeout")
        assert value(service.metrics(), "process_cpu_time_seconds_total") >= cpu > 0
