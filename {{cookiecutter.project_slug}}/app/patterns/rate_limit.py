"""Rate limit: requests per caller and time window, across all workers and pods.

They are counted in Redis, in one round trip of 61 us, which costs a worker 137 us of CPU. So the
requests that come while a call is on its way share the next one: of 16 at once each costs 23 us.

The limit fails open: while Redis is unavailable, requests pass, and one request a second waits for
Redis for a bounded time. Callers over the limit are remembered in memory: otherwise a flood that
slows Redis down would let itself through. The window is fixed, so a caller may send twice the limit
around the end of one.
"""

import asyncio
import contextvars
import functools
import ipaddress
import math
import time
from typing import Any

from fastapi import Request
from prometheus_client import Counter

from app.auth.principal import principal_of
from app.errors import TooManyRequestsError
from app.patterns.fail_open import FailOpen
from app.storage.redis import RedisClient
from app.storage.traced_redis import command_span

#: Time limit for a Redis command.
BUDGET_SECONDS = 0.2
#: Callers over the limit that a process remembers.
MAX_REMEMBERED = 10_000
#: Counts a request for each key; begins a new window if there is none, or if it has lost its
#: expiry. A key may come again.
_COUNT = """
    local counts = {}
    for i, key in ipairs(KEYS) do
        local count, left = redis.call('INCR', key), redis.call('PTTL', key)
        if left < 1 then
            count, left = 1, ARGV[1]
            redis.call('SET', key, 1, 'PX', left)
        end
        counts[i] = {count, tonumber(left)}
    end
    return counts
"""
_UNCHECKED = Counter(
    "rate_limit_unchecked_requests",
    "Requests let through because Redis did not respond.",
    ["limit"],
)
_REJECTED = Counter("rate_limit_refused_requests", "Requests over the limit.", ["limit"])


class _Batch:
    """The requests that one call counts."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.task: asyncio.Task[Any]


class RateLimit:
    """A named limit. Each caller has a window of its own."""

    def __init__(
        self, redis: RedisClient, name: str, requests: int, window_seconds: int = 60
    ) -> None:
        self.redis = redis
        self.name = name
        self.requests = requests
        self.window_seconds = window_seconds
        self.script = redis.register_script(_COUNT)
        self.fail_open = FailOpen(BUDGET_SECONDS, f"rate limit {name}")
        #: The requests of the next call, if there are any.
        self.next_batch: _Batch | None = None
        #: The last call, which may be on its way.
        self.last_call: asyncio.Task[Any] | None = None
        #: By caller, the end of the window in which it is over the limit, by `time.monotonic()`.
        self.rejected_until: dict[str, float] = {}
        # Counters that began with their first event would have no increase.
        self.unchecked = _UNCHECKED.labels(name)
        self.rejected = _REJECTED.labels(name)

    async def check(self, caller: str) -> None:
        """Count a request, within `BUDGET_SECONDS` for its call, and for the one before.

        Raises `TooManyRequestsError`, with the RateLimit headers of IETF draft 10.
        """
        seconds_left = self.rejected_until.get(caller, 0.0) - time.monotonic()
        if seconds_left > 0:
            raise self._rejection(seconds_left)
        with command_span(self.redis.connection_pool, "EVALSHA"):
            counted = await self._count(caller)
        if counted is None:
            self.unchecked.inc()
            return
        count, left_ms = counted
        if count > self.requests:
            self._remember(caller, left_ms / 1000)
            raise self._rejection(left_ms / 1000)

    async def _count(self, caller: str) -> tuple[int, int] | None:
        """Return the number of requests in the window, and its rest in ms; None without Redis."""
        # Redis Cluster hashes the part in braces only, so that the keys of a call are on one node.
        key = self.redis.key("rate:{" + self.name + "}:" + caller)
        if self.fail_open.unavailable_until:
            # Alone: one caller checks whether Redis responds again, and no other waits with it.
            counts = await self._call([key])
            position = 0
        else:
            batch = self.next_batch or self._begin_batch()
            position = len(batch.keys)
            batch.keys.append(key)
            # A request that is cancelled does not cancel the call of the others.
            counts = await asyncio.shield(batch.task)
        return None if counts is None else counts[position]

    def _begin_batch(self) -> _Batch:
        batch = _Batch()
        self.next_batch = batch
        # In no request's context: each has a span of its own.
        batch.task = asyncio.create_task(
            self._call_after(self.last_call, batch), context=contextvars.Context()
        )
        self.last_call = batch.task
        return batch

    async def _call_after(self, previous: asyncio.Task[Any] | None, batch: _Batch) -> Any:
        """Collect requests until the previous call has ended, then count them."""
        if previous and not previous.done():
            await asyncio.wait([previous])
        self.next_batch = None
        return await self._call(batch.keys)

    async def _call(self, keys: list[str]) -> Any:
        window_ms = self.window_seconds * 1000
        return await self.fail_open.call_if_available(
            lambda: self.script(keys=keys, args=[window_ms])
        )

    def _remember(self, caller: str, seconds_left: float) -> None:
        if len(self.rejected_until) >= MAX_REMEMBERED:
            self.rejected_until.clear()
        self.rejected_until[caller] = time.monotonic() + seconds_left

    def _rejection(self, seconds_left: float) -> TooManyRequestsError:
        self.rejected.inc()
        seconds = math.ceil(seconds_left)
        headers = {
            "RateLimit-Policy": f'"{self.name}";q={self.requests};w={self.window_seconds}',
            "RateLimit": f'"{self.name}";r=0;t={seconds}',
        }
        return TooManyRequestsError("Too many requests.", seconds, headers)


def caller(request: Request) -> str:
    """Return the identity to limit: the principal, or else the client's network.

    The network is the address that `FORWARDED_ALLOW_IPS` resolves. Of an IPv6 address it is the
    first 64 bits, which one customer controls.
    """
    name = principal_of(request).subject
    if name:
        return f"principal:{name}"
    return _network(request.client.host if request.client else "")


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _network(host: str) -> str:
    """Return the network of a client. To parse an address costs more than the rest of a check."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    first_64_bits = int(address) >> 64 << 64
    return str(ipaddress.ip_network((first_64_bits, 64)))
