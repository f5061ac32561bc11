"""Tasks beside the requests: those that a request starts, those that run as long as the process, and steps of both."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Annotated, Any, Self, TypeVar

from fastapi import Depends, Request

Result = TypeVar("Result")
logger = logging.getLogger("app.tasks")


class Background:
    """Tasks that requests have started. What must not be lost belongs in the database, not here: processes die."""

    def __init__(self, seconds_left: Callable[[], float]) -> None:
        """Take what says, at the end, how long the tasks may still run."""
        self.seconds_left = seconds_left
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine beside the requests; what it raises becomes a line in the log."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("background work failed", exc_info=error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for all tasks, then cancel those that are left."""
        if not self.tasks:
            return
        logger.info("waiting for %d tasks in the background", len(self.tasks))
        finished, left = 0, set(self.tasks)
        while (
            left and self.seconds_left() > 0
        ):  # in steps, since the end may become a quick one meanwhile
            done, left = await asyncio.wait(left, timeout=0.1)
            finished += len(done)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1)
        level = logging.WARNING if left else logging.INFO
        logger.log(level, "%d tasks finished, %d cancelled", finished, len(left))


@contextlib.asynccontextmanager
async def background_task(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something beside the requests; cancel it at the end."""
    task = asyncio.create_task(work)
    task.add_done_callback(_report)
    try:
        yield
    finally:
        while (
            not task.done()
        ):  # Python 3.11's wait_for, which redis-py uses, can lose a cancellation
            task.cancel()
            await asyncio.wait([task], timeout=1)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("what ran beside the requests has failed", exc_info=error)


async def run_to_completion(step: Awaitable[Result]) -> Result:
    """Await a step of a loop. A cancellation takes effect when the step has ended; a second one, at once."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen
        raise


async def _background(request: Request) -> Background:
    background: Background = request.state.background
    return background


#: The type of a route's parameter: `async def route(background: BackgroundDependency)`.
BackgroundDependency = Annotated[Background, Depends(_background)]
