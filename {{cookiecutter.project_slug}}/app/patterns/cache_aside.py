"""Cache-aside with a fence: a value read before a change is never stored after it.

A reader that misses loads the value, and stores it only if the key was not deleted since its
lookup. The writer of a change deletes the key after the commit. In that race plain cache-aside,
aiocache and cashews keep the old value.

The cache fails open: while Redis is unavailable, every read loads, and one read a second waits for
Redis for a bounded time.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import Counter

from app.patterns.fail_open import FailOpen
from app.storage.redis import RedisClient

#: Time limit for a Redis command.
BUDGET_SECONDS = 0.1
#: Longer than any load: a fence must outlive the readers that looked up the key before it was set.
FENCE_SECONDS = 120
#: Stores a value unless the fence has changed since the lookup.
_STORE = """
    if (redis.call('GET', KEYS[2]) or '') ~= ARGV[3] then return 0 end
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    return 1
"""
_READS = Counter(
    "cache_reads", "Reads of the cache: hit, miss, or Redis unavailable.", ["cache", "result"]
)

#: A value, and the maximum number of seconds to keep it.
Loaded = tuple[bytes, float]
#: Loads a value; None if it does not exist.
Load = Callable[[], Awaitable[Loaded | None]]
#: A key with the fence that its lookup has seen.
LoadKey = tuple[str, bytes]


class Cache:
    """Values of bytes by key. The time to live bounds the effect of a late deletion."""

    def __init__(self, redis: RedisClient, name: str) -> None:
        self.redis = redis
        self.name = name
        self.script = redis.register_script(_STORE)
        self.fail_open = FailOpen(BUDGET_SECONDS, f"cache {name}")
        #: Apart: while Redis accepts no writes, one load a second tries to store, and reads go on.
        self.storing = FailOpen(BUDGET_SECONDS, f"values for cache {name}")
        self.loads: dict[LoadKey, asyncio.Task[bytes | None]] = {}

    async def get(self, key: str, load: Load) -> bytes | None:
        """Return the cached value, or load it and cache it. None is not cached.

        Concurrent readers of one process share a load.
        """
        names = self._names(key)
        found: Any = await self.fail_open.call_if_available(lambda: self.redis.mget(names))
        if found is None:
            self._count("unavailable")
            loaded = await load()
            return None if loaded is None else loaded[0]
        value, fence = found
        if value is not None:
            self._count("hit")
            return bytes(value)
        self._count("miss")
        # A reader that has seen a newer fence must not get a value loaded before it.
        return await self._shared_load((key, fence or b""), load)

    async def delete(self, key: str) -> bool:
        """Delete a value; return whether Redis confirmed it. Call it after the commit."""
        value_name, fence_name = self._names(key)
        commands: Any = self.redis.pipeline(transaction=False)
        commands.set(fence_name, secrets.token_hex(8), ex=FENCE_SECONDS)
        commands.delete(value_name)
        return await self.fail_open.call(commands.execute) is not None

    def _names(self, key: str) -> tuple[str, str]:
        """Return the names of the value and of its fence."""
        # Redis Cluster hashes the part in braces only, so that both are on one node.
        tag = "{" + f"{self.name}:{key}" + "}"
        return self.redis.key(f"cache:{tag}"), self.redis.key(f"fence:{tag}")

    async def _shared_load(self, load_key: LoadKey, load: Load) -> bytes | None:
        """Wait for the load in progress, or start one."""
        task = self.loads.get(load_key)
        if task is None:
            task = asyncio.create_task(self._load(load_key, load))
            self.loads[load_key] = task
            task.add_done_callback(lambda done: self._load_finished(load_key, done))
        # A reader that is cancelled does not cancel the load of the others.
        return await asyncio.shield(task)

    async def _load(self, load_key: LoadKey, load: Load) -> bytes | None:
        """Load and store a value."""
        loaded = await load()
        if loaded is None:
            return None
        value, seconds = loaded
        # Up to a tenth less, so that values stored together do not all expire together.
        milliseconds = int(seconds * random.uniform(900, 1000))  # noqa: S311
        key, fence = load_key
        arguments: list[bytes | int] = [value, milliseconds, fence]
        await self.storing.call_if_available(
            lambda: self.script(keys=self._names(key), args=arguments)
        )
        return value

    def _load_finished(self, load_key: LoadKey, load: asyncio.Task[bytes | None]) -> None:
        del self.loads[load_key]
        if not load.cancelled():
            load.exception()  # retrieved, or asyncio would log it when every reader is cancelled

    def _count(self, result: str) -> None:
        _READS.labels(self.name, result).inc()
