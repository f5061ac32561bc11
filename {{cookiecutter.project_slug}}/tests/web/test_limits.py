"""Limits: a rejected request gets a problem, an access line, and a metric."""

import concurrent.futures
import contextlib
import json
import socket
import sys
import time
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from starlette.types import Message

from app.settings import Settings
from app.web.limits import DEBUGGERS, Limits, RejectedError
from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving

LIMITS = {
    "WEB_CONCURRENCY": "1",
    "MAX_HEADER_BYTES": "4096",
    "MAX_BODY_BYTES": "100000",
    "MAX_IN_FLIGHT": "4",
    # Far longer than the pauses of the tests.
    "HEADER_TIMEOUT_SECONDS": "3",
    "REQUEST_BODY_TIMEOUT_SECONDS": "2",
    "REQUEST_TIMEOUT_SECONDS": "4",
    "KEEPALIVE_SECONDS": "1",
}
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
#: A route that returns the size of the body.
POST = b"POST /length HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    """The service with low limits, and with slow and large routes."""
    app = "tests.fault_routes:app"
    with serving(app, DATABASE_URL=database_url, REDIS_URL=redis.url, **LIMITS) as service:
        service.wait()
        yield service


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS)


def send(service: Service, *parts: bytes, pause_seconds: float = 0.0) -> bytes:
    """Send the parts of a request over a new connection; return the whole response.

    The service has to close the connection.
    """
    with connect(service) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except OSError:  # the service has closed it
                break
            time.sleep(pause_seconds)
        response = b""
        while data := connection.recv(65536):
            response += data
        return response


def assert_rejected(service: Service, response: bytes, status: int) -> None:
    """Check the response to a rejected request, its access line, and its metric."""
    head, _, body = response.partition(b"\r\n\r\n")
    headers = head.lower().split(b"\r\n")
    assert headers[0].startswith(b"http/1.1 %d" % status), response[:500]
    assert b"connection: close" in headers
    problem = json.loads(body)
    request_id = problem["request_id"]
    assert problem["status"] == status
    assert f"x-request-id: {request_id}".encode() in headers
    eventually(lambda: request_id in service.text)
    access_lines = [line for line in service.lines if line.get("request_id") == request_id]
    assert [line["status"] for line in access_lines] == [status]
    eventually(lambda: f'http_response_status_code="{status}"' in service.metrics())


# Headers


@pytest.mark.parametrize("pieces", [1, 20], ids=["at once", "in pieces"])
def test_oversized_headers_are_rejected_with_431(service: Service, pieces: int) -> None:
    header = b"X-Long: " + b"a" * (6000 // pieces) + b"\r\n"
    parts = [GET, *[header] * pieces, b"\r\n"]
    if pieces == 1:
        parts = [b"".join(parts)]
    assert_rejected(service, send(service, *parts, pause_seconds=0.002), 431)


def test_body_does_not_count_as_headers(service: Service) -> None:
    body = b"a" * 50_000
    request = POST + CLOSE + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert send(service, request).endswith(b"50000")


def test_headers_after_a_large_body_are_counted_from_zero(service: Service) -> None:
    body = b"a" * 50_000
    first = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    second = [b"GET / HTTP/1.1\r\nHo", b"st: a\r\n" + CLOSE + b"\r\n"]
    response = send(service, first + second[0], second[1], pause_seconds=0.2)
    assert response.count(b"HTTP/1.1 200") == 2


def test_trailers_are_ignored(service: Service) -> None:
    trailers = (b"X-Trailer: " + b"a" * 60 + b"\r\n") * 20
    response = send(service, POST + CLOSE + CHUNKED + b"\r\n3\r\nabc\r\n0\r\n" + trailers + b"\r\n")
    assert response.startswith(b"HTTP/1.1 200")


def test_slow_headers_are_rejected_with_408(service: Service) -> None:
    assert_rejected(service, send(service, b"GET / HTTP/1.1\r\nHost:"), 408)


def test_idle_connections_are_closed(service: Service) -> None:
    """Before a request by `HEADER_TIMEOUT_SECONDS`, after one by `KEEPALIVE_SECONDS`."""
    assert send(service) == b""
    response = send(service, GET + b"\r\n")
    assert response.startswith(b"HTTP/1.1 200")


def test_invalid_http_is_rejected_with_400(service: Service) -> None:
    assert_rejected(service, send(service, b"\x16\x03\x01 this is TLS\r\n\r\n"), 400)


# Bodies


@pytest.mark.parametrize("chunked", [False, True])
def test_oversized_body_is_rejected_with_413(service: Service, chunked: bool) -> None:
    if chunked:
        length = CHUNKED
        part = b"4e20\r\n" + b"a" * 20_000 + b"\r\n"
    else:
        length = b"Content-Length: 200000\r\n"
        part = b"a" * 20_000
    head = POST + b"X-Request-ID: large-%d\r\n" % chunked + length + b"\r\n"
    response = send(service, head, *[part] * 10, pause_seconds=0.01)
    assert_rejected(service, response, 413)


def test_slow_body_is_rejected_with_408(service: Service) -> None:
    head = POST + b"X-Request-ID: slow-body\r\nContent-Length: 10\r\n\r\n"
    assert_rejected(service, send(service, head, b"a"), 408)


def test_invalid_chunk_is_rejected_with_400(service: Service) -> None:
    head = POST + b"X-Request-ID: broken\r\n" + CHUNKED + b"\r\n"
    response = send(service, head, b"nonsense\r\n", pause_seconds=0.1)
    assert_rejected(service, response, 400)


def test_expectation_gets_100_continue(service: Service) -> None:
    expectation = b"X-Request-ID: continue\r\nExpect: 100-continue\r\n"
    head = POST + expectation + CLOSE + b"Content-Length: 3\r\n\r\n"
    response = send(service, head, b"abc", pause_seconds=0.1)
    assert response.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


async def test_body_within_the_limits_is_unchanged() -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"c", "more_body": False},
        {"type": "http.disconnect"},
    ]
    remaining = messages.copy()

    async def receive() -> Message:
        return remaining.pop(0)

    exchange: Any = SimpleNamespace(scope={"type": "http", "path": "/", "state": {}})
    limited = Limits(Settings(max_body_bytes=3), []).limit_receive(exchange, receive, 0)
    assert [await limited() for _ in range(3)] == messages

    remaining = messages.copy()
    limited = Limits(Settings(max_body_bytes=2), []).limit_receive(exchange, receive, 0)
    await limited()
    with pytest.raises(RejectedError) as rejection:
        await limited()
    assert rejection.value.status_code == 413


# Timeouts and concurrency


@pytest.mark.parametrize("module", ["bdb", "pydevd"])
def test_debugger_is_detected_in_development_only(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bdb is the base of pdb, pydevd is that of VS Code and PyCharm. pytest loads bdb."""
    for name in DEBUGGERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    development = Limits(Settings(environment="development"), [])
    assert not development.is_debugged()
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    assert development.is_debugged()
    assert not Limits(Settings(), []).is_debugged()


@pytest.mark.parametrize("path", ["/slow?seconds=20", "/slow-thread?seconds=9"])
def test_slow_request_gets_504(service: Service, path: str) -> None:
    """The response does not wait for a thread, which cannot be cancelled."""
    start = time.monotonic()
    response = service.get(path)
    assert response.status_code == 504
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert time.monotonic() - start < 8
    assert service.get("/").status_code == 200


def test_started_stream_has_no_time_limit(service: Service) -> None:
    response = service.get("/events?seconds=5")
    assert response.text.count("data:") == 50


def test_excess_requests_are_shed_but_probes_are_not(service: Service) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as slow:
        for _ in range(4):
            slow.submit(service.get, "/slow?seconds=3.5")
        eventually(lambda: "http_server_active_requests 4.0" in service.metrics())
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            responses = list(pool.map(lambda _: service.get("/"), range(16)))
        assert service.get("/health/live").status_code == 200
    for response in responses:
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["detail"] == "The service is busy."
    eventually(lambda: service.get("/").status_code == 200)


def test_client_that_does_not_read_is_disconnected(service: Service) -> None:
    (worker,) = {
        line["pid"]
        for line in service.lines
        if line["message"].startswith("Started server process")
    }
    with connect(service) as connection:
        connection.sendall(b"GET /large?megabytes=20 HTTP/1.1\r\nHost: a\r\n\r\n")
        size_bytes = len(connection.recv(1))
        address = connection.getsockname()

        def is_disconnected() -> bool:
            peers = {each.raddr for each in psutil.Process(worker).net_connections()}
            return address not in peers

        eventually(is_disconnected)
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                size_bytes += len(data)
        assert size_bytes < 20 << 20


# Pipelining


def test_pipelined_requests_get_responses_in_order(service: Service) -> None:
    """The first takes the longest."""
    request = b"GET /slow?seconds=0.%d HTTP/1.1\r\nHost: a\r\nX-Request-ID: %d\r\n\r\n"
    response = send(service, b"".join(request % (3 - number, number) for number in range(3)))
    places = [response.index(b"x-request-id: %d" % number) for number in range(3)]
    assert places == sorted(places)


def test_pipelined_body_may_arrive_after_the_first_response(service: Service) -> None:
    first = b"GET /slow?seconds=0.5 HTTP/1.1\r\nHost: a\r\n\r\n"
    second = POST + CLOSE + b"Content-Length: 3\r\n\r\n"
    response = send(service, first + second, b"abc", pause_seconds=0.8)
    assert response.count(b"HTTP/1.1 200") == 2
    assert response.endswith(b"3")


def test_invalid_pipelined_request_does_not_lose_the_first_response(service: Service) -> None:
    first = b"GET /slow?seconds=0.3 HTTP/1.1\r\nHost: a\r\n\r\n"
    response = send(service, first + b"nonsense\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 200")
    assert response.count(b"HTTP/1.1") == 1


def test_number_of_pipelined_requests_is_limited(service: Service) -> None:
    requests = b"GET /slow?seconds=0.1 HTTP/1.1\r\nHost: a\r\n\r\n" * 5000
    assert send(service, requests).count(b"HTTP/1.1 200") < 20


def test_response_to_head_has_no_body(service: Service) -> None:
    response = send(service, b"HEAD /docs HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\n")
    assert response.startswith(b"HTTP/1.1 404")
    assert response.endswith(b"\r\n\r\n")
