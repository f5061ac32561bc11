"""A process without routes: its port has few clients, and each for a limited time."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import httpx
import psutil
import pytest

from app.telemetry.scrape_server import MAX_CONNECTIONS
from scripts.dev_services import Redis, free_port
from tests.documented_metrics import assert_documented, exposed
from tests.service_process import DEADLINE_SECONDS, PROJECT, Running, eventually
from tests.serving.raw_http import stalled_clients

#: Connections of such a process to Postgres and Redis
OWN_CONNECTIONS = 10
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"


class IdleProcess(Running):
    """A process that does nothing."""

    def __init__(self, *arguments: str, **settings: str) -> None:
        self.port = free_port()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by running()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.idle_process", *arguments],
            cwd=PROJECT,
            env=os.environ | {"METRICS_BIND": f"127.0.0.1:{self.port}"} | settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=DEADLINE_SECONDS)

    def connections(self) -> int:
        return len(psutil.Process(self.process.pid).net_connections())


@contextlib.contextmanager
def running(*arguments: str, **settings: str) -> Iterator[IdleProcess]:
    process = IdleProcess(*arguments, **settings)
    try:
        eventually(lambda: process.get("/health/ready").status_code == 200)
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()
        process.output.close()


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "LOG_FORMAT": "json"}


@pytest.fixture(scope="module")
def process(urls: dict[str, str]) -> Iterator[IdleProcess]:
    with running(**urls) as process:
        yield process


@pytest.mark.parametrize(
    "data", [b"", b"GET /metr", REQUEST * 50], ids=["idle", "partial", "unread"]
)
def test_clients_of_a_process_without_routes_are_bounded(process: IdleProcess, data: bytes) -> None:
    """Each connection costs a file descriptor: getrlimit(2), `RLIMIT_NOFILE`."""
    with stalled_clients(process.port, 150, data):
        assert process.get("/health/live").status_code == 200
        assert "dependency_up" in process.get("/metrics").text
        eventually(lambda: process.connections() <= MAX_CONNECTIONS + OWN_CONNECTIONS)
    eventually(lambda: process.connections() <= OWN_CONNECTIONS)
    assert "Traceback" not in process.text


def test_response_closes_the_connection(process: IdleProcess) -> None:
    """RFC 9112, section 9.6: a server that sends `close` closes after the response."""
    for path in ("/health/live", "/metrics", "/absent"):
        assert process.get(path).headers.get_list("connection") == ["close"]


def test_metrics_of_a_process_without_routes_are_documented(process: IdleProcess) -> None:
    """Its pools, its event loop and its control group; not those of workers."""
    eventually(lambda: "db_client_connection_max" in process.get("/metrics").text)
    scrape = process.get("/metrics").text
    assert_documented(scrape)
    assert exposed(scrape).keys() >= {
        "dependency_up",
        "dependency_required",
        "db_client_connection_timeouts_total",
        "worker_event_loop_delay_seconds",
        "cgroup_memory_limit_bytes",
        "target_info",
    }
    assert "worker_processes" not in scrape


def test_stalled_client_is_disconnected_and_delays_no_shutdown(urls: dict[str, str]) -> None:
    with running("3", **urls) as process:
        with stalled_clients(process.port, 3, b"") as clients:
            for client in clients:
                assert client.recv(1) == b""
        with stalled_clients(process.port, 3, b"GET /metr"):
            assert process.stop() == 0
        assert "Traceback" not in process.text
