"""Redis: a client whose every wait is short and bounded, so that a Redis outage slows nothing else down."""

from typing import Annotated

from fastapi import Depends, Request, Response
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff

from app.errors import problem
from app.settings import Settings

#: Seconds for one answer. redis-py's defaults block for 58.7 s on a frozen server (11 tries of 5 s).
TIMEOUT_SECONDS = 0.5
#: Connections per worker; a further caller waits `TIMEOUT_SECONDS` for one.
MAX_CONNECTIONS = 20


def connect(settings: Settings, max_connections: int = MAX_CONNECTIONS) -> Redis:
    """Return a client that connects on first use; close it with `aclose()`."""
    pool = BlockingConnectionPool.from_url(
        settings.redis_url.get_secret_value(),
        max_connections=max_connections,
        timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), retries=2),
        client_name=settings.service_name,
    )
    return Redis.from_pool(pool)


async def unavailable(_: Request, __: Exception) -> Response:
    """Answer 503 for a request that could not do without Redis."""
    return problem(503, "The cache is not available.", {"Retry-After": "1"})


def _cache(request: Request) -> Redis:
    cache: Redis = request.state.cache
    return cache


#: Use as the type of a route's parameter: `async def route(cache: CacheDependency)`.
CacheDependency = Annotated[Redis, Depends(_cache)]
