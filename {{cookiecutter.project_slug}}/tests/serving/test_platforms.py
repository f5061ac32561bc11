"""Options of gunicorn that the service refuses, and addresses of IPv6."""

import socket

import pytest

from scripts.dev_services import free_port
from tests.service_process import serving
from tests.serving.test_processes import failed_start


@pytest.mark.parametrize(
    "options", ["--certfile=a.pem --keyfile=a.key", "--keyfile=a.key", "--certfile=a.pem"]
)
def test_tls_of_gunicorn_is_refused_with_one_line(options: str) -> None:
    """`certfile` and `keyfile`: "Settings" in the documentation of gunicorn."""
    line = failed_start(GUNICORN_CMD_ARGS=options)
    problem = "not supported: end TLS in the proxy or service mesh"
    assert line == f"configuration error: --certfile/--keyfile: {problem}\n"


def test_both_ip_versions_are_served_with_the_address_of_ipv6() -> None:
    """One socket accepts both unless `IPV6_V6ONLY` is set: RFC 3493, sections 3.7 and 5.3."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    port = free_port()
    metrics_port = free_port()
    addresses = {"BIND": f"[::]:{port}", "METRICS_BIND": f"[::]:{metrics_port}"}
    with serving(None, port, **addresses) as service:
        service.wait("/health/live")
        for host in ("127.0.0.1", "[::1]"):
            url = f"http://{host}:{port}/health/live"
            assert service.http.get(url).status_code == 200
            assert "dependency_up" in service.http.get(f"http://{host}:{metrics_port}/metrics").text
