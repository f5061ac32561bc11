"""Commands to a Redis that its callers can do without: while it is away, one of them in a second waits a little."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError

COOL_DOWN_SECONDS = 1.0
Result = TypeVar("Result")


class FailOpen:
    """Asks Redis for at most `budget_seconds`."""

    def __init__(self, budget_seconds: float) -> None:
        self.budget_seconds = budget_seconds
        self.away_until = 0.0

    async def call_if_available(self, command: Callable[[], Awaitable[Result]]) -> Result | None:
        """Return the answer, or None: in time, and at once while Redis is known to be away."""
        now = time.monotonic()
        if now < self.away_until:
            return None
        if (
            self.away_until
        ):  # this caller looks whether it is back; those who come meanwhile do not wait with it
            self.away_until = now + COOL_DOWN_SECONDS
        answer = await self.call(command)
        self.away_until = time.monotonic() + COOL_DOWN_SECONDS if answer is None else 0.0
        return answer

    async def call(self, command: Callable[[], Awaitable[Result]]) -> Result | None:
        """Return the answer, or None if there is none in time; it asks in any case."""
        try:
            async with asyncio.timeout(self.budget_seconds):
                return await command()
        except (RedisError, OSError, TimeoutError):
            return None
