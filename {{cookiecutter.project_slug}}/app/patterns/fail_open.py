"""Optional Redis commands: during an outage callers continue without Redis.

One caller a second checks whether Redis responds again; it waits for a bounded time, the others not
at all. Commands that Redis rejects are logged, once per cause.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError, ResponseError

from app.storage.redis import server_code
from app.tasks import StateLog, describe

COOL_DOWN_SECONDS = 1.0
Result = TypeVar("Result")
logger = logging.getLogger("app.redis")


class FailOpen:
    """Calls Redis for at most `budget_seconds`. `user` names the caller in the log."""

    def __init__(self, budget_seconds: float, user: str = "optional commands") -> None:
        self.budget_seconds = budget_seconds
        self.state = StateLog(logger, f"redis rejects {user}", f"redis accepts {user} again")
        #: Until then Redis is not called, by `time.monotonic()`. Zero while it responds.
        self.unavailable_until = 0.0

    async def call_if_available(self, command: Callable[[], Awaitable[Result]]) -> Result | None:
        """Return the result, or None if Redis does not respond in time.

        Returns None at once while Redis is known to be unavailable.
        """
        now = time.monotonic()
        if now < self.unavailable_until:
            return None
        if self.unavailable_until:
            # This caller checks whether Redis responds again; the next ones do not wait with it.
            self.unavailable_until = now + COOL_DOWN_SECONDS
        result = await self.call(command)
        if result is None:
            self.unavailable_until = time.monotonic() + COOL_DOWN_SECONDS
        else:
            self.unavailable_until = 0.0
        return result

    async def call(self, command: Callable[[], Awaitable[Result]]) -> Result | None:
        """Call Redis in any case. Return None if it does not respond in time."""
        try:
            async with asyncio.timeout(self.budget_seconds):
                result = await command()
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, ResponseError) or server_code(error):
                self.state.failed(describe(error))
            return None
        self.state.succeeded()
        return result
