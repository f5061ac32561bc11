"""Upgrades to protocols other than WebSocket are ignored (RFC 9110, section 7.8)."""

from collections.abc import Iterator

import pytest

from scripts.dev_services import Redis
from tests.service_process import Service, serving
from tests.serving.raw_http import CLOSE, access_line, assert_rejected, connect, headers_of, send

#: As curl and Java's client send it (RFC 7540, section 3.2).
H2C = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
)
POST = b"POST /length HTTP/1.1\r\nHost: a\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-ID: last\r\n" + CLOSE + b"\r\n"


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    app = "tests.fault_routes:app"
    limits = {"WEB_CONCURRENCY": "1", "MAX_HEADER_BYTES": "4096", "MAX_BODY_BYTES": "100000"}
    with serving(app, DATABASE_URL=database_url, REDIS_URL=redis.url, **limits) as service:
        service.wait()
        yield service


@pytest.mark.parametrize("upgrade", [b"h2c", b"TLS/1.3", b"foo/2, bar", b"HTTP/2.0", b""])
@pytest.mark.parametrize("pieces", [1, 2, 400], ids=["whole", "body apart", "byte by byte"])
def test_other_upgrade_is_served_with_its_body(
    service: Service, upgrade: bytes, pieces: int
) -> None:
    headers = POST + H2C.replace(b"h2c", upgrade) + b"Content-Length: 5\r\n\r\n"
    whole = headers + b"hello" + LAST
    parts = {
        1: [whole],
        2: [headers, b"hello", LAST],
        400: [whole[index : index + 1] for index in range(len(whole))],
    }
    response = send(service, *parts[pieces], pause_seconds=0.1 if pieces == 2 else 0)
    assert response.count(b"HTTP/1.1 200") == 2
    assert b"\r\n\r\n5HTTP/1.1 200" in response  # the size of the body, then the next response


def test_chunked_body_of_an_upgrade_is_read(service: Service) -> None:
    headers = POST + H2C + b"Transfer-Encoding: chunked\r\n\r\n"
    response = send(service, headers + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n" + LAST)
    assert response.count(b"HTTP/1.1 200") == 2
    assert b"\r\n\r\n5HTTP/1.1 200" in response


def test_upgrade_with_expectation_is_continued(service: Service) -> None:
    """RFC 9110, section 7.8: a server that ignores `Upgrade` sends 100 as for any request."""
    headers = POST + H2C + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
    response = send(service, headers, b"hello" + LAST, pause_seconds=0.2)
    assert response.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert response.count(b"HTTP/1.1 200") == 2


def test_pipelined_upgrades_are_served_in_order(service: Service) -> None:
    upgrade = POST + H2C + b"Content-Length: %d\r\n\r\n%b"
    bodies = [b"a", b"bb", b"ccc"]
    response = send(service, b"".join(upgrade % (len(body), body) for body in bodies) + LAST)
    sizes = [part.rpartition(b"\r\n\r\n")[2] for part in response.split(b"HTTP/1.1 200 OK\r\n")]
    assert sizes[1:4] == [b"1", b"2", b"3"]
    assert response.count(b"HTTP/1.1 200") == 4


def test_pipelined_websocket_handshake_is_an_ordinary_request(service: Service) -> None:
    """It cannot overtake the response that is due."""
    first = b"GET /slow?seconds=0.3 HTTP/1.1\r\nHost: a\r\n\r\n"
    handshake = (
        b"GET /echo HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    response = send(service, first + handshake + LAST)
    assert response.startswith(b"HTTP/1.1 200")
    assert response.count(b"HTTP/1.1 404") == 1
    assert response.count(b"HTTP/1.1") == 3


def test_upgrade_of_http_1_0_is_ignored(service: Service) -> None:
    """RFC 9110, section 7.8: a server MUST ignore it, a WebSocket's too."""
    fields = b"Host: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\n"
    response = send(service, b"POST /length HTTP/1.0\r\n" + fields + b"hello")
    assert response.startswith(b"HTTP/1.1 200")
    assert response.endswith(b"\r\n\r\n5")


def test_upgrade_has_the_limits_of_a_request(service: Service) -> None:
    large = POST + H2C + b"Content-Length: 200000\r\n\r\n"
    assert_rejected(service, send(service, large), 413)
    cookie = b"Cookie: " + b"a" * 5000 + b"\r\n"
    assert_rejected(service, send(service, POST + H2C + cookie + b"\r\n"), 431)


def test_upgrade_has_one_access_line(service: Service) -> None:
    request = POST + H2C + CLOSE + b"X-Request-ID: upgrade\r\nContent-Length: 5\r\n\r\nhello"
    assert send(service, request).endswith(b"\r\n\r\n5")
    line = access_line(service, "upgrade")
    assert (line["method"], line["route"], line["status"]) == ("POST", "/length", 200)


def test_connect_is_rejected_with_501(service: Service) -> None:
    """RFC 9110, sections 9.3.6 and 15.6.2: it asks for a tunnel, not for a resource."""
    response = send(service, b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
    assert_rejected(service, response, 501)
    assert b"connection: close" in headers_of(response)


def test_connection_option_without_upgrade_is_ignored(service: Service) -> None:
    with connect(service) as connection:
        connection.sendall(POST + b"Connection: Upgrade\r\nContent-Length: 2\r\n\r\nab")
        assert connection.recv(65536).endswith(b"\r\n\r\n2")
