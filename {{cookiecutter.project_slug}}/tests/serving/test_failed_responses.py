"""Requests that end in an unusual way: the client, the log and the metrics agree on the status."""

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from scripts.dev_services import Redis
from tests.service_process import Service, eventually, serving


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    with serving(
        "tests.fault_routes:app",
        DATABASE_URL=database_url,
        REDIS_URL=redis.url,
        WEB_CONCURRENCY="1",
        ACCESS_LOG_FLUSH_MS="0",
    ) as service:
        service.wait()
        yield service


def lines_of(service: Service, request_id: str) -> list[dict[str, Any]]:
    """Return the lines of a request, the access line last."""

    def is_logged() -> bool:
        return any(each["logger"] == "access" for each in of_request())

    def of_request() -> list[dict[str, Any]]:
        return [each for each in service.lines if each.get("request_id") == request_id]

    eventually(is_logged)
    return sorted(of_request(), key=lambda each: str(each["logger"] == "access"))


def count(service: Service, route: str, status: int) -> float:
    """Return how often a route has responded with a status."""
    text = f'http_request_method="GET",http_response_status_code="{status}",http_route="{route}"'
    for line in service.metrics().splitlines():
        if line.startswith("http_server_request_duration_seconds_count") and text in line:
            return float(line.split()[-1])
    return 0


def assert_is_one_bug(service: Service, path: str, route: str) -> None:
    """Check that a request gets one problem, and leaves one error, one access line, one count."""
    before = count(service, route, 500)
    response = service.get(path)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["title"] == "Internal Server Error"
    assert response.headers.get_list("x-request-id") == [problem["request_id"]]
    error, access = lines_of(service, problem["request_id"])
    assert (error["level"], error["message"]) == ("error", "unhandled exception")
    assert "Traceback" in str(error)
    assert (access["status"], access["route"]) == (500, route)
    assert access["response_bytes"] == len(response.content)
    eventually(lambda: count(service, route, 500) == before + 1)
    workers = {each["pid"] for each in service.lines if "Started server" in each["message"]}
    assert len(workers) == 1, "the worker was replaced"


@pytest.mark.parametrize(
    "kind", ["exit", "interrupt", "generator-exit", "cancelled", "cancel", "group"]
)
def test_base_exception_is_a_bug_of_one_request(service: Service, kind: str) -> None:
    """Python's documentation, "Exception hierarchy"; asyncio: a task re-raises `SystemExit`."""
    assert_is_one_bug(service, f"/raise?kind={kind}", "/raise")


def test_exit_of_a_thread_is_a_bug_of_one_request(service: Service) -> None:
    """FastAPI's documentation, "Concurrency": a `def` route runs in a thread."""
    assert_is_one_bug(service, "/raise-in-thread", "/raise-in-thread")


@pytest.mark.parametrize(
    "query",
    [
        "name=X-A&value=a%0D%0AX-B: b",
        "name=X-A&value=a%00",
        "name=X A&value=a",
        "name=X-A%0D%0A&value=a",
        "name=X-A&value=%E2%82%AC",
        "name=Content-Length&value=many",
        "name=Content-Length&value=3",
    ],
)
def test_invalid_response_header_is_a_bug(service: Service, query: str) -> None:
    """RFC 9110, sections 5.1, 5.5 and 8.6: the server rejects such headers."""
    assert_is_one_bug(service, f"/header?{query}", "/header")


@pytest.mark.parametrize("status", [600, 99])
def test_invalid_status_is_a_bug(service: Service, status: int) -> None:
    """RFC 9110, section 15: a status is from 100 to 599."""
    assert_is_one_bug(service, f"/status?status={status}", "/status")


@pytest.mark.parametrize("path", ["nothing", "body"])
def test_application_without_a_response_is_a_bug(service: Service, path: str) -> None:
    """The ASGI specification, "Response Start": it comes first."""
    assert_is_one_bug(service, f"/silent/{path}", "/silent")


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/broken-stream", "/broken-stream"),
        ("/exit-stream", "/exit-stream"),
        ("/silent/half", "/silent"),
        ("/silent/start", "/silent"),
        ("/header?name=Content-Length&value=5", "/header"),
    ],
)
def test_response_that_breaks_is_incomplete_and_logged_once(
    service: Service, path: str, route: str
) -> None:
    """RFC 9112, section 8: the client notices, and has seen the status 200."""
    before = count(service, route, 200)
    request_id = f"breaks-{path}".replace("?", "").replace("&", "")
    with pytest.raises(httpx.RemoteProtocolError):
        service.get(path, **{"X-Request-ID": request_id})
    error, access = lines_of(service, request_id)
    assert error["message"] == "unhandled exception"
    assert access["status"] == 200
    eventually(lambda: count(service, route, 200) == before + 1)
    assert service.get("/").status_code == 200


def test_connection_is_usable_after_a_withdrawn_response(service: Service) -> None:
    """RFC 9112, section 9.3: a connection persists, whatever the status."""
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}") as client:
        statuses = []
        for path in ("/header?name=X A&value=a", "/", "/raise?kind=exit", "/silent/nothing", "/"):
            response = client.get(path)
            statuses.append(response.status_code)
            assert "connection" not in response.headers
    assert statuses == [500, 200, 500, 500, 200]


@pytest.mark.parametrize("path", ["/slow?seconds=1", "/slow-thread?seconds=1"])
def test_response_after_its_client_has_left_is_499(service: Service, path: str) -> None:
    """nginx's documentation: 499 is a client that has closed before the response."""
    request_id = path.partition("?")[0].replace("/", "left-")
    request = f"GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-ID: {request_id}\r\n\r\n"
    address = ("127.0.0.1", service.port)
    with socket.create_connection(address) as connection:
        connection.sendall(request.encode())
        eventually(lambda: "http_server_active_requests 1.0" in service.metrics())
    (access,) = lines_of(service, request_id)
    assert access["status"] == 499
    eventually(lambda: count(service, access["route"], 499) == 1)
