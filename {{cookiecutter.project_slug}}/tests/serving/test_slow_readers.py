"""Responses that clients read slowly, or not at all.

nginx, `send_timeout`: the limit is for the time between two successive writes, not for the whole
response. It holds here too, with `KEEPALIVE_SECONDS`.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import psutil
import pytest

from scripts.dev_services import Redis
from tests.service_process import DEADLINE_SECONDS, Service, eventually, serving
from tests.serving.raw_http import CLOSE, access_line, connect

MEGABYTE = 1 << 20
SIZE = 20 * MEGABYTE
PATHS = ["/large?megabytes=20", "/large-stream?megabytes=20"]
LIMITS = {"WEB_CONCURRENCY": "1", "KEEPALIVE_SECONDS": "2", "HEADER_TIMEOUT_SECONDS": "1"}


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis) -> Iterator[Service]:
    app = "tests.fault_routes:app"
    with serving(app, DATABASE_URL=database_url, REDIS_URL=redis.url, **LIMITS) as service:
        service.wait()
        yield service


@contextlib.contextmanager
def download(service: Service, path: str, request_id: str) -> Iterator[socket.socket]:
    """Request a large response over a connection with a small receive buffer."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect(("127.0.0.1", service.port))
        line = f"GET {path} HTTP/1.1\r\nHost: a\r\nX-Request-ID: {request_id}\r\n".encode()
        connection.sendall(line + CLOSE + b"\r\n")
        yield connection


def is_connected(service: Service, address: object) -> bool:
    """Whether the service has an open connection with this address."""
    parent = psutil.Process(service.process.pid)
    workers = parent.children(recursive=True)
    connections = [each for worker in workers for each in worker.net_connections()]
    return address in {each.raddr for each in connections}


@pytest.mark.parametrize("path", PATHS, ids=["at once", "stream"])
def test_slow_reader_receives_the_whole_response(service: Service, path: str) -> None:
    """20 MB in three times `KEEPALIVE_SECONDS`."""
    request_id = f"slow-{len(path)}"
    size = 0
    start = time.monotonic()
    with download(service, path, request_id) as connection:
        while data := connection.recv(1 << 16):
            size += len(data)
            due = start + 6 * size / SIZE
            time.sleep(max(due - time.monotonic(), 0))
    assert time.monotonic() - start > 6
    assert size > SIZE
    assert access_line(service, request_id)["response_bytes"] == SIZE


@pytest.mark.parametrize("path", PATHS, ids=["at once", "stream"])
def test_unread_response_is_aborted_and_logged_as_cut(service: Service, path: str) -> None:
    request_id = f"unread-{len(path)}"
    with download(service, path, request_id) as connection:
        received = len(connection.recv(1000))
        address = connection.getsockname()
        eventually(lambda: not is_connected(service, address))
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                received += len(data)
    line = access_line(service, request_id)
    assert received < SIZE
    assert line["status"] == 200
    assert abs(line["response_bytes"] - received) < MEGABYTE


@pytest.mark.parametrize("path", PATHS, ids=["at once", "stream"])
def test_response_that_the_client_cuts_is_logged_as_cut(service: Service, path: str) -> None:
    """SO_LINGER with 0 seconds: closing resets the connection (socket(7))."""
    request_id = f"cut-{len(path)}"
    with download(service, path, request_id) as connection:
        received = 0
        while received < 2 * MEGABYTE:
            received += len(connection.recv(1 << 16))
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    line = access_line(service, request_id)
    # Linux buffers up to 4 MiB in the kernel (tcp_wmem).
    assert 2 * MEGABYTE <= line["response_bytes"] < 10 * MEGABYTE


def test_line_of_a_large_response_waits_for_its_delivery(service: Service) -> None:
    with download(service, PATHS[0], "waiting") as connection:
        connection.recv(1000)
        assert service.get("/", **{"X-Request-ID": "meanwhile"}).status_code == 200
        access_line(service, "meanwhile")
        assert "waiting" not in service.text
        while connection.recv(MEGABYTE):
            pass
    assert access_line(service, "waiting")["response_bytes"] == SIZE


def test_large_responses_over_one_connection_have_a_line_each(service: Service) -> None:
    request = b"GET /large?megabytes=1 HTTP/1.1\r\nHost: a\r\nX-Request-ID: pipelined-%d\r\n%b\r\n"
    with connect(service) as connection:
        connection.sendall(b"".join(request % (n, CLOSE * (n == 4)) for n in range(5)))
        size = 0
        while data := connection.recv(1 << 16):
            size += len(data)
    assert size > 5 * MEGABYTE
    for number in range(5):
        line = access_line(service, f"pipelined-{number}")
        assert line["response_bytes"] == MEGABYTE


def test_unread_response_before_invalid_input_is_aborted(service: Service) -> None:
    """The rejection of the input behind it waits for it."""
    with connect(service) as connection:
        connection.sendall(b"GET /large?megabytes=20 HTTP/1.1\r\nHost: a\r\n\r\nnonsense\r\n\r\n")
        connection.recv(1000)
        address = connection.getsockname()
        eventually(lambda: not is_connected(service, address))


def test_websocket_that_is_closed_and_not_read_is_aborted(service: Service) -> None:
    """RFC 6455, section 7.1.1: the server closes the connection, whatever the client does."""
    handshake = (
        b"GET /websocket/flood HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    )
    with connect(service) as connection:
        connection.sendall(handshake)
        connection.recv(1000)
        connection.sendall(b"\x88\x80\0\0\0\0")  # close
        address = connection.getsockname()
        eventually(lambda: not is_connected(service, address))
