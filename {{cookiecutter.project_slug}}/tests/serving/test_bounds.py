"""Threads, connections, workers and streams are bounded, whatever clients and operators do."""

import concurrent.futures
import contextlib
import signal
import sys
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from app.telemetry.scrape_server import MAX_CONNECTIONS
from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving
from tests.serving.raw_http import stalled_clients

FAULT_ROUTES = "tests.fault_routes:app"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


def children(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children()


def workers(service: Service) -> list[psutil.Process]:
    """Return the running workers: all children except the metrics process."""
    booted = [line["pid"] for line in service.lines if line["message"].startswith("Booting")]
    return [each for each in children(service) if each.pid in booted]


# Threads


def test_threads_of_timed_out_requests_are_bounded(urls: dict[str, str]) -> None:
    """anyio's documentation, "Working with threads": 40 threads at the same time by default.

    Starlette's documentation, "Thread Pool": `def` routes run in them.
    """
    settings = {"WEB_CONCURRENCY": "1", "REQUEST_TIMEOUT_SECONDS": "1"}
    with serving(FAULT_ROUTES, **settings, **urls) as service:
        service.wait()
        (worker,) = workers(service)

        def request(_: int) -> int:
            return service.get("/slow-thread?seconds=25").status_code

        with concurrent.futures.ThreadPoolExecutor(100) as pool:
            assert set(pool.map(request, range(200))) == {504}
        assert worker.num_threads() < 40 + 20
        assert service.get("/slow?seconds=0").status_code == 200
        # The threads are free again, and their late responses are sent to nobody.
        eventually(lambda: service.get("/slow-thread?seconds=0").status_code == 200, 60)
        service.stop(signal.SIGINT)


# The metrics port


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    with serving(FAULT_ROUTES, **urls) as service:
        service.wait()
        service.wait_for_workers()
        yield service


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"],
    ids=["idle", "partial", "unread"],
)
def test_clients_of_the_metrics_port_are_bounded(service: Service, data: bytes) -> None:
    """Prometheus' documentation, `scrape_timeout`: a scrape has 10 s."""
    pids = {worker.pid for worker in workers(service)}
    (metrics,) = [each for each in children(service) if each.pid not in pids]
    with stalled_clients(service.metrics_port, 300, data):
        eventually(lambda: metrics.num_threads() <= MAX_CONNECTIONS + 5)
        assert "worker_processes 2.0" in service.metrics()
    eventually(lambda: metrics.num_threads() <= 5)
    assert "Traceback" not in service.text


# Workers


def test_several_sighups_start_no_more_workers_than_one(urls: dict[str, str]) -> None:
    """gunicorn's documentation, "Signal Handling": HUP starts new workers, shuts down old ones."""
    with serving(FAULT_ROUTES, RETIRE_SECONDS="3", **urls) as service:
        service.wait()
        service.wait_for_workers()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            # Both old workers retire as long as they have a request.
            slow = [pool.submit(service.get, "/slow?seconds=5") for _ in range(8)]
            eventually(lambda: "http_server_active_requests 8.0" in service.metrics())
            most = 0
            for number in range(30):
                if number < 6:
                    service.process.send_signal(signal.SIGHUP)
                time.sleep(0.2)
                most = max(most, len(workers(service)))
            assert {response.result().status_code for response in slow} == {200}
        assert most <= 4
        # The last signal counts: its workers are replaced too, later.
        eventually(lambda: len(workers(service)) == 2 and started(service) >= 6)
        assert service.get("/").status_code == 200


def started(service: Service) -> int:
    return service.text.count("Application startup complete.")


def test_one_sighup_replaces_each_worker_once(urls: dict[str, str]) -> None:
    with serving(**urls) as service:
        service.wait()
        service.wait_for_workers()
        before = {worker.pid for worker in workers(service)}
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: service.text.count("Worker exiting") == 2)
        eventually(lambda: len(workers(service)) == 2)
        assert not before & {worker.pid for worker in workers(service)}
        assert started(service) == 4


# Streams

STREAMS = {"WEB_CONCURRENCY": "1", "MAX_STREAMS": "5", "MAX_IN_FLIGHT": "3"}


@contextlib.contextmanager
def stream(service: Service) -> Iterator[httpx.Response]:
    """Open a stream; of an admitted one, the first line has been received."""
    url = f"http://127.0.0.1:{service.port}/events?seconds=60"
    with httpx.stream("GET", url, timeout=DEADLINE_SECONDS) as response:
        lines = response.iter_lines()  # closes the response when it is garbage
        assert next(lines)
        yield response


def test_streams_have_a_limit_of_their_own(urls: dict[str, str]) -> None:
    """ASGI's specification, "Response Body": a stream has `more_body`.

    RFC 9110, section 15.6.4: a server that is overloaded responds 503 with `Retry-After`.
    """
    with serving(FAULT_ROUTES, **STREAMS, **urls) as service, contextlib.ExitStack() as stack:
        service.wait()
        opened = [stack.enter_context(contextlib.ExitStack()) for _ in range(5)]
        for each in opened:
            assert each.enter_context(stream(service)).status_code == 200
        with stream(service) as rejected:
            assert rejected.status_code == 503
            assert rejected.headers["retry-after"] == "1"
            assert rejected.headers["content-type"] == "application/problem+json"
        # More than MAX_IN_FLIGHT streams, and every other kind of response is served.
        for path in ("/", "/slow?seconds=0.1", "/large?megabytes=1", "/health/ready"):
            assert service.get(path).status_code == 200
        assert service.http.head("/").status_code != 503
        eventually(lambda: "http_server_active_requests 5.0" in service.metrics())
        opened[0].close()
        eventually(lambda: "http_server_active_requests 4.0" in service.metrics())
        with stream(service) as admitted:
            assert admitted.status_code == 200
        statuses = [line["status"] for line in service.lines if line.get("route") == "/events"]
        assert statuses.count(503) == 1
        service.process.send_signal(signal.SIGINT)
