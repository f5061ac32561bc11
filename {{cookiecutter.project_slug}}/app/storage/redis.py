"""Redis: a client whose every wait is short and bounded, so that an outage slows nothing else.

Its connections lead to the server that the name of the host has now. A server that rejects commands
because of its own state, such as a replica after a fail-over, loses them all.
"""

import contextlib
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Request
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from app.settings import Settings
from app.storage.traced_redis import TracedCommands
from app.telemetry import tracing

#: Time limit for a response, a connect, and a free connection. redis-py's defaults block for 58.7 s
#: on a hung server (11 attempts of 5 s).
TIMEOUT_SECONDS = 0.5
#: Retries after a lost connection: 0.3 to 0.6 s in all, so that a quick restart fails no request.
#: A command that timed out is not retried, since the server may be executing it; one whose
#: connection was lost is, and may be executed twice.
RETRIES = 3
BACKOFF = EqualJitterBackoff(base=0.05, cap=0.3)
#: Connections per worker.
MAX_CONNECTIONS = 20
#: Time between two replacements of all connections of a pool.
REPLACE_SECONDS = 1.0
#: Time to live of the key that the readiness probe writes.
PROBE_SECONDS = 60
#: Codes of errors that are due to the state of the server, or to its idea of the client, and not to
#: the command. Redis 6 puts those of a script's command into the text, as `...: -READONLY ...`.
_SERVER_CODES = re.compile(
    r"(?:^|: -)(READONLY|MASTERDOWN|LOADING|MOVED|ASK|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|MISCONF|OOM"
    r"|NOPERM|NOAUTH|WRONGPASS)\b"
)


def server_code(error: BaseException) -> str | None:
    """Return the code, such as READONLY, if the server would reject other commands as well."""
    code = getattr(error, "status_code", None) or ""
    found = _SERVER_CODES.search(code) or _SERVER_CODES.search(str(error))
    return found[1] if found else None


class _Watch:
    """A connection that reports to its pool which commands the server rejects."""

    pool: "_Pool"
    #: By `time.monotonic()`; zero until the handshake is done, parts of which may be rejected.
    connected_at = 0.0

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        self.connected_at = 0.0
        await super().on_connect_check_health(check_health)  # type: ignore[misc]
        self.connected_at = time.monotonic()

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except RedisError as error:
            if self.connected_at and server_code(error):
                # Closed when it is released, since a pipeline has more responses to read.
                self.mark_for_reconnect()  # type: ignore[attr-defined]
                self.pool.replace_connections()
            raise


class _TcpConnection(_Watch, Connection):
    pass


class _TlsConnection(_Watch, SSLConnection):
    pass


class _UnixConnection(_Watch, UnixDomainSocketConnection):
    pass


_WATCHED = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}


class _Pool(BlockingConnectionPool):
    """Replaces its connections, before their next use, once one of them leads to a wrong server."""

    #: Older connections are replaced, by `time.monotonic()`.
    replaced_at = float("-inf")

    def __init__(self, connection_class: Any = Connection, **options: Any) -> None:
        super().__init__(connection_class=_WATCHED[connection_class], **options)

    def replace_connections(self) -> None:
        """Replace all connections, but not again and again."""
        now = time.monotonic()
        if now - self.replaced_at >= REPLACE_SECONDS:
            self.replaced_at = now

    def make_connection(self) -> Any:
        connection = super().make_connection()  # type: ignore[no-untyped-call]
        connection.pool = self
        return connection

    async def ensure_connection(self, connection: Any) -> None:
        if connection.connected_at < self.replaced_at:
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)


class RedisClient(Redis):
    """A client that knows the prefix of the service's keys, streams and groups."""

    def __init__(self, settings: Settings, pool: _Pool) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self.settings = settings

    def key(self, name: str) -> str:
        """Return the name of a key, stream or group of this service."""
        return f"{self.settings.redis_key_prefix}:{name}"

    async def check(self) -> None:
        """Write a key. Raises an error if Redis is down, or does not accept writes.

        PING succeeds on a replica, on a full server, and for a user that may do nothing.
        """
        await self.set(self.key("probe"), b"", ex=PROBE_SECONDS)

    def unhurried(self, retries: int = 0) -> "RedisClient":
        """Return a client of one connection, whose caller limits the time of responses."""
        return create_redis(self.settings, 1, retries, is_hurried=False)

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[Any]:
        """Lend a connection of the pool for the block. An error in the block closes it."""
        pool: Any = self.connection_pool
        connection = await pool.get_connection()
        try:
            yield connection
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)


class TracedRedisClient(TracedCommands, RedisClient):  # type: ignore[misc]
    """The client while traces are on."""


def create_redis(
    settings: Settings,
    max_connections: int = MAX_CONNECTIONS,
    retries: int = RETRIES,
    *,
    is_hurried: bool = True,
) -> RedisClient:
    """Return a client that connects on first use. Close it with `aclose()`, or use `async with`."""
    pool = _Pool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=max_connections,
        timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS if is_hurried else None,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(BACKOFF, retries, supported_errors=(RedisConnectionError,)),
        client_name=settings.service_name,
    )
    client_class = TracedRedisClient if tracing.current else RedisClient
    return client_class(settings, pool)


async def _redis(request: Request) -> RedisClient:
    redis: RedisClient = request.state.redis
    return redis


#: The type of a route's parameter: `async def route(redis: RedisDependency)`.
RedisDependency = Annotated[RedisClient, Depends(_redis)]
