"""Server-sent events: a stream that ends when its worker does, and goes on in another.

FastAPI formats the events, sends a comment after 15 s of silence, and cancels the route when the
client disconnects. `event_stream` adds what needs the server: clients reconnect when a worker
retires, at different times, and say which event they received last (HTML, section 9.2).

    @router.get("/changes", response_class=EventSourceResponse)
    async def changes(last_event_id: LastEventId = None) -> AsyncIterator[ServerSentEvent]:
        async for event in event_stream(read_changes(last_event_id)):
            yield event
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, TypeVar

from fastapi import Header
from fastapi.sse import ServerSentEvent

from app.lifecycle import PROCESS

#: The type of a route's parameter: the ID of the last event that the client has received.
LastEventId = Annotated[str | None, Header()]
#: After how many milliseconds clients reconnect. Each gets a time of its own, so that those of one
#: worker do not reconnect at once.
RETRY_MS = (1000, 5000)
Item = TypeVar("Item")


async def event_stream(
    events: AsyncGenerator[ServerSentEvent], retry_ms: tuple[int, int] = RETRY_MS
) -> AsyncIterator[ServerSentEvent]:
    """Yield when to reconnect, then the events until the worker retires."""
    yield ServerSentEvent(retry=random.randint(*retry_ms))  # noqa: S311 - not a secret
    async for event in until_retirement(events):
        yield event


async def until_retirement(items: AsyncGenerator[Item]) -> AsyncIterator[Item]:
    """Yield the items until the worker retires. Then the wait for the next one is cancelled.

    The generator is closed at the end. What it has yielded is delivered.
    """
    async with contextlib.aclosing(items):
        while not PROCESS.is_retiring:
            found = await _next_until_retirement(items)
            if not found:
                return
            yield found[0]


async def _next_until_retirement(items: AsyncGenerator[Item]) -> list[Item]:
    """Return the next item, or none at the end of the items or of the worker.

    The time limit is that of one item: a cancellation must not reach what runs between two.
    """
    limit = asyncio.timeout(None)
    now = asyncio.get_running_loop().time
    try:
        async with limit:
            with PROCESS.on_retirement(lambda: limit.reschedule(now())):
                return [await anext(items)]
    except StopAsyncIteration:
        return []
    except TimeoutError:
        if limit.expired():
            return []
        raise
