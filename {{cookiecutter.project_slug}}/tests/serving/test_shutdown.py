"""How the service ends: it drains, lets go of what would never end by itself, and cleans up."""

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


@pytest.fixture
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    with serving(
        "tests.fault_routes:app", DATABASE_URL=database_url, REDIS_URL=redis.url, **DRAIN
    ) as service:
        service.wait()
        yield service


@contextlib.contextmanager
def websocket(service: Service) -> Iterator[Connection]:
    """Open a WebSocket that has answered once."""
    with connect(f"ws://127.0.0.1:{service.port}/echo") as connection:
        connection.send("hello")
        assert connection.recv(DEADLINE_SECONDS) == "hello"
        yield connection


@contextlib.contextmanager
def stream(service: Service) -> Iterator[Iterator[str]]:
    """Open a stream that has begun."""
    with httpx.stream(
        "GET", f"http://127.0.0.1:{service.port}/events?seconds=60", timeout=10
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "data: 0"
        yield lines


def messages(service: Service) -> list[str]:
    return [line["message"] for line in service.lines]


def test_it_drains_before_it_ends(database_url: str, redis: Redis) -> None:
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "DRAIN_SECONDS": "5"}
    with serving("tests.fault_routes:app", **DRAIN | urls) as service:
        service.wait()
        start = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        service.wait("/health/ready", 503)
        assert service.get("/health/ready").json()["status"] == "draining"
        for _ in range(50):
            answer = service.get("/", Connection="keep-alive")
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        service.process.send_signal(signal.SIGTERM)  # a second one changes nothing
        assert service.get("/health/live").status_code == 200
        assert service.process.wait(DEADLINE_SECONDS) == 0
        assert time.monotonic() - start > 5
        assert messages(service).count("Application shutdown complete.") == 1


def test_a_websocket_is_told_to_come_back_and_a_stream_ends(service: Service) -> None:
    with websocket(service) as connection, stream(service) as events:
        start = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(DEADLINE_SECONDS)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert time.monotonic() - start > 2  # not before the drain is over
        with pytest.raises(httpx.RemoteProtocolError):
            list(events)
        assert time.monotonic() - start > 3
        assert service.process.wait(DEADLINE_SECONDS) == 0
    assert "Application shutdown complete." in messages(service)


def test_work_in_the_background_is_waited_for(service: Service) -> None:
    service.get("/background-task?seconds=4")
    service.get(
        "/background?seconds=7"
    )  # goes on when the other, which the server itself waits for, is done
    assert service.stop() == 0
    said = messages(service)
    assert {"background done", "task done", "1 tasks finished, 0 cancelled"} <= set(said)
    assert said.index("Application shutdown complete.") > said.index("background done")


def test_what_is_left_when_the_time_is_over_is_cancelled(database_url: str, redis: Redis) -> None:
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url, "GRACEFUL_TIMEOUT_SECONDS": "6"}
    with serving("tests.fault_routes:app", **DRAIN | urls) as service:
        service.wait()
        service.get("/background?seconds=60")
        service.get("/background-task?seconds=60")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            slow = pool.submit(service.get, "/slow?seconds=60")
            eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
            assert service.stop() == 0
        assert (slow.result().status_code, slow.result().json()["detail"]) == (
            503,
            "The service is shutting down.",
        )
        said = messages(service)
        assert {"0 tasks finished, 1 cancelled", "Application shutdown complete."} <= set(said)
        assert "Cancel 2 running task(s), timeout graceful shutdown exceeded" in said
        assert not {"background done", "task done"} & set(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("draining", [False, True], ids=["serving", "draining"])
def test_a_quick_end_cuts_everything_off(service: Service, number: int, draining: bool) -> None:
    with websocket(service), stream(service), concurrent.futures.ThreadPoolExecutor() as pool:
        service.get("/background?seconds=60")
        slow = pool.submit(service.get, "/slow?seconds=60")
        eventually(lambda: "http_server_active_requests 2.0" in service.metrics())
        if draining:
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        start = time.monotonic()
        assert service.stop(number) == 0
        assert time.monotonic() - start < 10  # 2 where the machine has time; 47 if it waited
        with contextlib.suppress(httpx.TransportError):
            assert slow.result().status_code == 503
    assert "Application shutdown complete." in messages(service)


def test_an_end_may_become_a_quick_one_at_any_time(service: Service) -> None:
    service.get("/background?seconds=60")
    service.process.send_signal(signal.SIGTERM)
    eventually(lambda: "waiting for 1 background tasks" in service.text)
    assert service.stop(signal.SIGINT) == 0
    assert {"0 tasks finished, 1 cancelled", "Application shutdown complete."} <= set(
        messages(service)
    )


def test_a_connection_in_the_kernels_queue_is_served(service: Service) -> None:
    """While the worker is stopped, the kernel accepts for it; the end must not reset what is in its queue."""
    (worker,) = {
        line["pid"]
        for line in service.lines
        if line["message"].startswith("Started server process")
    }
    process = psutil.Process(worker)
    process.suspend()
    clients = [
        socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS)
        for _ in range(20)
    ]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    service.process.send_signal(signal.SIGQUIT)
    time.sleep(0.3)
    process.resume()
    for client in clients:
        with client:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    assert service.process.wait(DEADLINE_SECONDS) == 0


def test_a_worker_that_is_stuck_leaves_its_stack(database_url: str, redis: Redis) -> None:
    settings = DRAIN | {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis.url,
        "WORKER_TIMEOUT_SECONDS": "4",
    }
    with serving("tests.fault_routes:app", **settings) as service:
        service.wait()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            pool.submit(
                lambda: (
                    contextlib.suppress(httpx.TransportError).__enter__() or service.get("/stuck")
                )
            )
            eventually(lambda: "was stuck, or has crashed" in service.text)
        service.wait()
        (line,) = [line for line in service.lines if line["logger"] == "app.worker"]
        assert "fault_routes.py" in line["stacks"]
        assert "in stuck" in line["stacks"]


def test_the_last_worker_that_is_recycled_is_replaced_before_it_ends(
    database_url: str, redis: Redis
) -> None:
    recycling = {"MAX_REQUESTS": "50", "MAX_REQUESTS_JITTER": "0", "RETIRE_SECONDS": "9"}
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    with serving(**DRAIN | recycling | urls) as service:
        service.wait()
        with socket.create_connection(
            ("127.0.0.1", service.port)
        ):  # keeps the worker for RETIRE_SECONDS
            longest, end = 0.0, time.monotonic() + 60
            while (
                service.text.count("Shutting down") < 3 and time.monotonic() < end
            ):  # its successors have none
                start = time.monotonic()
                assert service.get("/").status_code == 200
                longest = max(longest, time.monotonic() - start)
        said = messages(service)
        asked = next(
            place for place, text in enumerate(said) if text.endswith("asking for a successor")
        )
        after = said[asked:]
        assert after.index("Application startup complete.") < after.index("Shutting down")
        assert longest < 8  # and not the nine seconds of retirement
