"""Work that goes on behind an answer. The end of the process waits for it, as long as there is time."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Self

from fastapi import Depends, Request

logger = logging.getLogger("app.background")


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
        while left and self.seconds_left() > 0:  # in steps, since the end may become a quick one meanwhile
            done, left = await asyncio.wait(left, timeout=0.1)
            finished += len(done)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1)
        level = logging.WARNING if left else logging.INFO
        logger.log(level, "%d tasks finished, %d cancelled", finished, len(left))


async def _background(request: Request) -> Background:
    background: Background = request.state.background
    return background


#: The type of a route's parameter: `async def route(background: BackgroundDependency)`.
BackgroundDependency = Annotated[Background, Depends(_background)]
