"""What a team adds to the application, over a socket: it is inside of the request middleware."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scripts.dev_services import Redis
from tests.service_process import Service, eventually, serving

ORIGIN = "https://shop.example"


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    with serving(
        "tests.web.extended_app:app",
        DATABASE_URL=database_url,
        REDIS_URL=redis.url,
        WEB_CONCURRENCY="1",
        ACCESS_LOG_FLUSH_MS="0",
        CORS_ALLOW_ORIGINS=ORIGIN,
        MAX_BODY_BYTES="1000",
        MAX_HEADER_BYTES="4096",
        MAX_IN_FLIGHT="2",
        REQUEST_TIMEOUT_SECONDS="5",
    ) as service:
        service.wait()
        yield service


def access_line(service: Service, request_id: str) -> dict[str, Any]:
    """Return the access line of a request."""

    def found() -> list[dict[str, Any]]:
        lines = [each for each in service.lines if each["logger"] == "access"]
        return [each for each in lines if each["request_id"] == request_id]

    eventually(found)
    (line,) = found()
    return line


def assert_is_observed(service: Service, response: Any, route: str) -> None:
    """Check that a response has one ID, one access line, and a count."""
    (request_id,) = response.headers.get_list("x-request-id")
    line = access_line(service, request_id)
    assert (line["status"], line["route"]) == (response.status_code, route)
    labels = f'http_response_status_code="{response.status_code}",http_route="{route}"'
    eventually(lambda: labels in service.metrics())


def errors_of(service: Service, request_id: str) -> list[dict[str, Any]]:
    lines = [each for each in service.lines if each.get("request_id") == request_id]
    return [each for each in lines if each["level"] == "error"]


# Middleware and error handlers


def test_response_of_added_middleware_is_observed(service: Service) -> None:
    """Starlette's documentation, "Middleware": the one added last is the outermost."""
    response = service.get("/rejected-by-team")
    assert (response.status_code, response.text) == (418, "rejected")
    assert_is_observed(service, response, "unmatched")


def test_added_middleware_changes_responses(service: Service) -> None:
    response = service.get("/")
    assert response.headers["content-encoding"] == "gzip"
    assert response.headers["x-team"] == "a"
    assert_is_observed(service, response, "/")
    line = access_line(service, response.headers["x-request-id"])
    assert line["response_bytes"] == int(response.headers["content-length"])


@pytest.mark.parametrize("path", ["/bug", "/failed-by-team"])
def test_handler_of_exception_responds_and_the_bug_is_logged_once(
    service: Service, path: str
) -> None:
    """Starlette's documentation, "Exceptions": a handler of `Exception` or 500 handles bugs."""
    response = service.get(path)
    assert (response.status_code, response.json()) == (500, {"team": "RuntimeError"})
    assert_is_observed(service, response, path if path == "/bug" else "unmatched")
    (error,) = errors_of(service, response.headers["x-request-id"])
    assert "Traceback" in str(error)


def test_exit_in_a_task_of_added_middleware_is_a_bug_of_one_request(service: Service) -> None:
    """asyncio's documentation, "Task object": `SystemExit` in a task ends the event loop."""
    response = service.get("/exit")
    assert (response.status_code, response.json()["title"]) == (500, "Internal Server Error")
    assert_is_observed(service, response, "/exit")
    assert len(errors_of(service, response.headers["x-request-id"])) == 1
    assert service.messages.count("Application startup complete.") == 1


# CORS: the Fetch Standard, section 4.9, hides a response without these headers from a page


def assert_has_cors(response: Any, status: int) -> None:
    assert response.status_code == status
    assert response.headers.get_list("access-control-allow-origin") == [ORIGIN]
    assert "X-Request-ID" in response.headers["access-control-expose-headers"]
    assert "Origin" in response.headers["vary"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/nowhere", 404),
        ("/bug", 500),
        ("/exit", 500),
        ("/rejected-by-team", 418),
        ("/slow?seconds=20", 504),
    ],
)
def test_responses_have_cors_headers(service: Service, path: str, status: int) -> None:
    assert_has_cors(service.get(path, Origin=ORIGIN), status)
    other = service.get("/bug", Origin="https://other.example")
    assert "access-control-allow-origin" not in other.headers


def test_rejections_have_cors_headers(service: Service) -> None:
    headers = {"Origin": ORIGIN}
    assert_has_cors(service.http.post("/", content=bytes(2000), headers=headers), 413)
    assert_has_cors(service.get("/", Origin=ORIGIN, X_Long="a" * 5000), 431)


def test_shed_requests_have_cors_headers(service: Service) -> None:
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(service.get, "/slow?seconds=3.5") for _ in range(2)]
        eventually(lambda: "http_server_active_requests 2.0" in service.metrics())
        assert_has_cors(service.get("/", Origin=ORIGIN), 503)
    assert [each.result().status_code for each in slow] == [200, 200]


def test_preflight_is_observed(service: Service) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "PUT"}
    response = service.http.options("/", headers=headers)
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.status_code == 200
    assert_is_observed(service, response, "unmatched")


# Mounted applications


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/tenants/t1/items/7", "/tenants/{tenant}/items/{item}", 200),
        ("/tenants/t1/boxes/7", "/tenants/{tenant}/boxes/{box}", 200),
        ("/tenants/t1/nowhere", "/tenants/{tenant}", 404),
        ("/tenants/t1/static/test_limits.py", "/tenants/{tenant}/static", 200),
        ("/zipped/boxes/7", "/zipped/boxes/{box}", 200),
        ("/zipped/static/test_limits.py", "/zipped/static", 200),
        ("/static/test_limits.py", "/static", 200),
        ("/outer/inner/plain/7", "/outer/inner/plain/{name}", 200),
        ("/outer/inner/mounted/items/7", "/outer/inner/mounted/items/{item}", 200),
        ("/outer/inner/mounted/boxes/7", "/outer/inner/mounted/boxes/{box}", 200),
        ("/outer/inner/mounted/nowhere", "/outer/inner/mounted", 404),
        ("/a/x/plain/7", "/a/{b}/plain/{name}", 405),
        ("/a/x/nowhere", "/a/{b}", 404),
    ],
)
def test_route_of_a_mounted_application_has_its_prefix(
    service: Service, path: str, route: str, status: int
) -> None:
    """OpenTelemetry's conventions, `http.route`: the template, with the application's root."""
    response = service.get(path)
    assert response.status_code == status
    assert_is_observed(service, response, route)


def test_route_of_another_host_is_observed(service: Service) -> None:
    for path, route in (("/items/7", "/items/{item}"), ("/boxes/7", "/boxes/{box}")):
        response = service.get(path, Host="other.example")
        assert response.status_code == 200
        assert_is_observed(service, response, route)


@pytest.mark.parametrize("prefix", ["/tenants/t1", "/outer/inner/mounted", "/zipped"])
def test_mounted_health_is_no_probe(service: Service, prefix: str) -> None:
    response = service.get(f"{prefix}/health/live")
    assert response.status_code == 200
    line = access_line(service, response.headers["x-request-id"])
    assert line["route"].endswith("/health/live")


# 405 and details


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/static/test_limits.py", "GET, HEAD"),
        ("GET", "/a/x/plain/7", "POST"),
        ("PUT", "/undecided", "GET, HEAD, POST"),
        ("POST", "/undecided", "GET, HEAD"),
        ("PUT", "/read-only", "GET"),
        ("PUT", "/outer/inner/plain/7", "GET, HEAD"),
    ],
)
def test_405_has_allow(service: Service, method: str, path: str, allow: str) -> None:
    """RFC 9110, section 15.5.6: `Allow` lists the methods of the resource."""
    response = service.http.request(method, path)
    assert response.status_code == 405
    assert response.json()["title"] == "Method Not Allowed"
    assert response.headers.get_list("allow") == [allow]


def test_405_of_a_handler_keeps_its_detail_and_headers(service: Service) -> None:
    """FastAPI's documentation, "Handling Errors": an `HTTPException` has detail and headers."""
    response = service.http.put("/read-only")
    assert response.json()["detail"] == "Frozen until May."
    assert response.headers["retry-after"] == "9"


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("dict", {"details": {"code": "E7", "fields": ["a", 1, None], "5": {"b": True}}}),
        ("list", {"details": ["a", {"b": 1.5}]}),
        ("number", {"details": 7}),
        ("path", {"details": {"directory": "/a"}}),
        ("error", {"detail": "no such fruit"}),
        ("none", {}),
    ],
)
def test_detail_that_is_not_text_is_json(
    service: Service, kind: str, members: dict[str, object]
) -> None:
    """RFC 9457, sections 3.1.4 and 3.2: `detail` is text; other members extend the document."""
    response = service.get(f"/detail?kind={kind}")
    problem = response.json()
    del problem["request_id"]
    expected = {"type": "about:blank", "title": "Conflict", "status": 409}
    assert problem == expected | members
