"""A consumer group on a Redis stream: unfinished messages go to another consumer.

A message is pending until it is acknowledged. Its consumer resets its idle time at intervals. A
message that is idle for `RECLAIM_SECONDS` has failed, or its consumer has died. All consumers share
one name: the names of dead ones would accumulate.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from redis.exceptions import RedisError, ResponseError

if TYPE_CHECKING:
    from app.storage.redis import RedisClient


#: Retries of a read after a lost connection, as of any command.
READ_RETRIES = 3
#: Idle time after which a message is redelivered.
RECLAIM_SECONDS = 5.0
#: Time limit of a read. It doubles with each read that fails, of half as many messages, since these
#: may be large and the link slow.
READ_SECONDS = 0.5
MAX_DOUBLINGS = 5
#: Pause between two scans of all pending messages.
SCAN_SECONDS = 1.0
#: Approximate length of the dead-letter stream.
MAX_DEAD_LETTERS = 100_000
_START = b"0-0"
logger = logging.getLogger("app.stream")


class Message(NamedTuple):
    """An entry of a stream."""

    entry: bytes
    fields: dict[bytes, bytes]


class Waiting(NamedTuple):
    """The messages that wait."""

    #: By state: `unread` (NaN if Redis cannot report it), `pending`, `dead_lettered`.
    messages: dict[str, float]
    #: The age of the oldest message that is unread or pending, in seconds.
    lag_seconds: float


class StreamGroup:
    """The group on a stream. Its dead-letter stream is called `<stream>.dead`.

    In Redis the names begin with the key prefix of this service. `publisher` is the prefix of
    another service, whose stream this one reads with a group of its own.
    """

    def __init__(self, redis: "RedisClient", stream: str, group: str, publisher: str = "") -> None:
        # The annotations of redis-py are less precise than its documentation.
        self.redis: Any = redis
        #: For reads. Close it, or use `async with`.
        self.reader: Any = redis.unhurried(READ_RETRIES)
        self.failed_reads = 0
        #: The name without the prefix, for metrics.
        self.name = stream
        self.stream = f"{publisher}:{stream}" if publisher else redis.key(stream)
        self.dead_letters = redis.key(f"{stream}.dead")
        self.group = redis.key(group)
        self.scan_cursor = _START
        self.next_scan_at = 0.0
        #: Entries of handled messages, and the futures of the tasks that wait.
        self.unacknowledged: list[tuple[bytes, asyncio.Future[None]]] = []
        self.acknowledging: asyncio.Task[None] | None = None

    async def create(self) -> None:
        """Create the group at the beginning of the stream, unless it exists."""
        try:
            await self.redis.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except ResponseError as error:
            # Another consumer may have created it first.
            if not str(error).startswith("BUSYGROUP"):
                raise
        else:
            logger.warning("consumer group created: %s on stream %s", self.group, self.stream)

    async def read(self, count: int) -> list[Message]:
        """Return up to `count` new messages. Raises `ResponseError` if there is no group."""
        streams = {self.stream: ">"}
        found = await self._fetch(
            count, lambda up_to: self.reader.xreadgroup(self.group, self.group, streams, up_to)
        )
        return [Message(*entry) for _, entries in found for entry in entries]

    async def reclaim(self, count: int) -> list[Message]:
        """Return up to `count` idle messages. Raises `ResponseError` if there is no group.

        Pauses for `SCAN_SECONDS` after each scan of all pending messages.
        """
        if time.monotonic() < self.next_scan_at:
            return []
        idle_ms = int(RECLAIM_SECONDS * 1000)
        self.scan_cursor, entries, *_ = await self._fetch(
            count,
            lambda up_to: self.reader.xautoclaim(
                self.stream, self.group, self.group, idle_ms, self.scan_cursor, up_to
            ),
        )
        if self.scan_cursor == _START:
            self.next_scan_at = time.monotonic() + SCAN_SECONDS
        return [Message(*entry) for entry in entries]

    async def _fetch(self, count: int, command: Callable[[int], Awaitable[Any]]) -> Any:
        """Return the response to a command that returns up to a number of messages."""
        if self.failed_reads:
            # A server that hangs is not worth a long wait.
            await self.redis.ping()
        try:
            async with asyncio.timeout(READ_SECONDS * 2**self.failed_reads):
                found = await command(max(1, count >> self.failed_reads))
        except ResponseError:
            raise
        except (RedisError, OSError):
            self.failed_reads = min(self.failed_reads + 1, MAX_DOUBLINGS)
            raise
        self.failed_reads = max(0, self.failed_reads - 1)
        return found

    async def keep_alive(self, entries: list[bytes]) -> None:
        """Reset the idle time of messages that are handled here: no other consumer claims them."""
        if entries:
            await self.redis.xclaim(self.stream, self.group, self.group, 0, entries, justid=True)

    async def give_back(self, entries: list[bytes]) -> None:
        """Let another consumer reclaim messages at once."""
        if entries:
            idle_ms = int(RECLAIM_SECONDS * 1000)
            await self.redis.xclaim(
                self.stream, self.group, self.group, 0, entries, idle=idle_ms, justid=True
            )

    async def acknowledge(self, message: Message) -> None:
        """Acknowledge a message: it is not delivered again.

        Messages that end while a command is on its way are acknowledged together by the next one.
        They stay in the stream, for the groups of other services; its length is limited.
        """
        acknowledged = asyncio.get_running_loop().create_future()
        self.unacknowledged.append((message.entry, acknowledged))
        if self.acknowledging is None:
            # An empty context: its commands belong to no single message.
            empty = contextvars.Context()
            self.acknowledging = asyncio.create_task(self._acknowledge_all(), context=empty)
        await acknowledged

    async def _acknowledge_all(self) -> None:
        """Acknowledge messages until none is left. An error is raised in all that wait for it."""
        while self.unacknowledged:
            batch = self.unacknowledged
            self.unacknowledged = []
            entries = [entry for entry, _ in batch]
            error: Exception | None = None
            try:
                await self.redis.xack(self.stream, self.group, *entries)
            except Exception as failure:  # noqa: BLE001 - raised by `acknowledge`
                error = failure
            for _, acknowledged in batch:
                _conclude(acknowledged, error)
        self.acknowledging = None

    async def dead_letter(self, message: Message, reason: str) -> None:
        """Move a message to the dead-letter stream, with the reason for operators.

        A crash in between leaves it in both, which is better than in none.
        """
        fields = message.fields | {b"reason": reason.encode(), b"entry": message.entry}
        await self.redis.xadd(self.dead_letters, fields, maxlen=MAX_DEAD_LETTERS)
        await self.acknowledge(message)

    async def waiting(self) -> Waiting:
        """Return the messages that wait, by state, and the age of the oldest one."""
        groups = await self.redis.xinfo_groups(self.stream)
        by_name = {group["name"]: group for group in groups}
        group = by_name.get(self.group.encode(), {})
        unread = group.get("lag")
        messages = {
            "unread": float("nan") if unread is None else unread,
            "pending": group.get("pending") or 0,
            "dead_lettered": await self.redis.xlen(self.dead_letters),
        }
        oldest = await self._oldest(group)
        age = time.time() - _milliseconds(oldest) / 1000 if oldest else 0
        return Waiting(messages, max(age, 0))

    async def _oldest(self, group: dict[str, Any]) -> bytes | None:
        """Return the oldest entry that is not handled: pending, or else unread."""
        if group.get("pending"):
            pending = await self.redis.xpending(self.stream, self.group)
            if pending["min"]:
                return bytes(pending["min"])
        # "(" excludes the entry itself.
        after = b"(" + group.get("last-delivered-id", b"0-0")
        entries = await self.redis.xrange(self.stream, min=after, count=1)
        return bytes(entries[0][0]) if entries else None


def _conclude(waiting: asyncio.Future[None], error: Exception | None) -> None:
    """End the wait of a task, which may have been cancelled meanwhile."""
    if waiting.done():
        return
    if error is None:
        waiting.set_result(None)
    else:
        waiting.set_exception(error)


def _milliseconds(entry: bytes) -> int:
    """Return when an entry was added, in milliseconds since 1970: the first part of its ID."""
    return int(entry.partition(b"-")[0])
