"""Redis: a client whose every wait is short and bounded, so that a Redis outage slows nothing else down."""

from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.exceptions import ConnectionError as LostError

from app.settings import Settings

#: Seconds for one answer. redis-py's defaults block for 58.7 s on a frozen server (11 tries of 5 s).
TIMEOUT_SECONDS = 0.5
#: Tries after a lost connection, 0.3 to 0.6 s in all: a restart that is quicker costs no request. A command that took
#: too long is not tried again, since the server may be working on it; one that was cut off is, and may be done twice.
RETRIES, BACKOFF = 3, EqualJitterBackoff(base=0.05, cap=0.3)
#: Connections per worker; a further caller waits `TIMEOUT_SECONDS` for one.
MAX_CONNECTIONS = 20


def create_redis(settings: Settings, max_connections: int = MAX_CONNECTIONS) -> Redis:
    """Return a client that connects on first use; close it with `aclose()`."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=max_connections,
        timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(BACKOFF, RETRIES, supported_errors=(LostError,)),
        client_name=settings.service_name,
    )
    return Redis.from_pool(pool)


async def _redis(request: Request) -> Redis:
    redis: Redis = request.state.redis
    return redis


#: Use as the type of a route's parameter: `async def route(redis: RedisDependency)`.
RedisDependency = Annotated[Redis, Depends(_redis)]
