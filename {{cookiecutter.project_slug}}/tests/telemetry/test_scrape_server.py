"""The HTTP server of the metrics process: connections and threads are bounded."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from app.setting_types import HostPort
from app.telemetry import scrape_server
from app.telemetry.scrape_server import MAX_CONNECTIONS, ScrapeServer
from scripts.dev_services import free_port
from tests.service_process import DEADLINE_SECONDS, eventually

#: More than the buffers of two sockets, so that a client that does not read blocks its thread.
LARGE = bytes(20 << 20)
REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/bug":
        raise ValueError
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [LARGE if environ["PATH_INFO"] == "/" else b"small"]


@contextlib.contextmanager
def running() -> Iterator[ScrapeServer]:
    server = ScrapeServer(HostPort(f"127.0.0.1:{free_port()}"), application)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def clients(server: ScrapeServer, number: int, data: bytes) -> Iterator[list[socket.socket]]:
    """Open connections and send this over each."""
    address = ("127.0.0.1", server.server_port)
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(number):
            client = stack.enter_context(socket.create_connection(address, DEADLINE_SECONDS))
            with contextlib.suppress(OSError):  # closed already
                client.sendall(data)
            opened.append(client)
        yield opened


def read_all(client: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: client.recv(1 << 20), b""))
    return b""


@pytest.mark.parametrize("data", [b"", b"GET / HT", REQUEST], ids=["idle", "partial", "unread"])
def test_scraper_is_served_next_to_many_stalled_clients(data: bytes) -> None:
    before = threading.active_count()
    with running() as server:
        with clients(server, 3 * MAX_CONNECTIONS, data):
            with clients(server, 1, b"GET /small HTTP/1.1\r\nHost: a\r\n\r\n") as (scraper,):
                assert read_all(scraper).endswith(b"small")
            eventually(lambda: threading.active_count() <= before + MAX_CONNECTIONS + 2)
        eventually(lambda: not server.idle and not server.active)


def test_idle_clients_do_not_close_a_scrape() -> None:
    with running() as server, clients(server, 1, REQUEST) as (scraper,):
        eventually(lambda: len(server.active) == 1)
        with clients(server, 3 * MAX_CONNECTIONS, b""):
            assert read_all(scraper).endswith(LARGE)


@pytest.mark.parametrize("data", [b"", REQUEST], ids=["idle", "unread"])
def test_connection_is_closed_at_its_time_limit(
    monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(scrape_server, "CONNECTION_SECONDS", 0.5)
    with running() as server, clients(server, 1, data):
        eventually(lambda: server.idle or server.active)
        eventually(lambda: not server.idle and not server.active)


def test_lost_client_is_not_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with running() as server:
        for _ in range(5):
            with clients(server, 1, REQUEST):
                time.sleep(0.05)
        eventually(lambda: not server.idle and not server.active)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == []
    assert capfd.readouterr().err == ""


def test_request_without_a_version_gets_no_response(caplog: pytest.LogCaptureFixture) -> None:
    """HTTP/0.9 (RFC 9110, appendix B.1, obsoletes it), or a request that was cut off."""
    with running() as server, clients(server, 1, b"GET /small\r\n\r\n") as opened:
        assert read_all(opened[0]) == b""
    assert caplog.records == []
