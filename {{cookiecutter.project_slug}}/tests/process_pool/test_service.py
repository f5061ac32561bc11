"""A process pool in the workers of the service: responses, lines, and its end with the worker."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest

from scripts.dev_services import Redis
from tests.service_process import Service, eventually, serving

POOL_ROUTES = "tests.pool_routes:app"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")


@pytest.fixture
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    limits = {"WEB_CONCURRENCY": "1", "RETIRE_SECONDS": "0", "GRACEFUL_TIMEOUT_SECONDS": "8"}
    with serving(POOL_ROUTES, **urls, **limits) as service:
        service.wait()
        yield service


def pool_processes(service: Service) -> list[psutil.Process]:
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [each for each in children if "app.process_pool" in " ".join(each.cmdline())]


def start(service: Service, path: str) -> threading.Thread:
    """Send a request from a thread, and wait until its call runs, or waits."""

    def send() -> None:
        with contextlib.suppress(httpx.TransportError):
            service.get(path)

    number = service.get("/calls").json() + 1
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    eventually(lambda: service.get("/calls").json() == number)
    return thread


def test_pool_responds_logs_json_and_ends_with_the_service(service: Service) -> None:
    """SIGTERM reaches all processes of a control group (systemd, `KillMode`), and waits for calls.

    Lines of every kind are JSON, with the process that has written them; `lines` checks that.
    """
    pid = service.get("/pool/pid").json()
    crashed = service.get("/pool/crash")
    assert (crashed.status_code, crashed.json()["code"]) == (500, "computation_crashed")
    conflict = service.get("/pool/conflict", **{"X-Request-ID": "call-1"})
    assert (conflict.status_code, conflict.json()["code"]) == (409, "conflict")
    late = service.get("/pool/sleep?seconds=60&limit=0.2")
    assert (late.status_code, late.json()["code"]) == (504, "computation_timed_out")
    assert service.get("/pool/bug").status_code == 500
    writer = service.get("/pool/write", **{"X-Request-ID": "call-2"}).json()
    assert writer != pid

    busy = [start(service, "/pool/sleep?seconds=3"), start(service, "/pool/pid")]
    full = service.get("/pool/pid")
    assert (full.status_code, full.json()["code"]) == (503, "process_pool_full")
    assert full.headers["retry-after"] == "1"
    assert service.get("/").status_code == 200

    processes = pool_processes(service)
    for process in [*processes, psutil.Process(service.process.pid)]:
        process.terminate()
    assert service.process.wait(60) == 0
    for thread in busy:
        thread.join()
    assert not any(process.is_running() for process in processes)

    lines = {line["message"]: line for line in service.lines}
    assert lines["logged in the pool"]["request_id"] == "call-2"
    assert lines["logged in the pool"]["pid"] == writer
    assert lines["printed in the pool"]["pid"] == writer
    assert lines["written in the pool"]["process_pid"] == writer
    assert "echoed in the pool" in lines
    assert lines["process died in a computation"]["exit"] == "killed by SIGSEGV"
    assert "the bug" in lines["unhandled exception"]["exception"]["traceback"]
    finished = [line for line in service.lines if line.get("path") == "/pool/sleep"]
    assert sorted(line["status"] for line in finished) == [200, 504]


@pytest.mark.parametrize("victim", ["worker", "master"])
def test_pool_ends_with_a_killed_worker_or_master(service: Service, victim: str) -> None:
    """In the middle of a call. A worker without a master has `GRACEFUL_TIMEOUT_SECONDS` to end."""
    start(service, "/pool/sleep?seconds=600")
    processes = pool_processes(service)
    pid = service.process.pid if victim == "master" else processes[0].ppid()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(each.is_running() for each in processes))
