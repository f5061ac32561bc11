"""Uploads: limits of routes, the space that they share, the example of docs/uploads.md."""

import base64
import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import psutil
import pytest

from scripts.dev_services import Redis
from tests.service_process import Service, eventually, serving
from tests.serving.raw_http import CLOSE, assert_rejected, connect, headers_of, read_all, send

MEGABYTE = 1 << 20
APP = "tests.upload_routes:app"
PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = {
    "WEB_CONCURRENCY": "1",
    "MAX_BODY_BYTES": "100000",
    "MAX_BUFFERED_BYTES": "5000000",
    "REQUEST_BODY_TIMEOUT_SECONDS": "1",
    "REQUEST_TIMEOUT_SECONDS": "2",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def service(database_url: str, redis: Redis, directory: Path) -> Iterator[Service]:
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    with serving(APP, **SETTINGS, **urls, FILES_DIRECTORY=str(directory)) as service:
        service.wait()
        yield service


def head(path: str, *fields: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def chunks(size: int) -> Iterator[bytes]:
    """Yield a body without a length."""
    for _ in range(size // 10_000):
        yield bytes(10_000)


# Limits of routes


@pytest.mark.parametrize("prefix", ["", "/mounted-uploads"], ids=["included", "mounted"])
def test_route_accepts_bodies_up_to_its_own_limit(service: Service, prefix: str) -> None:
    """docs/uploads.md: higher or lower than MAX_BODY_BYTES, with a length or without."""
    for path, size in (("kept", 3_000_000), ("small", 1000), ("streamed", 20_000_000)):
        url = f"{prefix}/uploads/{path}"
        assert service.http.post(url, content=bytes(size)).json() == size
    response = service.http.post(f"{prefix}/uploads/kept", content=chunks(2_000_000))
    assert response.json() == 2_000_000


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("/uploads/kept", 3_000_001),
        ("/uploads/small", 1001),
        ("/uploads/streamed", 50_000_001),
        ("/mounted-uploads/uploads/kept", 3_000_001),
        ("/length", 100_001),
        ("/nowhere", 100_001),
    ],
)
def test_declared_length_over_the_limit_is_rejected_unread(
    service: Service, path: str, size: int
) -> None:
    """RFC 9110, section 10.1.1: a final status in place of 100, without reading the body."""
    request = head(path, f"Content-Length: {size}", "Expect: 100-continue")
    response = send(service, request)
    assert_rejected(service, response, 413)
    assert b"connection: close" in headers_of(response)


@pytest.mark.parametrize(("path", "limit"), [("kept", 3_000_000), ("small", 1000)])
def test_chunked_body_over_the_limit_is_rejected(service: Service, path: str, limit: int) -> None:
    """RFC 9110, section 15.5.14: the server may close the connection."""
    request = head(f"/uploads/{path}", "Transfer-Encoding: chunked")
    size = limit + 1
    response = send(service, request + b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)))
    assert_rejected(service, response, 413)


def test_route_has_its_own_time_for_the_body(service: Service) -> None:
    """docs/uploads.md: `seconds` replaces REQUEST_BODY_TIMEOUT_SECONDS, also for the 504."""
    start = head("/uploads/kept", "Content-Length: 3", "Connection: close")
    assert send(service, start + b"a", b"bc", pause_seconds=2.2).startswith(b"HTTP/1.1 200")
    assert_rejected(service, send(service, start, b"a"), 408)
    short = head("/uploads/small", "Content-Length: 3", "Connection: close")
    assert_rejected(service, send(service, short, b"a"), 408)


# The space for bodies


def test_large_bodies_share_a_bounded_space(service: Service) -> None:
    """README, MAX_BUFFERED_BYTES: 503 with `Retry-After`; streamed and small bodies are served."""
    with connect(service) as first:
        first.sendall(
            head("/uploads/kept?wait_seconds=1", "Content-Length: 3000000") + bytes(2**20)
        )
        request = head("/uploads/kept", "Content-Length: 3000000", "Expect: 100-continue")

        def second() -> bytes:
            with connect(service) as connection:
                connection.sendall(request)
                return connection.recv(65536)

        eventually(lambda: second().startswith(b"HTTP/1.1 503"))
        response = second()
        assert b"retry-after: 1" in headers_of(response)
        chunked = service.http.post("/uploads/kept", content=chunks(2_500_000))
        assert chunked.status_code == 503
        assert service.http.post("/uploads/streamed", content=bytes(9_000_000)).status_code == 200
        assert service.http.post("/length", content=bytes(1000)).status_code == 200
        first.sendall(bytes(3_000_000 - 2**20))
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
    # Its space is free again; that of a client that leaves is, too.
    for _ in range(3):
        assert service.http.post("/uploads/kept", content=bytes(3_000_000)).status_code == 200
        with connect(service) as leaving:
            leaving.sendall(request)
            assert leaving.recv(65536).startswith(b"HTTP/1.1 100")
        eventually(lambda: second().startswith(b"HTTP/1.1 100"))


def test_streamed_body_uses_no_memory(service: Service) -> None:
    started = [line for line in service.lines if line["message"].startswith("Started server")]
    worker = psutil.Process(started[-1]["pid"])
    before = worker.memory_info().rss
    content = bytes(40_000_000)

    def upload() -> object:
        return service.http.post("/uploads/streamed", content=content).json()

    for _ in range(3):
        # On a busy machine it may take longer than REQUEST_BODY_TIMEOUT_SECONDS.
        eventually(lambda: upload() == len(content))
    assert worker.memory_info().rss - before < 20 * MEGABYTE


def test_route_over_the_space_ends_the_start(database_url: str, redis: Redis) -> None:
    """One line with the value and the remedy."""
    urls = {"DATABASE_URL": database_url, "REDIS_URL": redis.url}
    with serving(APP, **SETTINGS, **urls, OVERSIZED_ROUTE="1") as service:
        assert service.process.wait(60) != 0
        assert (
            "MAX_BUFFERED_BYTES=5000000: must be at least 20000000, the max_body of" in service.text
        )
        assert "Traceback" not in service.text


# The example


def put(service: Service, content: bytes, digest: str = "") -> httpx.Response:
    found = base64.b64encode(hashlib.sha256(content).digest()).decode()
    headers = {"Content-Digest": digest or f"sha-256=:{found}:"}
    return service.http.put(f"/files/{uuid4()}", content=content, headers=headers)


def test_example_stores_a_file_with_its_digest_and_type(service: Service, directory: Path) -> None:
    content = PNG + bytes(5_000_000)
    response = put(service, content)
    assert response.status_code == 201
    assert response.json() == {"bytes": len(content), "type": "image/png"}
    (stored,) = list(directory.iterdir())
    assert stored.read_bytes() == content
    stored.unlink()


def test_example_leaves_nothing_of_a_rejected_file(service: Service, directory: Path) -> None:
    assert put(service, PNG, digest="sha-256=:other:").status_code == 422
    assert put(service, b"MZ" + bytes(100)).status_code == 415
    assert put(service, b"").status_code == 415
    request = f"PUT /files/{uuid4()} HTTP/1.1\r\nHost: a\r\nContent-Digest: a\r\n"
    with connect(service) as leaving:
        leaving.sendall(request.encode() + b"Content-Length: 5000\r\n\r\n" + PNG)
        eventually(lambda: list(directory.iterdir()))
    with contextlib.suppress(OSError), connect(service) as connection:
        connection.sendall(request.encode() + CLOSE + b"Content-Length: 100000001\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413")
    time.sleep(0.1)
    eventually(lambda: not list(directory.iterdir()))
