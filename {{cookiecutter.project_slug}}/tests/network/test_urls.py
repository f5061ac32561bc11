"""The URLs of Postgres, Redis and others: checked at the start by the parsers of their clients.

asyncpg's documentation of `connect`: several hosts, IPv6, unix sockets, options. redis-py's of
`from_url`. libpq, "Connection URIs".
"""

import asyncio
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr, ValidationError
from redis.asyncio import Redis as RedisClient

from app.network import connection_urls
from app.settings import Settings
from app.storage.postgres import Database, connect
from scripts.dev_services import Postgres, Redis, free_port
from tests.service_process import PROJECT, Service, eventually, serving
from tests.tcp_proxy import silent_listener

VALID = {
    "database_url": [
        "postgresql://app:secret@db:5432/app",
        "postgres://db",
        "postgresql://h1:5432,h2:5432/db",
        "postgresql://u:p@h1,h2:5433/db",
        "postgresql://[::1]:5432,[::2]:5433/db",
        "postgresql://[fd00::1]/db",
        "postgresql:///db?host=/var/run/postgresql",
        "postgresql:///db?host=h1,h2&port=5432,5433&user=u&password=p@ss",
        "postgresql://h1,h2/db?target_session_attrs=read-write",
        "postgresql://db/app?sslmode=require&sslrootcert=/does/not/exist",
        "postgresql://db/app?sslmode=verify-full",
        "postgresql://db/app?sslmode=require&sslnegotiation=direct",
        "postgresql://db/app?statement_timeout=5s&search_path=a,b&TimeZone=UTC&jit=off",
        "postgresql://db/app?options=-c%20anything%3D1&my.parameter=1&application_name=x",
        "postgresql://u:p%40%2F%3F@db/app",
    ],
    "redis_url": [
        "redis://:secret@cache:6379/0",
        "rediss://user:secret@cache",
        "redis://[::1]:6379/1",
        "redis://cache/2/",
        "redis://cache?db=3&socket_timeout=2&client_name=x&protocol=3&health_check_interval=5",
        "rediss://cache/0?ssl_cert_reqs=none&ssl_ca_certs=/does/not/exist",
        "unix:///run/redis.sock?db=1",
    ],
}
#: And the part of the line that tells the problem.
INVALID = {
    "database_url": {
        "mysql://hunter2@db/app": "must be postgresql://",
        "hunter2": "must be postgresql://",
        "postgresql://u:hunter2@db:0/app": "must be postgresql://",
        "postgresql://u:hunter2@db:99999/app": "must be postgresql://",
        "postgresql://u:hunter2@h1:5432,h2:x/app": "must be postgresql://",
        "postgresql://u:hunter2@h1,,h2/app": "must be postgresql://",
        "postgresql://u:hunt/er2@db/app": "must be postgresql://",
        "postgresql://u:hunt?er2@db/app": "must be postgresql://",
        "postgresql://u:hunt?er2=1@db/app": "must be postgresql://",
        "postgresql://u:1234?hunter2=1@db/app": "unknown option after the question mark",
        "postgresql://[::1/app": "must be postgresql://",
        "postgresql://db/app?family=6": "unknown option family",
        "postgresql://db/app?connect_timeout=5": "unknown option connect_timeout",
        "postgresql://db/app?pool_size=5&sslmode=require": "unknown option pool_size",
        "postgresql://db/app?sslcompression=1": "unknown option sslcompression",
        "postgresql://db/app?pgbouncer=true": "unknown option pgbouncer",
        "postgresql://db/app?channel_binding=require": "unknown option channel_binding",
        "postgresql://db/app?SSLMODE=require": "unknown option SSLMODE",
        "postgresql://db/app?sslmode=hunter2": "invalid value of sslmode",
        "postgresql://db/app?sslnegotiation=hunter2": "invalid value of sslnegotiation",
        "postgresql://db/app?target_session_attrs=hunter2": "value of target_session_attrs",
        "postgresql://h1,h2/app?sslmode=require&ssl_min_protocol_version=hunter2": "of ssl_min",
        "postgresql:///app?host=h1&port=hunter2": "invalid value of port",
    },
    "redis_url": {
        "http://hunter2@cache": "must be redis://",
        "redis://:hunter2@cache:99999/0": "must be redis://",
        "redis://:hunter2@cache:0": "must be redis://",
        "redis://:hunter2@cache:x": "must be redis://",
        "redis://:hunter2@cache/zero": "must be redis://",
        "redis://:hunter2@h1:6379,h2:6379/0": "must be redis://",
        "redis://:hunter2@h1,h2/0": "must be redis://",
        "redis://cache?db=hunter2": "invalid value of db",
        "redis://cache?socket_timeout=hunter2": "invalid value of socket_timeout",
        "redis://cache?family=6": "unknown option family",
        "redis://cache?sslmode=require": "unknown option sslmode",
        "redis://cache?retry=3": "unknown option retry",
        "redis://cache?ssl_cert_reqs=none": "invalid value of ssl_cert_reqs",
        "rediss://cache?ssl_cert_reqs=hunter2": "invalid value of ssl_cert_reqs",
        "rediss://cache?ssl_bogus=1": "invalid value of ssl_bogus",
    },
}


def read(name: str, url: str) -> str:
    settings: dict[str, Any] = {name: SecretStr(url)}
    secret: SecretStr = getattr(Settings(**settings), name)
    return secret.get_secret_value()


@pytest.mark.parametrize(("name", "url"), [(name, url) for name in VALID for url in VALID[name]])
def test_url_of_the_client_is_accepted(name: str, url: str) -> None:
    assert read(name, url) == url


@pytest.mark.parametrize(
    ("name", "url", "problem"),
    [(name, url, problem) for name in INVALID for url, problem in INVALID[name].items()],
)
def test_invalid_url_is_rejected_without_its_secret(name: str, url: str, problem: str) -> None:
    with pytest.raises(ValidationError) as raised:
        read(name, url)
    errors = raised.value.errors()
    (error,) = [each for each in errors if each["type"] != "default_factory_not_called"]
    assert error["loc"] == (name,)
    assert problem in error["msg"]
    assert "hunter2" not in error["msg"]
    assert "er2" not in error["msg"]


def test_start_ends_with_one_line_that_names_both_urls() -> None:
    urls = {
        "DATABASE_URL": "postgresql://u:hunter2@db/app?family=6",
        "REDIS_URL": "redis://:hunter2@cache?db=zero",
    }
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn"],
        cwd=PROJECT,
        env=os.environ | urls,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr == (
        "configuration error: DATABASE_URL: has an unknown option family after the question mark; "
        "REDIS_URL: has an invalid value of db after the question mark\n"
    )


def test_options_are_those_of_asyncpg() -> None:
    """asyncpg sends every option that it does not read to the server."""
    values = {
        "port": "1",
        "sslmode": "disable",
        "sslnegotiation": "postgres",
        "gsslib": "gssapi",
        "target_session_attrs": "any",
    }
    for option in connection_urls.ASYNCPG_OPTIONS:
        url = f"postgresql:///?{option}={values.get(option, 'x')}"
        _, parameters = connection_urls._parse(url, ssl=False)
        assert parameters.server_settings is None, option
    _, parameters = connection_urls._parse("postgresql:///?family=6", ssl=False)
    assert parameters.server_settings == {"family": "6"}


async def test_parameters_are_those_of_the_server(database_url: str) -> None:
    """Each can be set in the URL: no name is misspelled, or of the server alone."""
    connection = await asyncpg.connect(database_url)
    rows = await connection.fetch("select lower(name) as name, context from pg_settings")
    await connection.close()
    contexts = {row["name"]: row["context"] for row in rows}
    known = connection_urls.SERVER_PARAMETERS & contexts.keys()
    settable = {"user", "superuser", "backend", "superuser-backend"}
    assert {contexts[name] for name in known} <= settable
    assert len(known) > 150


@pytest.fixture
def silent_port() -> Iterator[int]:
    with silent_listener() as port:
        yield port


def several(database_url: str, *ports: int) -> str:
    """Return the URL with these ports of the local host before its own."""
    before, _, after = database_url.partition("@")
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"{before}@{hosts},{after}"


async def test_second_host_is_reached_when_the_first_is_silent(
    settings: Settings, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent host would use all of the time. A connect to the last can last over 1 s."""
    monkeypatch.setattr("app.storage.postgres.CONNECT_TIMEOUT_SECONDS", 6)
    url = several(settings.database_url.get_secret_value(), silent_port, free_port())
    short = {
        "database_url": SecretStr(url),
        "database_acquire_timeout_seconds": 6,
        "readiness_timeout_seconds": 6,
    }
    async with Database(settings.model_copy(update=short), 2) as database:
        async with database.acquire() as connection:
            assert await connection.fetchval("select 1") == 1
        async with asyncio.timeout(6):
            await database.check()


@pytest.mark.parametrize("wanted", ["any", "primary", "read-write", "prefer-standby"])
async def test_target_session_attrs_hold_for_several_hosts(database_url: str, wanted: str) -> None:
    url = f"{several(database_url, free_port())}?target_session_attrs={wanted}"
    connection = await connect(url, timeout=10)
    assert await connection.fetchval("select 1") == 1
    await connection.close()
    with pytest.raises((asyncpg.TargetServerAttributeNotMatched, OSError)):
        await connect(url.replace(wanted, "standby"), timeout=10)


def has_logged(service: Service, text: str) -> bool:
    return text in service.text


def test_causes_of_503s_are_logged_once_without_secrets(
    postgres: Postgres, redis: Redis, database_url: str
) -> None:
    """Over a socket: a wrong password, then a certificate that does not exist; Redis' OOM."""
    wrong = database_url.replace("app:", "app:hunter2")
    missing = f"{database_url}?sslmode=require&sslrootcert=/does/not/exist"
    for url, cause in (
        (wrong, "InvalidPasswordError: password authentication failed"),
        (missing, "FileNotFoundError: [Errno 2] No such file or directory"),
    ):
        settings = {"DATABASE_URL": url, "REDIS_URL": redis.url, "WEB_CONCURRENCY": "1"}
        with serving("tests.storage.database_routes:app", **settings) as service:
            service.wait("/health/live")
            service.wait("/health/ready", 503)
            eventually(functools.partial(has_logged, service, cause))
            for _ in range(3):
                response = service.http.post("/errors", params={"sqlstate": "40001"})
                assert response.status_code == 503
            lines = [line for line in service.messages if cause in line]
            assert [line.partition(":")[0] for line in lines] == ["postgres unavailable"]
            assert "hunter2" not in service.text


async def test_cause_of_redis_503_is_logged_once(database_url: str, redis: Redis) -> None:
    """Redis' documentation, "Key eviction" and "ACL": OOM and NOPERM."""
    client: Any = RedisClient.from_url(redis.url)
    await client.execute_command("ACL", "SETUSER", "limited", "on", ">hunter2", "+@connection")
    limited = redis.url.replace("//", "//limited:hunter2@")
    settings = {"DATABASE_URL": database_url, "WEB_CONCURRENCY": "1"}
    app = "tests.storage.database_routes:app"
    try:
        with serving(app, REDIS_URL=limited, **settings) as service:
            service.wait()
            assert_logged_once(service, ": NOPERM ")
        await client.config_set("maxmemory", "1")
        with serving(app, REDIS_URL=redis.url, **settings) as service:
            service.wait()
            assert_logged_once(service, ": OOM ")
    finally:
        await client.config_set("maxmemory", "0")
        await client.execute_command("ACL", "DELUSER", "limited")
        await client.aclose()


def assert_logged_once(service: Service, cause: str) -> None:
    for _ in range(3):
        assert service.http.post("/cache").status_code == 503
    lines = [line for line in service.messages if cause in line]
    assert len(lines) == 1, service.messages
    assert "hunter2" not in service.text
