"""Requests as bytes, for input that no client library sends."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

from tests.service_process import DEADLINE_SECONDS, Service, eventually

CLOSE = b"Connection: close\r\n"


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.port), timeout=DEADLINE_SECONDS)


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the service closes the connection."""
    response = b""
    while data := connection.recv(65536):
        response += data
    return response


def send(service: Service, *parts: bytes, pause_seconds: float = 0.0) -> bytes:
    """Send the parts of a request over a new connection; return everything until it is closed."""
    with connect(service) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_seconds)
        return read_all(connection)


@contextlib.contextmanager
def stalled_clients(port: int, number: int, data: bytes) -> Iterator[list[socket.socket]]:
    """Open connections to a port, send this over each, and read nothing."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(number):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.settimeout(DEADLINE_SECONDS)
            client.connect(("127.0.0.1", port))
            stack.enter_context(client)
            with contextlib.suppress(OSError):  # closed already
                client.sendall(data)
            opened.append(client)
        yield opened


def headers_of(response: bytes) -> list[bytes]:
    """Return the status line and the headers of the first response, in lower case."""
    return response.partition(b"\r\n\r\n")[0].lower().split(b"\r\n")


def access_line(service: Service, request_id: str) -> dict[str, Any]:
    """Wait for the access line of a request; there must be exactly one."""

    def lines() -> list[dict[str, Any]]:
        own = [line for line in service.lines if line.get("request_id") == request_id]
        return [line for line in own if line["logger"] == "access"]

    eventually(lines)
    (line,) = lines()
    return line


def assert_rejected(service: Service, response: bytes, status: int) -> dict[str, Any]:
    """Check the response to a rejected request, and its metric; return its access line."""
    headers = headers_of(response)
    assert headers[0].startswith(b"http/1.1 %d" % status), response[:500]
    problem = json.loads(response.partition(b"\r\n\r\n")[2])
    assert problem["status"] == status
    assert f"x-request-id: {problem['request_id']}".encode() in headers
    line = access_line(service, problem["request_id"])
    assert line["status"] == status
    eventually(lambda: f'http_response_status_code="{status}"' in service.metrics())
    return line
