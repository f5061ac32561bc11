"""Addresses of clients and proxies, over each kind of socket; and a start without name servers."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from app.web.proxies import TrustedProxies
from scripts.dev_services import Redis, free_port
from tests.service_process import DEADLINE_SECONDS, PROJECT, Running, Service, eventually, serving

FAULT_ROUTES = "tests.fault_routes:app"
ONE_WORKER = {"WEB_CONCURRENCY": "1"}
#: Records each question to a name server: https://docs.python.org/3/library/audit_events.html
RECORD_LOOKUPS = """
import ipaddress, os, sys
def hook(event, args):
    if event in ("socket.gethostbyaddr", "socket.gethostbyname", "socket.getaddrinfo"):
        if event == "socket.getaddrinfo" and args[0] is not None:
            try:
                ipaddress.ip_address(args[0])
                return
            except ValueError:
                pass
        with open(os.environ["LOOKUPS"], "a") as file:
            print(sys.argv, event, args, file=file)
sys.addaudithook(hook)
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gunicorn does not run on Windows")
#: The processes that must not ask a name server, and whether they serve requests.
COMMANDS = [("gunicorn", True), ("scripts.dev", True)]
COMMANDS += [("app.payments.consumer", False)]  # example


@pytest.fixture(scope="module")
def urls(database_url: str, redis: Redis) -> dict[str, str]:
    return {"DATABASE_URL": database_url, "REDIS_URL": redis.url}


def logged_client(service: Running, request_id: str) -> str | None:
    """Return the client in the access line of a request."""
    eventually(lambda: f'"request_id":"{request_id}"' in service.text)
    lines = [line for line in service.lines if line.get("request_id") == request_id]
    client: str | None = lines[-1]["client"]
    return client


# IPv4 on a socket of IPv6: RFC 4291, section 2.5.5.2


@pytest.fixture(scope="module")
def dual_stack(urls: dict[str, str]) -> Iterator[Service]:
    """A service on all addresses of both families."""
    port = free_port()
    with serving(FAULT_ROUTES, port, BIND=f"[::]:{port}", **ONE_WORKER, **urls) as service:
        service.wait()
        yield service


def test_ipv4_client_of_an_ipv6_socket_has_its_ipv4_address(dual_stack: Service) -> None:
    dual_stack.get("/", **{"X-Request-ID": "plain"})
    assert logged_client(dual_stack, "plain") == "127.0.0.1"


def test_ipv4_proxy_is_trusted_on_an_ipv6_socket(dual_stack: Service) -> None:
    headers = {"X-Request-ID": "proxied", "X-Forwarded-For": "::ffff:192.0.2.7"}
    dual_stack.get("/", **headers)
    assert logged_client(dual_stack, "proxied") == "192.0.2.7"


def test_ipv6_client_keeps_its_address(dual_stack: Service) -> None:
    url = f"http://[::1]:{dual_stack.port}/"
    httpx.get(url, headers={"X-Request-ID": "ipv6"})
    assert logged_client(dual_stack, "ipv6") == "::1"
    httpx.get(url, headers={"X-Request-ID": "via", "X-Forwarded-For": "2001:db8::7"})
    assert logged_client(dual_stack, "via") == "2001:db8::7"


def test_websocket_works_on_an_ipv6_socket(dual_stack: Service) -> None:
    with connect(f"ws://127.0.0.1:{dual_stack.port}/echo") as connection:
        connection.send("hello")
        assert connection.recv(DEADLINE_SECONDS) == "hello"


@pytest.mark.parametrize(
    ("trusted", "host", "expected"),
    [
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "::ffff:7f00:1", False),
        ("127.0.0.1", "::ffff:7f00:1", True),
        ("127.0.0.1", "::1", False),
        ("127.0.0.1", None, True),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "nonsense:", False),
    ],
)
def test_mapped_address_is_trusted_as_ipv4(
    trusted: str, host: str | None, *, expected: bool
) -> None:
    assert (host in TrustedProxies(trusted)) is expected


# Unix sockets


class OnUnixSocket(Running):
    """gunicorn on a unix socket."""

    def __init__(self, path: Path, settings: dict[str, str]) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        metrics = {"METRICS_BIND": f"127.0.0.1:{free_port()}", "DRAIN_SECONDS": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--bind", f"unix:{path}"],
            cwd=PROJECT,
            env=os.environ | metrics | settings,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture
def unix_service(urls: dict[str, str], tmp_path: Path) -> Iterator[tuple[OnUnixSocket, Path]]:
    path = tmp_path / "socket"
    service = OnUnixSocket(path, ONE_WORKER | urls)
    try:
        eventually(lambda: "Application startup complete." in service.text)
        yield service, path
    finally:
        service.stop()
        service.output.close()


def test_proxy_on_a_unix_socket_is_trusted(unix_service: tuple[OnUnixSocket, Path]) -> None:
    """gunicorn's documentation, `forwarded_allow_ips`: without an address, always allowed."""
    service, path = unix_service
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://unix") as client:
        headers = {"X-Request-ID": "unix", "X-Forwarded-For": "192.0.2.7"}
        assert client.get("/", headers=headers).status_code == 200
        assert client.get("/", headers={"X-Request-ID": "direct"}).status_code == 200
    assert logged_client(service, "unix") == "192.0.2.7"
    assert logged_client(service, "direct") is None


# Name servers


@pytest.mark.parametrize(("command", "serves_requests"), COMMANDS)
def test_start_asks_no_name_server(
    urls: dict[str, str], tmp_path: Path, command: str, *, serves_requests: bool
) -> None:
    """Without one, each question takes tens of seconds: resolv.conf(5), `timeout`, `attempts`."""
    (tmp_path / "sitecustomize.py").write_text(RECORD_LOOKUPS)
    lookups = tmp_path / "lookups"
    port = free_port()
    metrics_port = free_port()
    settings = {
        "PYTHONPATH": str(tmp_path),
        "LOOKUPS": str(lookups),
        "ENVIRONMENT": "development",
        "BIND": f"127.0.0.1:{port}",
        "METRICS_BIND": f"0.0.0.0:{metrics_port}",
        "DRAIN_SECONDS": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", command],
        cwd=PROJECT,
        env=os.environ | ONE_WORKER | urls | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: responds(f"http://127.0.0.1:{metrics_port}/metrics"))
        if serves_requests:
            eventually(lambda: responds(f"http://127.0.0.1:{port}/health/live"))
    finally:
        process.terminate()
        process.wait(DEADLINE_SECONDS)
    assert not lookups.exists(), lookups.read_text()


def responds(url: str) -> bool:
    return httpx.get(url, timeout=DEADLINE_SECONDS).status_code == 200


def test_hook_records_questions_to_name_servers(tmp_path: Path) -> None:
    """So the test above can fail."""
    (tmp_path / "sitecustomize.py").write_text(RECORD_LOOKUPS)
    lookups = tmp_path / "lookups"
    environment = {"PYTHONPATH": str(tmp_path), "LOOKUPS": str(lookups)}
    command = [sys.executable, "-c", "import socket; socket.getfqdn('127.0.0.1')"]
    subprocess.run(command, env=os.environ | environment, check=True)
    assert "gethostbyaddr" in lookups.read_text()
