"""Shutdown: the service drains, aborts responses that never end, and cleans up."""

import concurrent.futures
import contextlib
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving

DRAIN = {"DRAIN_SECONDS": "2", "RETIRE_SECONDS": "1", "WEB_CONCURRENCY": "1"}
FAULT_ROUTES = "tests.fault_routes:app"
SHUTDOWN_COMPLETE = "Application shutdown complete."


@pytest.fixture
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture
def service(urls: dict[str, str]) -> Iterator[Service]:
    with serving(FAULT_ROUTES, **DRAIN, **urls) as service:
        service.wait()
        yield service


@contextlib.contextmanager
def websocket(service: Service) -> Iterator[Connection]:
    """Open a WebSocket, over which one message has been sent and received."""
    with connect(f"ws://127.0.0.1:{service.port}/echo") as connection:
        connection.send("hello")
        assert connection.recv(DEADLINE_SECONDS) == "hello"
        yield connection


@contextlib.contextmanager
def stream(service: Service) -> Iterator[Iterator[str]]:
    """Open a stream, of which the first line has been received."""
    url = f"http://127.0.0.1:{service.port}/events?seconds=60"
    with httpx.stream("GET", url, timeout=DEADLINE_SECONDS) as response:
        lines = response.iter_lines()
        assert next(lines) == "data: 0"
        yield lines


# Graceful shutdown


def test_draining_service_serves_requests_and_closes_connections(urls: dict[str, str]) -> None:
    with serving(FAULT_ROUTES, **DRAIN | urls | {"DRAIN_SECONDS": "5"}) as service:
        service.wait()
        start = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        service.wait("/health/ready", 503)
        assert service.get("/health/ready").json()["status"] == "draining"
        for _ in range(50):
            response = service.get("/", Connection="keep-alive")
            assert response.status_code == 200
            assert response.headers["connection"] == "close"
        # A second signal changes nothing.
        service.process.send_signal(signal.SIGTERM)
        assert service.get("/health/live").status_code == 200
        assert service.process.wait(DEADLINE_SECONDS) == 0
        assert time.monotonic() - start > 5
        assert service.messages.count(SHUTDOWN_COMPLETE) == 1


def test_websockets_are_closed_with_1012_and_streams_aborted(service: Service) -> None:
    with websocket(service) as connection, stream(service) as events:
        start = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(DEADLINE_SECONDS)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        # After DRAIN_SECONDS
        assert time.monotonic() - start > 2
        with pytest.raises(httpx.RemoteProtocolError):
            list(events)
        # After RETIRE_SECONDS, too
        assert time.monotonic() - start > 3
        assert service.process.wait(DEADLINE_SECONDS) == 0
    assert SHUTDOWN_COMPLETE in service.messages


def test_shutdown_waits_for_background_tasks(service: Service) -> None:
    service.get("/background-task?seconds=4")
    # Still runs when the other is done, for which uvicorn itself waits.
    service.get("/background?seconds=7")
    assert service.stop() == 0
    messages = service.messages
    finished = "1 background tasks finished, 0 cancelled"
    assert {"background done", "task done", finished} <= set(messages)
    assert messages.index(SHUTDOWN_COMPLETE) > messages.index("background done")


def test_tasks_running_at_the_deadline_are_cancelled(urls: dict[str, str]) -> None:
    settings = DRAIN | urls | {"GRACEFUL_TIMEOUT_SECONDS": "6"}
    with serving(FAULT_ROUTES, **settings) as service:
        service.wait()
        service.get("/background?seconds=60")
        service.get("/background-task?seconds=60")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            slow = pool.submit(service.get, "/slow?seconds=60")
            eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
            assert service.stop() == 0
        response = slow.result()
        assert response.status_code == 503
        assert response.json()["detail"] == "The service is shutting down."
        messages = set(service.messages)
        assert {"0 background tasks finished, 1 cancelled", SHUTDOWN_COMPLETE} <= messages
        assert "Cancel 2 running task(s), timeout graceful shutdown exceeded" in messages
        assert not {"background done", "task done"} & messages


def test_connections_in_the_accept_queue_are_served(service: Service) -> None:
    """The kernel accepts connections for a suspended worker. None of them is reset."""
    started = "Started server process"
    (worker,) = {line["pid"] for line in service.lines if line["message"].startswith(started)}
    process = psutil.Process(worker)
    process.suspend()
    address = ("127.0.0.1", service.port)
    clients = [socket.create_connection(address, timeout=DEADLINE_SECONDS) for _ in range(20)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    service.process.send_signal(signal.SIGQUIT)
    time.sleep(0.3)
    process.resume()
    for client in clients:
        with client:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert service.process.wait(DEADLINE_SECONDS) == 0


# Quick shutdown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("draining", [False, True], ids=["serving", "draining"])
def test_quick_shutdown_aborts_everything(service: Service, number: int, draining: bool) -> None:
    with websocket(service), stream(service), concurrent.futures.ThreadPoolExecutor() as pool:
        service.get("/background?seconds=60")
        slow = pool.submit(service.get, "/slow?seconds=60")
        # The WebSocket, the stream and the slow request.
        eventually(lambda: "http_server_active_requests 3.0" in service.metrics())
        if draining:
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        start = time.monotonic()
        assert service.stop(number) == 0
        # 2 s on an idle machine; 47 s if it waited.
        assert time.monotonic() - start < 10
        with contextlib.suppress(httpx.TransportError):
            assert slow.result().status_code == 503
    assert SHUTDOWN_COMPLETE in service.messages


def test_graceful_shutdown_becomes_quick_on_sigint(service: Service) -> None:
    """Even while it waits for background tasks."""
    service.get("/background?seconds=60")
    service.process.send_signal(signal.SIGTERM)
    eventually(lambda: "waiting for 1 background tasks" in service.text)
    assert service.stop(signal.SIGINT) == 0
    expected = {"0 background tasks finished, 1 cancelled", SHUTDOWN_COMPLETE}
    assert expected <= set(service.messages)


# Replacement of a worker


def test_timed_out_worker_logs_its_stacks(urls: dict[str, str]) -> None:
    settings = DRAIN | urls | {"WORKER_TIMEOUT_SECONDS": "4"}
    with serving(FAULT_ROUTES, **settings) as service:
        service.wait()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(block_worker, service)
            eventually(lambda: "timed out or crashed" in service.text)
        service.wait()
        (line,) = [line for line in service.lines if line["logger"] == "app.worker"]
        assert "fault_routes.py" in line["stacks"]
        assert "in stuck" in line["stacks"]


def block_worker(service: Service) -> None:
    with contextlib.suppress(httpx.TransportError):
        service.get("/stuck")


def test_replacement_starts_before_the_only_worker_retires(urls: dict[str, str]) -> None:
    """An idle connection keeps the worker for RETIRE_SECONDS; there is no gap."""
    recycling = {"MAX_REQUESTS": "50", "MAX_REQUESTS_JITTER": "0", "RETIRE_SECONDS": "9"}
    with serving(**DRAIN | urls | recycling) as service:
        service.wait()
        longest_seconds = 0.0
        end = time.monotonic() + 60
        with socket.create_connection(("127.0.0.1", service.port)):
            # The later workers have no idle connection, and retire at once.
            while service.text.count("Shutting down") < 3 and time.monotonic() < end:
                start = time.monotonic()
                assert service.get("/").status_code == 200
                longest_seconds = max(longest_seconds, time.monotonic() - start)
        messages = service.messages
        after_request = messages[messages.index("replacement requested") :]
        startup = after_request.index("Application startup complete.")
        assert startup < after_request.index("Shutting down")
        # Less than RETIRE_SECONDS
        assert longest_seconds < 8
