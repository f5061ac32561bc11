"""Redis after a fail-over: a server that rejects commands loses its connections, and is reported.

The kinds of errors are those of Redis' source (`shared` in server.c) and of "Redis cluster
specification", on real servers where they are easy to have.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis as Client
from redis.exceptions import RedisError, ResponseError

from app.settings import Settings
from app.storage.redis import RedisClient, create_redis, server_code
from scripts import dev_services
from tests.tcp_proxy import TcpProxy, proxying

READONLY = "READONLY You can't write against a read only replica."
SERVER_ERRORS = (
    READONLY,
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "LOADING Redis is loading the dataset in memory",
    "MOVED 3999 127.0.0.1:6381",
    "ASK 3999 127.0.0.1:6381",
    "CLUSTERDOWN The cluster is down",
    "NOREPLICAS Not enough good replicas to write.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "NOPERM this user has no permissions to run the 'set' command",
    "NOAUTH Authentication required.",
    # Redis 6, from a script
    f"ERR Error running script (call to f_1): @user_script:2: @user_script: 2: -{READONLY}",
)
COMMAND_ERRORS = (
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "ERR value is not an integer or out of range",
    "NOSCRIPT No matching script. Please use EVAL.",
)


class RejectingServer(ThreadingTCPServer):
    """Accepts connections, and rejects every SET with the same error."""

    daemon_threads = True

    def __init__(self, error: str) -> None:
        super().__init__(("127.0.0.1", 0), RejectingHandler)
        self.error = error
        #: The connection of each SET.
        self.sets: list[int] = []
        self.connections = 0


class RejectingHandler(StreamRequestHandler):
    """One connection."""

    server: RejectingServer

    def handle(self) -> None:
        self.server.connections += 1
        number = self.server.connections
        with contextlib.suppress(OSError):
            while line := self.rfile.readline():
                arguments = [self.read_argument() for _ in range(int(line[1:]))]
                self.wfile.write(self.respond(arguments[0], number))

    def read_argument(self) -> bytes:
        length = int(self.rfile.readline()[1:])
        return self.rfile.read(length + 2)[:-2]

    def respond(self, command: bytes, number: int) -> bytes:
        if command == b"HELLO":
            return b"%1\r\n$5\r\nproto\r\n:3\r\n"
        if command != b"SET":
            return b"+OK\r\n"
        self.server.sets.append(number)
        return f"-{self.server.error}\r\n".encode()


@pytest.fixture
def rejecting(request: pytest.FixtureRequest) -> Iterator[RejectingServer]:
    with RejectingServer(request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def client_of(settings: Settings, port: int) -> RedisClient:
    url = SecretStr(f"redis://127.0.0.1:{port}/0")
    return create_redis(settings.model_copy(update={"redis_url": url}))


@pytest.mark.parametrize("rejecting", SERVER_ERRORS, indirect=True)
async def test_server_error_makes_the_next_command_connect_anew(rejecting: RejectingServer) -> None:
    async with client_of(Settings(), rejecting.server_address[1]) as client:
        for _ in range(3):
            with pytest.raises(RedisError) as error:
                await client.set("key", 1)
            assert server_code(error.value)
        with contextlib.suppress(RedisError):
            commands: Any = client.pipeline(transaction=False)
            await commands.set("key", 1).set("key", 2).execute()
    assert rejecting.sets[:3] == sorted(set(rejecting.sets[:3]))
    assert rejecting.connections > 3


@pytest.mark.parametrize("rejecting", COMMAND_ERRORS, indirect=True)
async def test_error_of_a_command_keeps_the_connection(rejecting: RejectingServer) -> None:
    async with client_of(Settings(), rejecting.server_address[1]) as client:
        for _ in range(3):
            with pytest.raises(ResponseError):
                await client.set("key", 1)
    assert rejecting.connections == 1


@pytest.fixture
def old(redis: dev_services.Redis) -> Iterator[Any]:
    """A client of the server that a fail-over makes a replica."""
    if redis.program == "fakeredis":
        pytest.skip("fakeredis has no replicas")
    with Client.from_url(redis.url) as client:
        client.flushall()
        yield client
        client.replicaof("NO", "ONE")
        client.flushall()


@pytest.fixture
def new() -> Iterator[dev_services.Redis]:
    """The server that a fail-over makes the primary."""
    with dev_services.redis() as server:
        yield server


@pytest.fixture
def proxy(redis: dev_services.Redis) -> Iterator[TcpProxy]:
    """The name of Redis: it leads to the old server, and then to the new one."""
    with proxying(redis.port) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def connected(port: int, number: int) -> AsyncIterator[RedisClient]:
    """Yield a client with a number of idle connections."""
    async with client_of(Settings(), port) as client:
        await asyncio.gather(*(client.blpop(["nothing"], timeout=0.2) for _ in range(number)))
        idle, _ = client.connection_pool.get_connection_count()
        assert idle[0] == number
        yield client


async def test_one_rejection_replaces_all_connections_of_the_pool(
    old: Any, new: dev_services.Redis, proxy: TcpProxy
) -> None:
    async with connected(proxy.port, 10) as client:
        old.replicaof("127.0.0.1", new.port)
        proxy.target = new.port
        with pytest.raises(RedisError, match="read only replica"):
            await client.set("key", 1)
        await asyncio.gather(*(client.set("key", 1) for _ in range(10)))


async def test_check_fails_on_a_replica_and_on_a_full_server(
    old: Any, new: dev_services.Redis, redis: dev_services.Redis
) -> None:
    """PING succeeds on both."""
    async with client_of(Settings(), redis.port) as client:
        await client.check()
        old.replicaof("127.0.0.1", new.port)
        with pytest.raises(RedisError, match="read only replica"):
            await client.check()
        await client.ping()
        old.replicaof("NO", "ONE")
        old.config_set("maxmemory", 1)
        try:
            with pytest.raises(RedisError, match="maxmemory"):
                await client.check()
            await client.ping()
        finally:
            old.config_set("maxmemory", 0)
        await client.check()
