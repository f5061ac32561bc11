"""PgBouncer in transaction mode and TLS, between the service and its dependencies."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import asyncpg
import pytest
from scripts.dev_services import Postgres, free_port, is_listening
from tests.service_process import PROJECT, Service, eventually, serving

from load import get, load, post
from prerequisites import program

APP = "dependency_routes:app"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.contextmanager
def running(port: int, *command: object) -> Iterator[None]:
    """Run a server; the block begins when it listens on its port.

    It runs as an ordinary user: PgBouncer does not run as root.
    """
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            list(map(str, command)), user=user, cwd="/", stdout=output, stderr=output
        )
        try:
            eventually(lambda: process.poll() is not None or is_listening(port))
            output.seek(0)
            assert process.poll() is None, output.read().decode()
            yield
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def pgbouncer(postgres: Postgres, directory: Path, **settings: object) -> Iterator[str]:
    """Run PgBouncer in transaction mode with 4 connections to Postgres; yield its URL."""
    url = urlsplit(postgres.url)
    port = free_port()
    users = directory / "users"
    users.write_text(f'"{url.username}" "{url.password}"\n')
    chosen = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": users,
        "pool_mode": "transaction",
        "default_pool_size": 4,
        **settings,
    }
    lines = [
        "[databases]",
        f"* = host=127.0.0.1 port={url.port}",
        "[pgbouncer]",
        *(f"{name} = {value}" for name, value in chosen.items()),
        "",
    ]
    file = directory / "pgbouncer.ini"
    file.write_text("\n".join(lines))
    with running(port, program("pgbouncer"), file):
        yield f"postgresql://{url.username}:{url.password}@127.0.0.1:{port}/postgres"


@pytest.mark.parametrize(("cache_size", "fails"), [("0", False), ("100", True)])
def test_pgbouncer_requires_a_statement_cache_size_of_zero(
    urls: dict[str, str], postgres: Postgres, directory: Path, cache_size: str, fails: bool
) -> None:
    """PgBouncer needs no other setting.

    The longer acquire timeout is for 40 clients that share 4 connections.
    """
    settings = {
        "DATABASE_MAX_CONNECTIONS": "40",
        "DATABASE_STATEMENT_CACHE_SIZE": cache_size,
        "DATABASE_ACQUIRE_TIMEOUT_SECONDS": "10",
    }
    payment = {"amount": 1, "currency": "EUR", "reference": "pgbouncer"}
    writes = post("/payments", payment, keeps_alive=False)
    reads = get("/transaction", keeps_alive=False)
    with (
        pgbouncer(postgres, directory) as url,
        serving(APP, **urls | settings | {"DATABASE_URL": url}) as service,
    ):
        service.wait()
        with load(service.port, 20 * [writes, reads]) as result:
            eventually(lambda: result.total >= 800, 60)
        print(result)
        assert bool(result.failures) == fails


def test_concurrent_migrations_through_pgbouncer_are_safe(
    postgres: Postgres, directory: Path
) -> None:
    """PgBouncer's documentation, "SQL feature map": session locks are lost in transaction mode."""
    execute(postgres.url, "create database unmigrated")
    with pgbouncer(postgres, directory) as url:
        own = url.replace("/postgres", "/unmigrated")
        environment = os.environ | {"DATABASE_URL": own}
        command = [sys.executable, "-m", "alembic", "upgrade", "head"]
        output = subprocess.PIPE
        runs = [
            subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output, stderr=output)
            for _ in range(2)
        ]
        outputs = [b"".join(run.communicate(timeout=60)) for run in runs]
        assert [run.returncode for run in runs] == [0, 0], outputs
        # Each migration ran once.
        migrations = len(list((PROJECT / "migrations" / "versions").glob("*.py")))
        assert b"".join(outputs).count(b"Running upgrade") == migrations, outputs
    execute(postgres.url, "drop database unmigrated with (force)")


def execute(url: str, statement: str) -> None:
    """Execute a statement outside a transaction."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


class Certificate(NamedTuple):
    """A certificate and its private key."""

    file: Path
    key: Path


def create_certificate(directory: Path, name: str, *options: object) -> Certificate:
    """Create a certificate for one day; `options` are those of `openssl req`."""
    created = Certificate(directory / f"{name}.pem", directory / f"{name}.key")
    command = [program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    files = ["-out", created.file, "-keyout", created.key]
    arguments = [*command, "-subj", f"/CN={name}", *files, *options]
    subprocess.run(list(map(str, arguments)), check=True, capture_output=True)
    created.key.chmod(0o644)
    return created


def create_certificates(directory: Path) -> tuple[Certificate, Path]:
    """Return a certificate for 127.0.0.1, and that of the authority that signed it."""
    authority = create_certificate(
        directory, "authority", "-addext", "keyUsage=critical,keyCertSign"
    )
    certificate = create_certificate(
        directory,
        "certificate",
        *("-CA", authority.file, "-CAkey", authority.key),
        *("-addext", "subjectAltName=IP:127.0.0.1"),
        *("-addext", "basicConstraints=CA:FALSE"),
    )
    return certificate, authority.file


@contextlib.contextmanager
def redis_with_tls(certificate: Certificate) -> Iterator[str]:
    """Run a Redis that accepts only TLS; yield its URL."""
    port = free_port()
    options = {
        "--port": 0,
        "--tls-port": port,
        "--tls-auth-clients": "no",
        "--tls-cert-file": certificate.file,
        "--tls-key-file": certificate.key,
        "--tls-ca-cert-file": certificate.file,
        "--bind": "127.0.0.1",
        "--save": "",
    }
    arguments = [each for option in options.items() for each in option]
    with running(port, program("redis-server"), *arguments):
        yield f"rediss://127.0.0.1:{port}/0"


@pytest.fixture
def trusted(directory: Path) -> tuple[Certificate, Path]:
    """The certificate of both servers, and its authority."""
    return create_certificates(directory)


@pytest.fixture
def tls_urls(
    urls: dict[str, str], postgres: Postgres, directory: Path, trusted: tuple[Certificate, Path]
) -> Iterator[dict[str, str]]:
    """Settings for Postgres (behind PgBouncer) and Redis over TLS."""
    certificate, _ = trusted
    tls = {
        "client_tls_sslmode": "require",
        "client_tls_cert_file": certificate.file,
        "client_tls_key_file": certificate.key,
    }
    with (
        pgbouncer(postgres, directory, **tls) as database_url,
        redis_with_tls(certificate) as redis_url,
    ):
        yield urls | {
            "DATABASE_URL": database_url,
            "DATABASE_STATEMENT_CACHE_SIZE": "0",
            "REDIS_URL": redis_url,
            "READINESS_REQUIRED": "postgres,redis",
        }


def trusting(
    tls_urls: dict[str, str], authority: Path
) -> contextlib.AbstractContextManager[Service]:
    """Run the service with one trusted authority for both servers."""
    postgres_options = f"sslmode=verify-full&sslrootcert={authority}"
    both = {
        "DATABASE_URL": f"{tls_urls['DATABASE_URL']}?{postgres_options}",
        "REDIS_URL": f"{tls_urls['REDIS_URL']}?ssl_ca_certs={authority}",
    }
    return serving(APP, **tls_urls | both)


def test_tls_with_a_trusted_certificate_is_accepted(
    tls_urls: dict[str, str], trusted: tuple[Certificate, Path]
) -> None:
    _, authority = trusted
    with trusting(tls_urls, authority) as service:
        service.wait("/health/ready", 200)
        assert service.get("/transaction").status_code == 200
        assert service.get("/cached").status_code == 200


def test_tls_with_an_untrusted_certificate_is_rejected(
    tls_urls: dict[str, str], directory: Path
) -> None:
    """The service starts, reports both as unhealthy, and logs the reasons."""
    other_directory = directory / "other"
    other_directory.mkdir()
    _, other = create_certificates(other_directory)
    with trusting(tls_urls, other) as service:
        service.wait("/health/startup", 200)
        checks = service.get("/health/ready").json()["checks"]
        statuses = {name: check["status"] for name, check in checks.items()}
        assert statuses == dict.fromkeys(checks, "unhealthy")
        assert service.get("/transaction").status_code == 503
        assert service.get("/cached").status_code == 503
        assert service.stop() == 0
        assert "Traceback" not in service.text
        assert str(urlsplit(tls_urls["DATABASE_URL"]).password) not in service.text
        reasons = {
            line["dependency"]: line["reason"] for line in service.lines if "dependency" in line
        }
        assert reasons.keys() == {"postgres", "redis"}
