"""Redis: a client whose every wait is short and bounded, so that an outage slows nothing else."""

from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from app.settings import Settings

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


def create_redis(settings: Settings, max_connections: int = MAX_CONNECTIONS) -> Redis:
    """Return a client that connects on first use. Close it with `aclose()`, or use `async with`."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=max_connections,
        timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(BACKOFF, RETRIES, supported_errors=(RedisConnectionError,)),
        client_name=settings.service_name,
    )
    return Redis.from_pool(pool)


async def _redis(request: Request) -> Redis:
    redis: Redis = request.state.redis
    return redis


#: The type of a route's parameter: `async def route(redis: RedisDependency)`.
RedisDependency = Annotated[Redis, Depends(_redis)]
