"""A stream consumer: bounded concurrency, and a shutdown that loses no message."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from prometheus_client import Gauge
from redis.exceptions import RedisError, ResponseError

from app.patterns.stream_group import Message
from app.patterns.stream_handler import StreamHandler
from app.tasks import StateLog, background_task, describe, run_to_completion

#: Interval at which the messages in progress are kept alive.
BEAT_SECONDS = 1.0
#: Pause after a read that has found no message.
POLL_SECONDS = 0.1
#: Maximum wait of a free place for further ones, so that a read fetches several messages.
GATHER_SECONDS = 0.002
#: Pause after a read that has failed.
PAUSE_SECONDS = 1.0
#: Time limit for a cancelled message to end.
CANCEL_SECONDS = 1.0
_WAITING = Gauge(
    "stream_messages_waiting",
    "Messages by state: unread, pending, or dead_lettered.",
    ["stream", "state"],
)
_LAG = Gauge(
    "stream_lag_seconds", "Age of the oldest message that is unread or pending.", ["stream"]
)
IsReady = Callable[[], Awaitable[bool]]
logger = logging.getLogger("app.stream")


class NotReadyError(Exception):
    """A dependency of this process does not respond."""


class StreamConsumer:
    """Handles up to `concurrency` messages at once, until `is_stopping` is set."""

    def __init__(
        self, handler: StreamHandler, concurrency: int, is_ready: IsReady | None = None
    ) -> None:
        """While `is_ready` returns False, no message is read: it would only fail here."""
        self.is_ready = is_ready
        self.handler = handler
        self.group = handler.group
        self.concurrency = concurrency
        self.is_stopping = False
        #: Messages in progress, by entry.
        self.in_progress: dict[bytes, asyncio.Task[None]] = {}
        #: Set while at least half of the places are free.
        self.is_half_free = asyncio.Event()
        self.sources = [self.group.read, self.group.reclaim]

    async def run(self, grace_seconds: float) -> None:
        """Consume until stopped, then finish the messages in progress.

        Time limit for these: `grace_seconds`. Messages that take longer are cancelled, and left to
        other consumers.
        """
        async with self.group.reader, background_task(self._heartbeat()):
            await self._consume()
            await self._finish(grace_seconds)

    async def _consume(self) -> None:
        """Read and start messages until stopped; outages only delay them."""
        state = StateLog(logger, "cannot read stream", "stream reads resumed")
        while not self.is_stopping:
            try:
                await self._fill()
            except Exception as error:  # noqa: BLE001 - the consumer outlives every error
                state.failed(describe(error))
                await asyncio.sleep(PAUSE_SECONDS)
            else:
                state.succeeded()

    async def _fill(self) -> None:
        """Start messages, then pause. Create the group if Redis does not have it."""
        if self.is_ready and not await self.is_ready():
            msg = "this process is not ready"
            raise NotReadyError(msg)
        try:
            started = await self._start_messages()
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self.handler.on_group_missing()
            await self.group.create()
        else:
            await self._pause(started)

    async def _start_messages(self) -> int:
        """Start as many messages as there is room for; return how many."""
        started = 0
        # New and idle messages take turns, so that neither waits until the other has no more.
        self.sources.reverse()
        for source in self.sources:
            room = self.concurrency - len(self.in_progress)
            if room > 0:
                messages = await source(room)
                started += self._start(messages)
        return started

    def _start(self, messages: list[Message]) -> int:
        """Start those that are not in progress already; return how many.

        A consumer reclaims its own messages when its heartbeat is late.
        """
        new = [message for message in messages if message.entry not in self.in_progress]
        for message in new:
            task = asyncio.create_task(self.handler.serve(message))
            self.in_progress[message.entry] = task
            task.add_done_callback(partial(self._forget, message.entry))
        self._note_places()
        return len(new)

    def _forget(self, entry: bytes, _: asyncio.Task[None]) -> None:
        del self.in_progress[entry]
        self._note_places()

    def _note_places(self) -> None:
        if 2 * len(self.in_progress) <= self.concurrency:
            self.is_half_free.set()
        else:
            self.is_half_free.clear()

    async def _pause(self, started: int) -> None:
        """Wait for places if none is free, or for messages if none was found."""
        if len(self.in_progress) == self.concurrency:
            tasks = self.in_progress.values()
            await asyncio.wait(tasks, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            await self._gather_places()
        elif started == 0:
            await asyncio.sleep(POLL_SECONDS)

    async def _gather_places(self) -> None:
        """Wait until half of the places are free, but not long: one message may take seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHER_SECONDS):
                await self.is_half_free.wait()

    async def _finish(self, grace_seconds: float) -> None:
        """Wait for the messages in progress, then cancel the rest and wait for these."""
        for seconds in (grace_seconds, CANCEL_SECONDS):
            if self.in_progress:
                tasks = self.in_progress.values()
                _, unfinished = await asyncio.wait(tasks, timeout=seconds)
                for task in unfinished:
                    task.cancel()
        if self.group.acknowledging:
            await self.group.acknowledging

    async def _heartbeat(self) -> None:
        """Keep the messages in progress alive, and count the others, until cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with contextlib.suppress(RedisError, OSError):
                await run_to_completion(self.group.keep_alive(self.in_progress))
                waiting = await run_to_completion(self.group.waiting())
                for state, number in waiting.messages.items():
                    _WAITING.labels(self.group.name, state).set(number)
                _LAG.labels(self.group.name).set(waiting.lag_seconds)
