"""Children that a route forks: they end like any process, and their end is not the worker's.

Python's documentation, `signal.set_wakeup_fd`; fixed in asyncio itself by gh-66285 (Python 3.12).
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving

PROCESS_ROUTES = "tests.process_routes:app"
ONE_WORKER = {"WEB_CONCURRENCY": "1", "RETIRE_SECONDS": "1"}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture
def service(urls: dict[str, str]) -> Iterator[Service]:
    with serving(PROCESS_ROUTES, **ONE_WORKER, **urls) as service:
        service.wait()
        yield service


def assert_same_worker_serves(service: Service) -> None:
    """Check that no worker has stopped: it would log it within a tenth of a second."""
    time.sleep(0.5)
    assert service.get("/").status_code == 200
    assert service.text.count("Application startup complete.") == 1
    assert "Shutting down" not in service.text


def test_terminated_child_ends_and_its_worker_serves_on(service: Service) -> None:
    """`Process.terminate` sends SIGTERM, before the child has run anything."""
    for _ in range(5):
        assert service.get("/terminate").json() == -signal.SIGTERM
    assert_same_worker_serves(service)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_ends_a_forked_child_only(service: Service, number: int) -> None:
    assert service.get(f"/signal?number={number}").json() == -number
    assert_same_worker_serves(service)


@pytest.mark.parametrize("path", ["/fork", "/fork-thread"])
def test_forked_child_of_any_thread_ends_on_sigterm(service: Service, path: str) -> None:
    child = psutil.Process(service.get(path).json())
    child.terminate()
    eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert_same_worker_serves(service)


def test_forked_child_keeps_no_connection_open(service: Service) -> None:
    """RFC 9112, section 9.6: the server closes, so the client reads the end at once."""
    address = ("127.0.0.1", service.port)
    with socket.create_connection(address, timeout=DEADLINE_SECONDS) as client:
        client.sendall(b"GET /fork HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        response = b"".join(iter(lambda: client.recv(4096), b""))
    os.kill(int(response.rpartition(b"\r\n")[2]), signal.SIGKILL)


def test_forked_child_does_not_keep_the_port(urls: dict[str, str]) -> None:
    with serving(PROCESS_ROUTES, **ONE_WORKER, **urls) as service:
        service.wait()
        pid = service.get("/fork").json()
        try:
            assert service.stop() == 0
            socket.create_server(("127.0.0.1", service.port)).close()
        finally:
            os.kill(pid, signal.SIGKILL)


def test_forked_child_that_returns_does_not_serve(service: Service) -> None:
    """Its event loop would take connections and responses of the worker.

    libuv aborts the child, with a line on stderr, as its loop is none any more.
    """
    child = service.get("/fork-and-return").json()
    assert child > 0
    eventually(lambda: psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    for _ in range(20):
        assert service.get("/").status_code == 200
    assert_same_worker_serves(service)
