"""Background tasks: of a request, of the process; and what their loops are built of."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Annotated, Any, Self, TypeVar

from fastapi import Depends, Request

#: How often shutdown looks whether its deadline has changed: a second signal makes it a quick one.
POLL_SECONDS = 0.1
#: Time limit for a cancelled task to end.
CANCEL_SECONDS = 1.0
#: A cause that has not occurred for this time is logged again.
QUIET_SECONDS = 60.0
#: Causes that are remembered, and characters of a message that are logged.
MAX_CAUSES = 100
MAX_MESSAGE = 300
Result = TypeVar("Result")
request_task_logger = logging.getLogger("app.background")
process_task_logger = logging.getLogger("app.lifespan")


class Background:
    """Tasks that requests have started; shutdown waits for them until its deadline.

    Work that must survive a crash belongs in the database, not here.
    """

    def __init__(self, seconds_left: Callable[[], float]) -> None:
        """`seconds_left` returns, during shutdown, how long the tasks may still run."""
        self.seconds_left = seconds_left
        self.tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine in the background. An exception in it is logged, never raised."""
        task = asyncio.create_task(work, name=_name(work))
        self.tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        _log_failure(request_task_logger, task)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for the tasks until the deadline, then cancel the rest."""
        if not self.tasks:
            return
        running = set(self.tasks)
        request_task_logger.info("waiting for %d background tasks", len(running))
        finished = 0
        while running and self.seconds_left() > 0:
            done, running = await asyncio.wait(running, timeout=POLL_SECONDS)
            finished += len(done)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=CANCEL_SECONDS)
        level = logging.WARNING if running else logging.INFO
        message = "%d background tasks finished, %d cancelled"
        request_task_logger.log(level, message, finished, len(running))


@contextlib.asynccontextmanager
async def background_task(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine for the duration of the block, then cancel it and wait for its end.

    An exception in it is logged, never raised.
    """
    task = asyncio.create_task(work, name=_name(work))
    task.add_done_callback(lambda done: _log_failure(process_task_logger, done))
    try:
        yield
    finally:
        # Repeated, since Python 3.11's wait_for, which redis-py uses, can lose a cancellation.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=CANCEL_SECONDS)


def _name(work: Coroutine[Any, Any, Any]) -> str:
    """Return the name of a coroutine's function, for the log."""
    return getattr(work, "__qualname__", type(work).__name__)


def _log_failure(logger: logging.Logger, task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()):
        extra = {"task": task.get_name()}
        logger.error("background task failed", exc_info=error, extra=extra)


async def run_to_completion(step: Awaitable[Result]) -> Result:
    """Run one step to completion: a cancellation takes effect after it.

    A cancellation during a connect or a commit would leave a connection in an unknown state. A
    second cancellation takes effect at once.
    """
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio would log it
        raise


class StateLog:
    """Logs a failing state once per cause, and once when it ends.

    A loop that fails ten times a second during an outage writes a few lines, not hundreds.
    """

    def __init__(self, logger: logging.Logger, failure: str, recovery: str) -> None:
        """`failure` and `recovery` are stable texts, such as "redis unavailable"."""
        self.logger = logger
        self.failure = failure
        self.recovery = recovery
        self.is_failing = False
        #: The causes that were logged since the state began.
        self.causes: set[str] = set()

    def failed(self, reason: str, /, **extra: object) -> None:
        """Log a warning with the reason, unless one of this cause was logged since the state began.

        The first word of the reason is the cause. The others may differ each time.
        """
        cause = reason.partition(" ")[0].rstrip(":")
        if cause not in self.causes:
            self.logger.warning("%s: %s", self.failure, reason, extra=extra)
        self.causes.add(cause)
        self.is_failing = True

    def succeeded(self, **extra: object) -> None:
        """Log the recovery, if it was failing."""
        if self.is_failing:
            self.logger.info(self.recovery, extra=extra)
            self.causes.clear()
        self.is_failing = False


def describe(error: BaseException) -> str:
    """Return class and message of a client's error, for the log.

    Of an error that Redis has sent: its code, such as READONLY, and its message. Without the
    details, which may quote a row, and without a command's arguments.
    """
    message = _without_arguments(str(error).partition("\n")[0])[:MAX_MESSAGE]
    name = type(error).__name__
    code = getattr(error, "status_code", None)
    if isinstance(code, str):
        return f"{code} {message}"
    if name == "ResponseError":  # the message begins with the code
        return message
    return f"{name}: {message}" if message else name


def _without_arguments(message: str) -> str:
    """Return a message of redis-py or Redis without the command that caused it."""
    _, in_pipeline, cause = message.rpartition("of pipeline caused error: ")
    if in_pipeline:
        cause = cause.strip("('\",)")
    return cause.partition("with args beginning with")[0].rstrip(", ")


class RecentCauses:
    """The causes of failures that occurred in the last minute, so that each is logged once."""

    def __init__(self) -> None:
        self.seen_at: dict[str, float] = {}

    def is_new(self, cause: str) -> bool:
        """Note a cause; return whether it has not occurred for a minute."""
        now = time.monotonic()
        is_new = now - self.seen_at.get(cause, float("-inf")) > QUIET_SECONDS
        if len(self.seen_at) >= MAX_CAUSES:
            self.seen_at.clear()
        self.seen_at[cause] = now
        return is_new


async def _background(request: Request) -> Background:
    background: Background = request.state.background
    return background


#: The type of a route's parameter: `async def route(background: BackgroundDependency)`.
BackgroundDependency = Annotated[Background, Depends(_background)]
