"""A stream consumer: bounded concurrency, and a shutdown that loses no message."""

import asyncio
import contextlib
import contextvars
import logging
import time
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
#: Messages are read ahead that are likely to start within this time: no place waits for a read, and
#: no message waits here for long while another consumer has a free place.
AHEAD_SECONDS = 0.03
#: The weight of a message's duration in the average.
DURATION_WEIGHT = 1 / 8
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
#: Returns up to a number of messages.
Source = Callable[[int], Awaitable[list[Message]]]
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
        #: Messages that are being handled, each in a place.
        self.handling = 0
        #: Messages in progress, by entry: those, and those that are being acknowledged.
        self.in_progress: dict[bytes, asyncio.Task[None]] = {}
        #: Messages read ahead, by entry; the first one starts first.
        self.waiting: dict[bytes, Message] = {}
        #: The average duration of a message: a second until that is known.
        self.average_seconds = 1.0
        #: Held while messages are kept alive.
        self.keeping_alive = asyncio.Lock()
        #: Set while a read is worth it.
        self.has_room = asyncio.Event()
        self.sources: list[Source] = [self.group.read, self.group.reclaim]

    async def run(self, grace_seconds: float) -> None:
        """Consume until stopped, then finish the messages in progress.

        Time limit for these: `grace_seconds`. Messages that take longer are cancelled, and left to
        other consumers, as are those that have not started.
        """
        async with self.group.reader, background_task(self._heartbeat()):
            await self._consume()
            await self._give_back()
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
        """Read and start messages, then pause. Create the group if Redis does not have it."""
        if self.is_ready and not await self.is_ready():
            msg = "this process is not ready"
            raise NotReadyError(msg)
        try:
            found = await self._read()
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self.handler.on_group_missing()
            await self.group.create()
        else:
            await self._pause(found)

    async def _read(self) -> int:
        """Read as many messages as there is room for; return how many."""
        found = 0
        # New and idle messages take turns, so that neither waits until the other has no more.
        self.sources.reverse()
        for source in self.sources:
            room = self._room()
            if room > 0:
                messages = await source(room)
                found += self._receive(messages)
        return found

    def _room(self) -> int:
        """Return how many messages may be read: for free places, and ahead."""
        return self.concurrency + self._ahead() - self.handling - len(self.waiting)

    def _ahead(self) -> int:
        """Return how many messages start within `AHEAD_SECONDS`, at most one for each place."""
        expected = self.concurrency * AHEAD_SECONDS / self.average_seconds
        return min(int(expected), self.concurrency)

    def _receive(self, messages: list[Message]) -> int:
        """Start messages, or let them wait for a place; return how many are new.

        A consumer reclaims its own messages when its heartbeat is late.
        """
        known = self.in_progress.keys() | self.waiting.keys()
        new = {each.entry: each for each in messages if each.entry not in known}
        self.waiting |= new
        self._start()
        return len(new)

    def _start(self) -> None:
        """Start messages that wait, as long as there are free places."""
        while self.waiting and self.handling < self.concurrency and not self.is_stopping:
            message = self.waiting.pop(next(iter(self.waiting)))
            self.handling += 1
            release = partial(self._release, time.monotonic())
            work = self.handler.serve(message, release)
            # An empty context, and not that of the message whose place this is.
            task = asyncio.create_task(work, context=contextvars.Context())
            self.in_progress[message.entry] = task
            task.add_done_callback(partial(self._forget, message.entry))
        # For half of those read ahead, so that a read fetches several messages.
        if self._room() > self._ahead() // 2:
            self.has_room.set()
        else:
            self.has_room.clear()

    def _release(self, start: float) -> None:
        """Give the place of a message that is handled to the next one."""
        self.handling -= 1
        seconds = time.monotonic() - start
        self.average_seconds += (seconds - self.average_seconds) * DURATION_WEIGHT
        self._start()

    def _forget(self, entry: bytes, _: asyncio.Task[None]) -> None:
        del self.in_progress[entry]

    async def _pause(self, found: int) -> None:
        """Wait for room, or for messages if none was found."""
        if self.has_room.is_set() and found == 0:
            await asyncio.sleep(POLL_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT_SECONDS):
                await self.has_room.wait()

    async def _give_back(self) -> None:
        """Let other consumers have the messages that have not started."""
        entries = list(self.waiting)
        self.waiting.clear()
        # A keep-alive that is on its way would reset their idle time once more.
        async with self.keeping_alive:
            with contextlib.suppress(RedisError, OSError):
                await self.group.give_back(entries)

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
                async with self.keeping_alive:
                    entries = [*self.in_progress, *self.waiting]
                    await run_to_completion(self.group.keep_alive(entries))
                waiting = await run_to_completion(self.group.waiting())
                for state, number in waiting.messages.items():
                    _WAITING.labels(self.group.name, state).set(number)
                _LAG.labels(self.group.name).set(waiting.lag_seconds)
