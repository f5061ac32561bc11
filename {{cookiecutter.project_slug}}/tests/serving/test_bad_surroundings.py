"""A start while much is wrong around the service, and names with several addresses.

The name server is a real one; resolv.conf(5) describes when it counts as dead: `timeout`,
`attempts`.
"""

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis import Redis as Client

from scripts import dev_services
from tests.name_server import asking, serving_names
from tests.service_process import Service, eventually, serving
from tests.tcp_proxy import proxying, silent_listener

DATABASE_ROUTES = "tests.storage.database_routes:app"
#: Fills a small /dev/shm of its own.
FULL_SHARED_MEMORY = """
    mount -t tmpfs -o size=16m,mode=1777 none /dev/shm
    cat /dev/zero > /dev/shm/filler 2> /dev/null || true
"""
SETTINGS = {"WEB_CONCURRENCY": "1", "READINESS_REQUIRED": "postgres,redis", "LOG_FORMAT": "json"}


def execute(url: str, *statements: str) -> None:
    """Execute statements in Postgres."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


@pytest.fixture
def own_redis() -> Iterator[dev_services.Redis]:
    """A server of its own, since it becomes a replica."""
    with dev_services.redis() as server:
        if server.program == "fakeredis":
            pytest.skip("fakeredis has no replicas")
        yield server


@pytest.fixture
def role(database_url: str) -> Iterator[str]:
    """A role that may read and write, for a wrong password."""
    execute(database_url, "create role stranger login password 'right' in role app")
    yield "stranger"
    execute(database_url, "drop role stranger")


def test_start_amid_four_failures_recovers_from_each(
    database_url: str, own_redis: dev_services.Redis, role: str, tmp_path: Path
) -> None:
    """A full /dev/shm, a dead name server, a replica as Redis, a wrong password for Postgres."""
    server = urlsplit(database_url).netloc.rpartition("@")[2]
    urls = {
        "DATABASE_URL": f"postgresql://{role}:wrong@{server}/postgres",
        "REDIS_URL": f"redis://redis.test:{own_redis.port}/0",
    }
    with (
        Client.from_url(own_redis.url) as redis,
        serving_names({"redis.test": ["127.0.0.1"]}) as names,
    ):
        names.is_dead = True
        redis.replicaof("127.0.0.1", own_redis.port)
        prefix = asking(names, tmp_path, FULL_SHARED_MEMORY)
        with serving(DATABASE_ROUTES, 0, None, prefix, **SETTINGS | urls) as service:
            service.wait("/health/live")
            service.wait("/health/startup")
            assert service.get("/health/ready").status_code == 503
            eventually(lambda: len(states(service)) == 3)
            filler = Path("/proc", str(service.process.pid), "root", "dev/shm/filler")
            filler.unlink()
            eventually(lambda: "metrics are complete again" in service.messages)
            names.is_dead = False
            eventually(lambda: "redis still unavailable" in service.text)
            execute(database_url, f"alter role {role} password 'wrong'")
            eventually(lambda: "postgres available again" in service.messages)
            redis.replicaof("NO", "ONE")
            service.wait("/health/ready")
            assert service.get("/health/live").status_code == 200
            found = states(service)
    # The worker inherits the failed writes of the master, and reports their end as well.
    beginnings = sorted({message.partition(":")[0] for message in found})
    assert beginnings == [
        "metrics are complete again",
        "metrics are incomplete",
        "postgres available again",
        "postgres unavailable",
        "redis available again",
        "redis still unavailable",
        "redis unavailable",
    ]
    causes = "\n".join(found)
    assert "No space left on device" in causes
    assert f'InvalidPasswordError: password authentication failed for user "{role}"' in causes
    assert "redis unavailable: TimeoutError: Timeout connecting to server" in causes
    assert "redis still unavailable: READONLY You can't write against a read only" in causes


def states(service: Service) -> list[str]:
    """Return the messages about metrics and dependencies."""
    lines = [line for line in service.lines if line["logger"] in {"app.health", "app.metrics"}]
    return [line["message"] for line in lines if line["message"] != "metrics are served"]


def test_dead_name_server_delays_neither_other_servers_nor_shutdown(
    database_url: str, tmp_path: Path
) -> None:
    """A lookup lasts 10 s (resolv.conf(5): `timeout`, `attempts`), and libuv has four threads.

    uvloop's lookups kept an address of Postgres waiting, and the process for 37 s at its end.
    """
    urls = {"DATABASE_URL": database_url, "REDIS_URL": "redis://redis.test:6379/0"}
    with serving_names({}) as names:
        names.is_dead = True
        prefix = asking(names, tmp_path)
        settings = SETTINGS | {"READINESS_REQUIRED": "postgres", "READINESS_TIMEOUT_SECONDS": "10"}
        with serving(DATABASE_ROUTES, 0, None, prefix, **settings | urls) as service:
            service.wait("/health/live")
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                responses = list(pool.map(lambda _: service.http.post("/cache"), range(24)))
            assert {response.status_code for response in responses} == {503}
            service.wait("/health/ready")
            start = time.monotonic()
            assert service.stop() == 0
            # 1 s on an idle machine
            assert time.monotonic() - start < 10


def test_name_with_dead_addresses_leads_to_the_live_one(
    database_url: str, redis: dev_services.Redis, tmp_path: Path
) -> None:
    """RFC 8305, section 5: the next address is tried before the first one has failed.

    getaddrinfo(3) keeps the order of addresses of one network. The first is silent here, and
    nothing listens on the second. No other test listens on this network.
    """
    addresses = ["127.77.0.1", "127.77.0.2", "127.77.0.3"]
    own = urlsplit(database_url)
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(serving_names({"db.test": addresses, "redis.test": addresses}))
        ports = []
        for target in (own.port or 0, redis.port):
            proxy = stack.enter_context(proxying(target, addresses[-1]))
            stack.enter_context(silent_listener(proxy.port, addresses[0]))
            ports.append(proxy.port)
        urls = {
            "DATABASE_URL": f"postgresql://{own.username}:{own.password}@db.test:{ports[0]}/postgres",
            "REDIS_URL": f"redis://redis.test:{ports[1]}/0",
        }
        prefix = asking(names, tmp_path)
        with serving(DATABASE_ROUTES, 0, None, prefix, **SETTINGS | urls) as service:
            service.wait("/health/ready", 200)
            assert service.http.post("/cache").status_code == 204
            assert service.http.post("/errors?sqlstate=40001").status_code == 503
            assert "unavailable" not in service.text


def test_too_many_connections_are_503_and_one_line_at_start_and_later(
    database_url: str, redis: dev_services.Redis
) -> None:
    """PostgreSQL's documentation, "Error Codes": 53300, `too_many_connections`."""
    server = urlsplit(database_url).netloc.rpartition("@")[2]
    urls = {"DATABASE_URL": f"postgresql://many:hunter2@{server}/postgres", "REDIS_URL": redis.url}
    terminate = "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'many'"
    no_more = "alter role many connection limit 0"
    unlimited = "alter role many connection limit -1"
    execute(database_url, "create role many login password 'hunter2' in role app", no_more)
    try:
        with serving(DATABASE_ROUTES, **SETTINGS | urls) as service:
            service.wait("/health/live")
            for outages in (1, 2):
                service.wait("/health/ready", 503)
                for _ in range(3):
                    response = service.http.post("/errors?sqlstate=22012")
                    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
                assert states(service)[-1].startswith(
                    "postgres unavailable: TooManyConnectionsError: too many connections for role"
                )
                execute(database_url, unlimited)
                service.wait("/health/ready")
                assert service.http.post("/errors?sqlstate=22012").status_code == 500
                assert len(states(service)) == 2 * outages, states(service)
                execute(database_url, no_more, terminate)
            responded = [each for each in service.messages if each.startswith("responded 503")]
            assert len(responded) <= 1
            assert "hunter2" not in service.text
    finally:
        execute(database_url, "drop role many")
