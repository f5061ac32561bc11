"""Listening sockets that another process owns: they serve the next start, too.

systemd's documentation: sd_listen_fds(3), systemd.socket(5). The socket outlives each service.
"""

import concurrent.futures
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.dev_services import Redis, free_port
from tests.service_process import DEADLINE_SECONDS, PROJECT, Running, eventually

#: Starts gunicorn as systemd does: with sockets from SD_LISTEN_FDS_START on, which is 3.
SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_FDS"] = "1"
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "gunicorn"])
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs packet filters")


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


class Activated(Running):
    """gunicorn on a listening socket that this process keeps."""

    def __init__(self, listener: socket.socket, bind: str | None, settings: dict[str, str]) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        defaults = {
            "WEB_CONCURRENCY": "1",
            "DRAIN_SECONDS": "1",
            "RETIRE_SECONDS": "1",
            "METRICS_BIND": f"127.0.0.1:{free_port()}",
        }
        command = [sys.executable, "-c", SYSTEMD, str(listener.fileno())]
        if bind:
            command = [sys.executable, "-m", "gunicorn", "--bind", bind]
        self.process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=os.environ | defaults | settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
        )


@contextlib.contextmanager
def activated(
    listener: socket.socket, settings: dict[str, str], bind: str | None = None
) -> Iterator[Activated]:
    service = Activated(listener, bind, settings)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.stop()
        service.output.close()


def get(address: str | tuple[str, int]) -> int:
    """Return the status of a response over a new connection to a socket of either family."""
    path = address if isinstance(address, str) else None
    host = "unix" if path else f"127.0.0.1:{address[1]}"
    transport = httpx.HTTPTransport(uds=path)
    with httpx.Client(transport=transport, timeout=DEADLINE_SECONDS) as client:
        return client.get(f"http://{host}/health/live", headers={"Connection": "close"}).status_code


@pytest.mark.parametrize("by", ["LISTEN_FDS", "fd://"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
def test_next_service_on_an_inherited_socket_is_reachable(
    urls: dict[str, str], tmp_path: Path, by: str, family: socket.AddressFamily
) -> None:
    """Nobody closes the socket between two services, so a packet filter on it would stay."""
    path = str(tmp_path / "socket")
    listener = socket.socket(family)
    listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else path)
    listener.listen()
    bind = f"fd://{listener.fileno()}" if by == "fd://" else None
    with listener:
        address = listener.getsockname()
        for _ in range(2):
            with activated(listener, urls, bind) as service:
                assert get(address) == 200, service.text
                assert service.stop() == 0


def test_connections_between_two_services_are_served_by_the_next(urls: dict[str, str]) -> None:
    """A client that connects while no service runs waits in the queue of the socket."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        address = listener.getsockname()
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            with activated(listener, urls) as first:
                assert get(address) == 200
                first.process.terminate()
                eventually(lambda: "Shutting down" in first.text)
                responses = [pool.submit(get, address) for _ in range(20)]
                assert first.process.wait(DEADLINE_SECONDS) == 0
            with activated(listener, urls):
                assert {response.result() for response in responses} == {200}
