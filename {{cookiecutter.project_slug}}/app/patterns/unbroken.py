"""A step that is not cut off in the middle: what is cancelled while it connects or commits leaves loose ends."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def unbroken(step: Awaitable[Result]) -> Result:
    """Await a step of a loop. A cancellation takes effect when the step has ended; a second one, at once."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen
        raise
