"""A group of consumers on a Redis stream: what one of them takes and does not finish, another one takes again.

A message is pending until it is acknowledged. Who handles it sets its idle time back now and then; what is idle for
`RECLAIM_SECONDS` has failed, or its consumer has died. All consumers have one name: those of the dead would pile up.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import ResponseError

RECLAIM_SECONDS, SCAN_SECONDS, MAX_DEAD = 5.0, 1.0, 100_000


class Message(NamedTuple):
    """An entry of a stream."""

    entry: bytes
    fields: dict[bytes, bytes]


class StreamGroup:
    """The group on the stream; its dead-letter stream is called `<stream>.dead`."""

    def __init__(self, redis: Redis, stream: str, group: str) -> None:
        self.redis: Any = redis  # its types say less than its documentation
        self.stream, self.group = stream, group
        self.cursor, self.scan_at = b"0-0", 0.0

    async def create(self) -> None:
        """Make the group, from the beginning of the stream, unless it is there."""
        try:
            await self.redis.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        else:  # no other consumer was quicker
            logging.getLogger("app.stream").warning(
                "%s had no group %s, and has one now", self.stream, self.group
            )

    async def read(self, room: int) -> list[Message]:
        """Take up to `room` messages that nobody has taken yet. Raises `ResponseError` without a group."""
        answer = await self.redis.xreadgroup(self.group, self.group, {self.stream: ">"}, count=room)
        return [Message(*entry) for _, entries in answer for entry in entries]

    async def reclaim(self, room: int) -> list[Message]:
        """Take up to `room` messages that are idle, looking through all once in `SCAN_SECONDS`. Raises as `read`."""
        if time.monotonic() < self.scan_at:
            return []
        idle = int(RECLAIM_SECONDS * 1000)
        answer = await self.redis.xautoclaim(
            self.stream, self.group, self.group, idle, self.cursor, room
        )
        self.cursor, entries, *_ = answer
        if self.cursor == b"0-0":
            self.scan_at = time.monotonic() + SCAN_SECONDS
        return [Message(*entry) for entry in entries]

    async def keep_alive(self, entries: Iterable[bytes]) -> None:
        """Tell the others that these are being handled."""
        if found := list(entries):
            await self.redis.xclaim(self.stream, self.group, self.group, 0, found, justid=True)

    async def acknowledge(self, message: Message) -> None:
        """Acknowledge a message."""
        await self.redis.xack(self.stream, self.group, message.entry)

    async def dead_letter(self, message: Message, reason: str) -> None:
        """Move a message to the dead-letter stream, where an operator finds it with the reason."""
        dead = message.fields | {b"reason": reason.encode(), b"entry": message.entry}
        await self.redis.xadd(
            f"{self.stream}.dead", dead, maxlen=MAX_DEAD
        )  # rather twice than never
        await self.acknowledge(message)

    async def waiting(self) -> dict[str, float]:
        """Return how many messages are `unread`, NaN where Redis does not know, and how many `pending`."""
        groups = {group["name"]: group for group in await self.redis.xinfo_groups(self.stream)}
        group = groups.get(self.group.encode(), {})
        lag = group.get("lag")
        return {
            "unread": float("nan") if lag is None else lag,
            "pending": group.get("pending") or 0,
        }
