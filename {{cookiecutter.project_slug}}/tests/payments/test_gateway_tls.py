"""A gateway with TLS of a private authority."""

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fake_gateway import FakeGateway, run_gateway
from tests.payments.test_consumer import consuming, pay, run_module, status, wait_until_settled
from tests.service_process import Service, eventually

pytestmark = pytest.mark.process

NO_CONNECTION = 'http_client_request_duration_seconds_count{outcome="ConnectError"'


def create_certificate(directory: Path, name: str, *options: str) -> Path:
    """Create a certificate for one day, and its key; `options` are those of `openssl req`."""
    file = directory / f"{name}.pem"
    key = directory / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    names = ["-subj", f"/CN={name}", "-out", str(file), "-keyout", str(key)]
    subprocess.run([*command, *names, *options], check=True, capture_output=True)
    return file


def create_authority(directory: Path, name: str) -> Path:
    return create_certificate(directory, name, "-addext", "keyUsage=critical,keyCertSign")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two authorities, and a certificate that the first one signed."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    directory = tmp_path_factory.mktemp("certificates")
    authority = create_authority(directory, "authority")
    create_authority(directory, "stranger")
    signer = ["-CA", str(authority), "-CAkey", str(authority.with_suffix(".key"))]
    name = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"]
    create_certificate(directory, "gateway", *signer, *name)
    return directory


@pytest.fixture
def gateway(directory: Path) -> Iterator[FakeGateway]:
    """A gateway that accepts only TLS."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "gateway.pem", directory / "gateway.key")
    with run_gateway() as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.url = server.url.replace("http://", "https://")
        yield server


def test_gateway_of_a_private_authority_is_trusted(
    directory: Path, urls: dict[str, str], service: Service, gateway: FakeGateway
) -> None:
    """Certificates are verified as in RFC 5280, section 6, against the file's authorities."""
    payment_id = pay(service)
    file = str(directory / "authority.pem")
    with consuming(**urls, GATEWAY_CA_FILE=file, ENVIRONMENT="production"):
        wait_until_settled(service, payment_id)
    assert gateway.charges[payment_id] == 1


@pytest.mark.parametrize("authority", ["", "stranger.pem"])
def test_gateway_of_another_authority_charges_nothing(
    directory: Path, urls: dict[str, str], service: Service, gateway: FakeGateway, authority: str
) -> None:
    payment_id = pay(service)
    file = str(directory / authority) if authority else ""
    with consuming(**urls, GATEWAY_CA_FILE=file) as consumer:
        eventually(lambda: NO_CONNECTION in consumer.get("/metrics").text)
    assert status(service, payment_id) == "pending"
    assert gateway.charges[payment_id] == 0


@pytest.mark.parametrize("name", ["missing.pem", "gateway.key", "empty.pem", "."])
def test_file_without_certificates_stops_the_start_with_one_line(
    directory: Path, name: str
) -> None:
    (directory / "empty.pem").touch()
    file = str(directory / name)
    settings = {"ENVIRONMENT": "development", "GATEWAY_CA_FILE": file}
    done = run_module("app.payments.consumer", settings)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"configuration error: GATEWAY_CA_FILE={file[:80]}: must be a file of")
    assert done.stdout == b""
