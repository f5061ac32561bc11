"""WebSockets: a handshake has the limits, the line and the metric of every request."""

import json
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosed

from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving
from tests.serving.raw_http import access_line, assert_rejected, connect, headers_of, read_all, send

LIMITS = {
    "WEB_CONCURRENCY": "1",
    "MAX_HEADER_BYTES": "32768",
    "HEADER_TIMEOUT_SECONDS": "2",
    "REQUEST_TIMEOUT_SECONDS": "2",
    "KEEPALIVE_SECONDS": "2",
}
#: The key is the one of RFC 6455, section 1.3.
FIELDS = (
    b"Host: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
ECHO = b"GET /echo HTTP/1.1\r\n" + FIELDS
#: A text frame with `hello`, masked with zeros (RFC 6455, section 5.2).
HELLO = b"\x81\x85\0\0\0\0hello"


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    app = "tests.fault_routes:app"
    with serving(app, DATABASE_URL=database_url, REDIS_URL=redis.url, **LIMITS) as service:
        service.wait()
        yield service


def echo(service: Service, request: bytes) -> bytes:
    """Send a handshake, then a message; return the response up to the echo."""
    with connect(service) as connection:
        connection.sendall(request)
        response = b""
        while b"\r\n\r\n" not in response:
            response += connection.recv(1)
        connection.sendall(HELLO)
        while not response.endswith(b"hello"):
            response += connection.recv(1)
        return response


# Accepted


def test_handshake_has_an_access_line_and_a_metric(service: Service) -> None:
    """RFC 6455, section 4.2.2: an accepted handshake is a response with status 101."""
    response = echo(service, ECHO + b"X-Request-ID: accepted\r\n\r\n")
    headers = headers_of(response)
    assert headers[0] == b"http/1.1 101 switching protocols"
    assert b"sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=" in headers
    assert headers.count(b"x-request-id: accepted") == 1
    assert sum(header.startswith(b"date:") for header in headers) == 1
    line = access_line(service, "accepted")
    assert (line["status"], line["path"], line["route"]) == (101, "/echo", "/echo")
    labels = 'http_request_method="GET",http_response_status_code="101",http_route="/echo"'
    eventually(lambda: labels in service.metrics())


@pytest.mark.parametrize(
    "fields",
    [
        b"Cookie: " + b"a" * 9000 + b"\r\n",
        b"".join(b"X-%d: a\r\n" % number for number in range(200)),
        b"Content-Length: 0\r\n",
        b"Connection: keep-alive\r\n",
        b"Upgrade: h2c\r\n",
        b"X-Own: \xe4\r\n",
    ],
    ids=[
        "cookie of 9 kB",
        "200 fields",
        "empty body",
        "two connections",
        "alternatives",
        "latin-1",
    ],
)
def test_handshake_within_the_limits_is_accepted(service: Service, fields: bytes) -> None:
    """The limit is `MAX_HEADER_BYTES`, as for each request, and no limit of a library."""
    assert echo(service, ECHO + fields + b"\r\n").startswith(b"HTTP/1.1 101")


def test_handler_receives_all_headers(service: Service) -> None:
    """ASGI, WebSocket connection scope: `headers` are the original values, in bytes."""
    headers = {f"X-{number}": "a" for number in range(150)} | {
        "Cookie": "a" * 9000,
        "X-Own": "\xe4",
    }
    with service.websocket("/websocket/headers?a=b", **headers) as websocket:
        number, size, query, own = json.loads(websocket.recv(DEADLINE_SECONDS))
        assert websocket.response is not None
        assert websocket.response.headers["x-own"] == "1"
    assert number > 150
    assert size > 9150
    assert query == "a=b"
    assert own.encode("latin-1") == "\xe4".encode()


def test_first_message_may_arrive_with_the_handshake(service: Service) -> None:
    with connect(service) as connection:
        connection.sendall(ECHO + b"\r\n" + HELLO)
        response = b""
        while not response.endswith(b"hello"):
            response += connection.recv(1)
    assert response.startswith(b"HTTP/1.1 101")


def test_handshake_may_follow_a_request(service: Service) -> None:
    with connect(service) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(ECHO + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 101")


# Rejected


def test_oversized_handshake_is_rejected_with_431(service: Service) -> None:
    """RFC 6585, section 5."""
    cookies = (b"Cookie: " + b"a" * 9000 + b"\r\n") * 4
    assert_rejected(service, send(service, ECHO + cookies + b"\r\n"), 431)


def test_slow_handshake_is_rejected_with_408(service: Service) -> None:
    """RFC 9110, section 15.5.9."""
    assert_rejected(service, send(service, ECHO), 408)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /echo HTTP/1.1\r\n" + FIELDS + b"\r\n",
        b"POST /echo HTTP/1.1\r\n" + FIELDS + b"Content-Length: 3\r\n\r\nabc",
        ECHO + b"Content-Length: 3\r\n\r\nabc",
        ECHO + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ECHO.replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"short") + b"\r\n",
        ECHO.replace(b"Sec-WebSocket-Key", b"X-Key") + b"\r\n",
        ECHO.replace(b"Sec-WebSocket-Version", b"X-Version") + b"\r\n",
        ECHO + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    ],
    ids=["POST", "POST with a body", "length", "chunked", "key", "no key", "no version", "2 keys"],
)
def test_invalid_handshake_is_rejected_with_400(service: Service, request_bytes: bytes) -> None:
    """RFC 6455, section 4.2.1: a GET without a body, one key of 16 bytes, one version."""
    response = send(service, request_bytes)
    assert_rejected(service, response, 400)
    assert b"connection: close" in headers_of(response)
    assert response.count(b"HTTP/1.1") == 1


def test_other_version_is_rejected_with_426(service: Service) -> None:
    """RFC 6455, section 4.4; RFC 9110, section 15.5.22."""
    response = send(service, ECHO.replace(b"Version: 13", b"Version: 12") + b"\r\n")
    line = assert_rejected(service, response, 426)
    assert line["path"] == "/echo"
    headers = headers_of(response)
    assert b"sec-websocket-version: 13" in headers
    assert b"upgrade: websocket" in headers
    assert b"connection: upgrade, close" in headers


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (b"/websocket/denied", 403),
        (b"/nowhere", 403),
        (b"/websocket/forbidden", 401),
        (b"/websocket/broken", 500),
        (b"/websocket/late", 504),
    ],
)
def test_rejected_handshake_is_a_problem(service: Service, path: bytes, status: int) -> None:
    """ASGI, WebSocket: a close before the connection is accepted is a 403.

    The extension `websocket.http.response` is the body of other rejections.
    """
    response = send(service, b"GET " + path + b" HTTP/1.1\r\n" + FIELDS + b"\r\n")
    assert_rejected(service, response, status)
    assert b"content-type: application/problem+json" in headers_of(response)


def test_handshakes_over_the_limit_of_concurrency_are_rejected(
    database_url: str, redis: Redis
) -> None:
    """README, MAX_IN_FLIGHT: 503 with `Retry-After`."""
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    limits = LIMITS | {"MAX_IN_FLIGHT": "1"}
    with serving("tests.fault_routes:app", **urls, **limits) as service:
        service.wait()
        with connect(service) as waiting:
            waiting.sendall(b"GET /websocket/late HTTP/1.1\r\n" + FIELDS + b"\r\n")
            eventually(lambda: b" 503 " in send_and_read_line(service))
        eventually(lambda: b" 101 " in send_and_read_line(service))


def test_open_websockets_over_the_limit_are_rejected(database_url: str, redis: Redis) -> None:
    """README, MAX_STREAMS: then 503, and none is in flight. A closed one makes room."""
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    limits = LIMITS | {"MAX_IN_FLIGHT": "1", "MAX_STREAMS": "1"}
    with serving("tests.fault_routes:app", **urls, **limits) as service:
        service.wait()
        with service.websocket("/echo"):
            eventually(lambda: b" 503 " in send_and_read_line(service))
            assert service.get("/").status_code == 200
        eventually(lambda: b" 101 " in send_and_read_line(service))


def send_and_read_line(service: Service) -> bytes:
    with connect(service) as connection:
        connection.sendall(ECHO + b"\r\n")
        return connection.recv(65536).partition(b"\r\n")[0]


# Open


def test_bug_of_a_handler_closes_with_1011(service: Service) -> None:
    """RFC 6455, section 7.4.1: the server has met an unexpected condition."""
    with service.websocket("/websocket/bug", **{"X-Request-ID": "bug"}) as websocket:
        websocket.send("hello")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(DEADLINE_SECONDS)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    eventually(lambda: [line for line in service.lines if "exception" in line])
    (line,) = [
        line for line in service.lines if line.get("request_id") == "bug" and "exception" in line
    ]
    assert line["level"] == "error"
    assert access_line(service, "bug")["status"] == 101


def test_disconnection_is_not_an_error(service: Service) -> None:
    """Starlette, WebSockets: receiving raises `WebSocketDisconnect`."""
    with service.websocket("/websocket/careless", **{"X-Request-ID": "careless"}) as websocket:
        websocket.send("hello")
    assert access_line(service, "careless")["status"] == 101
    response = echo(service, ECHO + b"X-Request-ID: later\r\n\r\n")
    assert response.endswith(b"hello")
    lines = [line for line in service.lines if line.get("request_id") == "careless"]
    assert [line["logger"] for line in lines] == ["access"]


def test_invalid_frame_closes_the_connection(service: Service) -> None:
    """RFC 6455, section 5.1: a frame without a mask; 1002 is a protocol error."""
    with connect(service) as connection:
        connection.sendall(ECHO + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 101")
        connection.sendall(b"\x81\x05hello")
        assert b"\x03\xea" in read_all(connection)


def test_invalid_frame_before_the_response_closes_the_connection(service: Service) -> None:
    """RFC 6455, section 4.1: a client waits for the response before it sends data."""
    with connect(service) as connection:
        connection.sendall(b"GET /websocket/late HTTP/1.1\r\n" + FIELDS + b"\r\n\x81\x05hello")
        assert read_all(connection) == b""


def test_query_of_a_handshake_is_not_logged(service: Service) -> None:
    echo(
        service,
        b"GET /echo?token=secret-token HTTP/1.1\r\nX-Request-ID: query\r\n" + FIELDS + b"\r\n",
    )
    access_line(service, "query")
    assert "secret-token" not in service.text
