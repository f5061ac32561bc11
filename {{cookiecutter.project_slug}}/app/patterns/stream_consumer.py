"""A consumer: takes messages of a group as it has room for them, so many at once, and ends without losing one."""

import asyncio
import contextlib
import logging
from functools import partial

from prometheus_client import Gauge
from redis.exceptions import RedisError, ResponseError

from app.patterns.stream_handler import StreamHandler
from app.tasks import background_task, run_to_completion

BEAT_SECONDS, POLL_SECONDS, PAUSE_SECONDS = 1.0, 0.1, 1.0
_WAITING = Gauge(
    "stream_messages_waiting", "Messages by state: unread, or pending.", ["stream", "state"]
)
logger = logging.getLogger("app.stream")


class StreamConsumer:
    """Has up to `concurrency` messages under way at once, until `is_stopping` is set."""

    def __init__(self, handler: StreamHandler, concurrency: int) -> None:
        self.handler, self.group, self.concurrency, self.is_stopping = (
            handler,
            handler.group,
            concurrency,
            False,
        )
        self.under_way: dict[bytes, asyncio.Task[None]] = {}
        self.sources = [self.group.read, self.group.reclaim]

    async def run(self, grace_seconds: float) -> None:
        """Work. At the end, finish what is under way, and leave to others what takes longer."""
        async with background_task(self._beat()):
            is_away = False
            while not self.is_stopping:
                try:
                    await self._take()
                    if is_away:
                        logger.info("messages are taken again")
                    is_away = False
                except Exception as error:  # noqa: BLE001 - whatever it is, it goes on when that is mended
                    if not is_away:
                        logger.warning("no messages: %r", error)
                    is_away = True
                    await asyncio.sleep(PAUSE_SECONDS)
            for seconds in (grace_seconds, 1):
                if self.under_way:
                    _, late = await asyncio.wait(self.under_way.values(), timeout=seconds)
                    for task in late:
                        task.cancel()

    async def _take(self) -> None:
        """Start with messages as far as there is room; wait a little where there is none, or no message."""
        found = 0
        self.sources.reverse()  # by turns: neither has to wait until the other has no more
        for source in self.sources:
            if room := self.concurrency - len(self.under_way):
                try:
                    messages = await source(room)
                except ResponseError as error:
                    if not str(error).startswith("NOGROUP"):
                        raise
                    await (
                        self.handler.on_group_created()
                    )  # Redis has lost its memory, or never had it
                    await self.group.create()
                    return
                for message in messages:
                    if message.entry not in self.under_way:
                        found += 1
                        task = self.under_way[message.entry] = asyncio.create_task(
                            self.handler.serve(message)
                        )
                        task.add_done_callback(partial(self._finish, message.entry))
        if len(self.under_way) == self.concurrency:
            await asyncio.wait(
                self.under_way.values(), timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        elif not found:
            await asyncio.sleep(POLL_SECONDS)

    def _finish(self, entry: bytes, _: asyncio.Task[None]) -> None:
        del self.under_way[entry]

    async def _beat(self) -> None:
        """Tell the others what is under way, and count what is not, until cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with contextlib.suppress(RedisError, OSError):
                await run_to_completion(self.group.keep_alive(self.under_way))
                for state, number in (await run_to_completion(self.group.waiting())).items():
                    _WAITING.labels(self.group.stream, state).set(number)
