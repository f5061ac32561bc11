"""What stands between the service and its servers: PgBouncer in transaction mode, and TLS."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from scripts.dev_services import Postgres, free_port
from tests.service_process import Service, eventually, serving

from load import get, load, post
from proxies import listens, program


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def running(port: int, *command: object) -> Iterator[None]:
    """Run a server that listens on a loopback port; PgBouncer refuses to run as root."""
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(map(str, command)), user=user, cwd="/", stdout=output, stderr=output
        )
        try:
            eventually(lambda: process.poll() is not None or listens(port))
            output.seek(0)
            assert process.poll() is None, output.read().decode()
            yield
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def pgbouncer(postgres: Postgres, folder: Path, **settings: object) -> Iterator[str]:
    """Run PgBouncer in transaction mode with 4 connections to Postgres; yield its URL."""
    url, port = urlsplit(postgres.url), free_port()
    (folder / "users").write_text(f'"{url.username}" "{url.password}"\n')
    chosen = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": folder / "users",
        "pool_mode": "transaction",
        "default_pool_size": 4,
        **settings,
    }
    lines = [f"{name} = {value}" for name, value in chosen.items()]
    file = folder / "pgbouncer.ini"
    file.write_text(
        "\n".join(
            [f"[databases]\npostgres = host=127.0.0.1 port={url.port}", "[pgbouncer]", *lines, ""]
        )
    )
    with running(port, program("pgbouncer"), file):
        yield f"postgresql://{url.username}:{url.password}@127.0.0.1:{port}/postgres"


@pytest.mark.parametrize(("cache_size", "fails"), [("0", False), ("100", True)])
def test_pgbouncer_in_transaction_mode_takes_one_setting(
    urls: dict[str, str], postgres: Postgres, folder: Path, cache_size: str, fails: bool
) -> None:
    with pgbouncer(postgres, folder) as url:
        through = {
            "DATABASE_URL": url,
            "DATABASE_MAX_CONNECTIONS": "40",
            "DATABASE_STATEMENT_CACHE_SIZE": cache_size,
        }
        patient = {"DATABASE_ACQUIRE_TIMEOUT_SECONDS": "10"}  # 40 clients wait for 4 connections
        with serving("dependency_routes:app", **urls | through | patient) as service:
            service.wait()
            new = {"amount": 1, "currency": "EUR", "reference": "pgbouncer"}
            writes, reads = (
                post("/payments", new, keeps_alive=False),
                get("/transaction", keeps_alive=False),
            )
            with load(service.port, 20 * [writes, reads]) as result:
                eventually(lambda: result.total >= 800, 60)
            print(result)
            assert bool(result.failures) == fails


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Return a certificate for 127.0.0.1, its key, and the certificate of the authority that signed it."""
    openssl, day = program("openssl"), ("-newkey", "rsa:2048", "-nodes", "-days", "1")
    authority, certificate = folder / "authority.pem", folder / "certificate.pem"
    extensions = "-addext", "keyUsage=critical,keyCertSign"
    signed = (
        "-CA",
        authority,
        "-CAkey",
        folder / "authority.key",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    )
    for name, options in (
        (authority, extensions),
        (certificate, (*signed, "-addext", "basicConstraints=CA:FALSE")),
    ):
        key = name.with_suffix(".key")
        command = [
            openssl,
            "req",
            "-x509",
            *day,
            "-subj",
            f"/CN={name.stem}",
            "-out",
            name,
            "-keyout",
            key,
            *options,
        ]
        subprocess.run(command, check=True, capture_output=True)
        key.chmod(0o644)
    return certificate, certificate.with_suffix(".key"), authority


@contextlib.contextmanager
def redis_with_tls(certificate: Path, key: Path) -> Iterator[str]:
    """Run a Redis that speaks TLS alone; yield its URL."""
    port = free_port()
    options = [
        "--port",
        0,
        "--tls-port",
        port,
        "--tls-auth-clients",
        "no",
        "--bind",
        "127.0.0.1",
        "--save",
        "",
    ]
    files = [
        "--tls-cert-file",
        certificate,
        "--tls-key-file",
        key,
        "--tls-ca-cert-file",
        certificate,
    ]
    with running(port, program("redis-server"), *options, *files):
        yield f"rediss://127.0.0.1:{port}/0"


def test_tls_is_verified(urls: dict[str, str], postgres: Postgres, folder: Path) -> None:
    certificate, key, authority = certificates(folder)
    (folder / "other").mkdir()
    *_, other = certificates(folder / "other")
    tls = {
        "client_tls_sslmode": "require",
        "client_tls_cert_file": certificate,
        "client_tls_key_file": key,
    }
    with (
        pgbouncer(postgres, folder, **tls) as database_url,
        redis_with_tls(certificate, key) as redis_url,
    ):

        def trusting(authority: Path) -> contextlib.AbstractContextManager[Service]:
            both = {
                "DATABASE_URL": f"{database_url}?sslmode=verify-full&sslrootcert={authority}",
                "DATABASE_STATEMENT_CACHE_SIZE": "0",
                "REDIS_URL": f"{redis_url}?ssl_ca_certs={authority}",
                "READINESS_REQUIRED": "postgres,redis",
            }
            return serving("dependency_routes:app", **urls | both)

        with trusting(authority) as service:
            service.wait("/health/ready", 200)
            assert (
                service.get("/transaction").status_code,
                service.get("/cached").status_code,
            ) == (200, 200)
        with trusting(other) as service:
            service.wait("/health/startup", 200)
            checks = service.get("/health/ready").json()["checks"]
            assert {name: check["status"] for name, check in checks.items()} == dict.fromkeys(
                checks, "unhealthy"
            )
            assert (
                service.get("/transaction").status_code,
                service.get("/cached").status_code,
            ) == (503, 503)
            assert service.stop() == 0
            assert "Traceback" not in service.text
            assert str(urlsplit(database_url).password) not in service.text
            reasons = {
                line["dependency"]: line["reason"] for line in service.lines if "dependency" in line
            }
            assert reasons.keys() == {"postgres", "redis"}
