"""Streams: server-sent events and WebSockets, beside requests that they must not disturb."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.connection import Connection

from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving
from tests.serving.raw_http import access_line, connect, read_all

RETIRE_SECONDS = 2
SETTINGS = {
    "WEB_CONCURRENCY": "1",
    "MAX_STREAMS": "400",
    "MAX_IN_FLIGHT": "10",
    "RETIRE_SECONDS": str(RETIRE_SECONDS),
    "KEEPALIVE_SECONDS": "3",
    "REQUEST_TIMEOUT_SECONDS": "2",
}
APP = "tests.stream_routes:app"


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


@pytest.fixture(scope="module")
def service(urls: dict[str, str]) -> Iterator[Service]:
    with serving(APP, **SETTINGS, **urls) as service:
        service.wait()
        yield service


def open_websocket(service: Service, path: str, request_id: str = "websocket") -> Connection:
    return service.websocket(path, **{"X-Request-ID": request_id})


@contextlib.contextmanager
def stream(service: Service, path: str, request_id: str = "stream") -> Iterator[socket.socket]:
    """Request a stream; its headers have been received."""
    with connect(service) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-ID: {request_id}\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = connection.recv(4096)
        assert part, data
        data += part
    return data


def open_streams(service: Service, kind: str, number: int) -> bool:
    labels = f'kind="{kind}"'
    return "http_server_active_streams{" + labels + "} " + f"{number}.0" in service.metrics()


def worker_of(service: Service) -> psutil.Process:
    """Return the newest worker."""
    started = [line for line in service.lines if line["message"].startswith("Started server")]
    return psutil.Process(started[-1]["pid"])


# Server-sent events


def test_events_go_on_after_the_last_one_received(service: Service) -> None:
    """HTML, section 9.2: `retry` is the reconnection time, `Last-Event-ID` the last `id`."""
    headers = {"Last-Event-ID": "7"}
    url = f"http://127.0.0.1:{service.port}/numbers"
    with httpx.stream("GET", url, headers=headers, timeout=DEADLINE_SECONDS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        text = ""
        for part in response.iter_text():
            text += part
            if "id: 8\n" in text:
                break
    retry = int(text.partition("retry: ")[2].partition("\n")[0])
    assert 1000 <= retry <= 5000
    assert 'data: "8"\nid: 8\n\n' in text


def test_events_end_when_the_client_disconnects(service: Service) -> None:
    """README, Streams: the access line has the duration and the bytes."""
    before = service.messages.count("events ended")
    with stream(service, "/numbers", "leaving") as connection:
        read_until(connection, b"id: 1\n")
        time.sleep(0.1)
    eventually(lambda: service.messages.count("events ended") == before + 1)
    line = access_line(service, "leaving")
    assert line["status"] == 200
    assert line["duration_ms"] > 100
    assert line["response_bytes"] > 20
    eventually(lambda: open_streams(service, "stream", 0))
    labels = 'http_server_stream_duration_seconds_count{http_route="/numbers",kind="stream"}'
    assert labels in service.metrics()


def test_duration_of_a_streams_request_is_that_to_its_start(service: Service) -> None:
    """README, Metrics: a stream of an hour is no slow request."""
    with stream(service, "/silent-events", "slow-stream"):
        time.sleep(1)
    access_line(service, "slow-stream")
    prefix = "http_server_request_duration_seconds_sum"

    def sums() -> list[float]:
        lines = [line for line in service.metrics().splitlines() if line.startswith(prefix)]
        return [float(line.split()[-1]) for line in lines if "/silent-events" in line]

    eventually(sums)
    assert sum(sums()) < 1


def test_stream_that_fails_ends_and_is_logged_once(service: Service) -> None:
    """HTML, section 9.2: a client reconnects when the connection ends."""
    with stream(service, "/failing-events", "failing") as connection:
        read_until(connection, b'data: "first"')
        access_line(service, "failing")
    lines = [line for line in service.lines if line.get("request_id") == "failing"]
    assert sorted(line["logger"] for line in lines) == ["access", "app.observe"]
    eventually(lambda: open_streams(service, "stream", 0))


def test_head_of_a_stream_has_no_body_and_ends(service: Service) -> None:
    """RFC 9110, section 9.3.2."""
    response = service.http.head("/numbers")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    eventually(lambda: "http_server_active_requests 0.0" in service.metrics())
    assert service.http.options("/numbers").status_code == 405


def test_client_that_does_not_read_its_events_is_disconnected(service: Service) -> None:
    """KEEPALIVE_SECONDS. The events are in the kernel's buffers: the same as a vanished client."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect(("127.0.0.1", service.port))
        path = b"/numbers?seconds=0.05&size=2000"
        request = b"GET %b HTTP/1.1\r\nHost: a\r\nX-Request-ID: unread\r\n\r\n" % path
        connection.sendall(request)
        access_line(service, "unread")
    eventually(lambda: open_streams(service, "stream", 0))


def test_asgi_stream_that_does_not_receive_ends_with_its_client(service: Service) -> None:
    """ASGI, "Disconnected Client": the server may raise an error in `send`."""
    with stream(service, "/endless/", "endless") as connection:
        read_until(connection, b"more")
    eventually(lambda: "endless ended" in service.messages)
    access_line(service, "endless")
    eventually(lambda: open_streams(service, "stream", 0))
    assert "exception" not in str([each for each in service.lines if "endless" in str(each)])


# WebSockets


def test_websocket_has_an_access_line_when_it_ends(service: Service) -> None:
    """RFC 6455, section 7.1.5: the code is that of the first close frame."""
    with open_websocket(service, "/echo", "echo") as websocket:
        websocket.send("hello ä")
        assert websocket.recv(DEADLINE_SECONDS) == "hello ä"
        eventually(lambda: open_streams(service, "websocket", 1))
        time.sleep(0.1)
        websocket.close(4001)
    line = access_line(service, "echo")
    assert (line["status"], line["close_code"]) == (101, 4001)
    assert (line["request_bytes"], line["response_bytes"]) == (8, 8)
    assert line["duration_ms"] > 100
    eventually(lambda: open_streams(service, "websocket", 0))
    labels = 'http_server_stream_duration_seconds_count{http_route="/echo",kind="websocket"}'
    eventually(lambda: labels in service.metrics())


def test_websocket_is_closed_with_1000_after_its_handler(service: Service) -> None:
    """RFC 6455, section 7.4.1: the purpose of the connection is fulfilled."""
    with open_websocket(service, "/return", "return") as websocket:
        assert websocket.recv(DEADLINE_SECONDS) == "ä"
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(DEADLINE_SECONDS)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1000
    line = access_line(service, "return")
    assert (line["close_code"], line["response_bytes"]) == (1000, 2)


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "cut"])
def test_handler_that_only_sends_ends_with_its_client(service: Service, is_closed: bool) -> None:
    """README, Streams: it receives nothing, and so cannot learn of the disconnection."""
    before = service.messages.count("push ended")
    request_id = f"push-{is_closed}"
    websocket = open_websocket(service, "/push", request_id)
    assert websocket.recv(DEADLINE_SECONDS) == "hello"
    if is_closed:
        websocket.close()
    else:
        websocket.socket.shutdown(socket.SHUT_RDWR)
    start = time.monotonic()
    eventually(lambda: service.messages.count("push ended") == before + 1)
    assert time.monotonic() - start < 10
    line = access_line(service, request_id)
    assert line["close_code"] == (1000 if is_closed else 1006)
    lines = [line for line in service.lines if line.get("request_id") == request_id]
    assert {line["logger"] for line in lines} == {"access", "tests"}


def test_handler_may_finish_its_message_when_the_client_has_left(service: Service) -> None:
    """README, Streams: a message has REQUEST_TIMEOUT_SECONDS."""
    before = service.messages.count("worked")
    with open_websocket(service, "/work", "work") as websocket:
        websocket.send("1.5")
    eventually(lambda: service.messages.count("worked") == before + 1)
    with open_websocket(service, "/work", "overtime") as websocket:
        websocket.send("60")
    assert access_line(service, "overtime")["duration_ms"] > 1900
    assert service.messages.count("worked") == before + 1


# Together


def test_streams_leave_requests_alone_and_end_at_shutdown(urls: dict[str, str]) -> None:
    """README, Streams: each stream ends at once; the process ends in RETIRE_SECONDS + 2 s."""
    with serving(APP, **SETTINGS, **urls) as service, contextlib.ExitStack() as stack:
        service.wait()
        worker = worker_of(service)
        descriptors = worker.num_fds()
        websocket = stack.enter_context(open_websocket(service, "/push"))
        clients = [stack.enter_context(stream(service, "/numbers")) for _ in range(300)]
        for client in clients:
            read_until(client, b"id: 1\n")
        for _ in range(20):
            assert service.get("/").status_code == 200
        eventually(lambda: open_streams(service, "stream", 300))
        for client in clients[:100]:
            client.close()
        eventually(lambda: open_streams(service, "stream", 200))
        eventually(lambda: worker.num_fds() < descriptors + 210)
        start = time.monotonic()
        service.process.terminate()
        for client in clients[100:]:
            assert read_all(client).endswith(b"0\r\n\r\n")
        assert time.monotonic() - start < RETIRE_SECONDS
        websocket.recv(DEADLINE_SECONDS)
        with pytest.raises(ConnectionClosed):
            websocket.recv(DEADLINE_SECONDS)
        assert service.process.wait(DEADLINE_SECONDS) == 0
        assert time.monotonic() - start < RETIRE_SECONDS + 2
        assert service.messages.count("events ended") == 300
        assert "exception" not in service.text


def test_streams_over_the_limit_are_rejected(urls: dict[str, str]) -> None:
    """README, MAX_STREAMS; RFC 9110, section 15.6.4: 503 with `Retry-After`."""
    limits = {"MAX_STREAMS": "4", "MAX_IN_FLIGHT": "1"}
    with serving(APP, **SETTINGS | limits | urls) as service, contextlib.ExitStack() as stack:
        service.wait()
        stack.enter_context(open_websocket(service, "/push"))
        for _ in range(3):
            stack.enter_context(stream(service, "/silent-events"))
        for _ in range(50):
            response = service.get("/silent-events")
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            with pytest.raises(InvalidStatus) as rejected:
                open_websocket(service, "/push")
            assert rejected.value.response.status_code == 503
            assert rejected.value.response.headers["retry-after"] == "1"
            problem = json.loads(rejected.value.response.body)
            assert problem["detail"] == "The service has too many streams."
            assert service.get("/").status_code == 200
        assert not [line for line in service.lines if line["level"] == "error"]
        service.process.terminate()
        assert service.process.wait(DEADLINE_SECONDS) == 0


def test_streams_end_when_a_worker_is_recycled(urls: dict[str, str]) -> None:
    """README, MAX_REQUESTS: clients reconnect to the replacement."""
    recycling = {"MAX_REQUESTS": "20", "MAX_REQUESTS_JITTER": "0"}
    with serving(APP, **SETTINGS | recycling | urls) as service:
        service.wait()
        with stream(service, "/numbers") as events, open_websocket(service, "/push") as websocket:
            assert websocket.recv(DEADLINE_SECONDS) == "hello"
            for _ in range(25):
                service.get("/")
            read_until(events, b"0\r\n\r\n")
            with pytest.raises(ConnectionClosed) as closed:
                websocket.recv(DEADLINE_SECONDS)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1012
        with stream(service, "/numbers") as events:
            read_until(events, b"id: 1\n")
