"""Cache-aside with a fence: what was read before a change is not stored after it, and so never served stale.

A reader that finds nothing loads the value, and stores it only if nobody has deleted the key since it looked. Who
changes something deletes its key after the commit. Plain cache-aside, aiocache and cashews all keep the old value in
that race. It fails open: while Redis is away, reads load, and one in a second waits for it a little.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, cast

from prometheus_client import Counter
from redis.asyncio import Redis

from app.patterns.fail_open import FailOpen

BUDGET_SECONDS = 0.1
FENCE_SECONDS = (
    120  # longer than any load takes, or it would not outlive the readers that looked before it
)
_STORE = """
    if (redis.call('GET', KEYS[2]) or '') ~= ARGV[3] then return 0 end
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    return 1
"""
_READS = Counter(
    "cache_reads", "Reads of the cache: a hit, a miss, or no answer of Redis.", ["cache", "result"]
)
#: Returns a value, and for how many seconds at most it may be kept; or None.
Load = Callable[[], Awaitable[tuple[bytes, float] | None]]


class Cache:
    """Bytes by key, each for a time, which bounds what a deletion that comes late can do."""

    def __init__(self, redis: Redis, name: str) -> None:
        self.redis, self.name = redis, name
        self.script = redis.register_script(_STORE)
        self.fail_open = FailOpen(BUDGET_SECONDS)
        self.loads: dict[tuple[str, bytes], asyncio.Task[bytes | None]] = {}

    async def get(self, key: str, load: Load) -> bytes | None:
        """Return the value, loaded if need be: once for all who ask at this time. None is not kept."""
        found: Any = await self.fail_open.call_if_available(
            lambda: self.redis.mget(self._names(key))
        )
        if found is None:
            _READS.labels(self.name, "unavailable").inc()
            loaded = await load()
            return loaded and loaded[0]
        value, fence = found
        _READS.labels(self.name, "miss" if value is None else "hit").inc()
        if value is not None:
            return bytes(value)
        load_key = (
            key,
            fence or b"",
        )  # who has seen another fence must not get what was loaded before it
        if (task := self.loads.get(load_key)) is None:
            task = self.loads[load_key] = asyncio.create_task(self._load(*load_key, load))
            task.add_done_callback(lambda done: self._load_finished(load_key, done))
        return await asyncio.shield(
            task
        )  # a caller that leaves does not take the others' value along

    async def delete(self, key: str) -> bool:
        """Forget a value, after the change of it is committed; return whether Redis has confirmed that."""
        (value, fence), both = self._names(key), cast("Any", self.redis.pipeline(transaction=False))
        both.set(fence, secrets.token_hex(8), ex=FENCE_SECONDS).delete(value)
        return await self.fail_open.call(both.execute) is not None

    def _names(self, key: str) -> tuple[str, str]:
        tag = (
            "{" + f"{self.name}:{key}" + "}"
        )  # in braces, so that both are on one node of a cluster
        return f"cache:{tag}", f"fence:{tag}"

    async def _load(self, key: str, fence: bytes, load: Load) -> bytes | None:
        if (loaded := await load()) is None:
            return None
        value, seconds = loaded
        milliseconds = int(seconds * random.uniform(900, 1000))  # noqa: S311 - so that not all end at once
        await self.fail_open.call(
            lambda: self.script(keys=self._names(key), args=[value, milliseconds, fence])
        )
        return value

    def _load_finished(self, load_key: tuple[str, bytes], load: asyncio.Task[bytes | None]) -> None:
        del self.loads[load_key]
        if not load.cancelled():
            load.exception()  # seen, also where all who asked have left
