"""Handling of one message: acknowledge it, retry it, or dead-letter it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from enum import StrEnum

import prometheus_client
from redis.exceptions import RedisError

from app.errors import UnavailableError
from app.patterns.stream_group import Message, StreamGroup
from app.telemetry import tracing

#: Failed attempts of one process after which a message is dead-lettered.
MAX_FAILURES = 5
#: Failing messages that a process remembers.
MAX_REMEMBERED = 10_000
#: Pause of a message whose dependency is unavailable. Without it, a consumer would run through all
#: waiting messages as fast as they fail.
LATER_SECONDS = 0.5
_HANDLED = prometheus_client.Counter(
    "stream_messages_handled",
    "Messages by outcome: done, later, failed, dead_lettered.",
    ["stream", "outcome"],
)
logger = logging.getLogger("app.stream")


class Outcome(StrEnum):
    """The outcome of an attempt, as in the metric."""

    DONE = "done"
    LATER = "later"
    FAILED = "failed"
    DEAD_LETTERED = "dead_lettered"


class PoisonError(Exception):
    """The message can never be handled, for the reason in the text."""


class RetryLaterError(Exception):
    """A dependency of the message is unavailable, which does not count as its failure."""


class StreamHandler:
    """Handles the messages of a group. Subclass it and implement `handle`."""

    def __init__(self, group: StreamGroup) -> None:
        self.group = group
        #: Failed attempts in this process, by message.
        self.failures = Counter[bytes]()
        # A counter that began with its first event would have no increase.
        for outcome in Outcome:
            _HANDLED.labels(group.name, outcome)

    async def handle(self, message: Message) -> None:
        """Apply a message, which may have been applied before.

        After any error but `PoisonError` it is redelivered, some seconds later.
        """
        raise NotImplementedError

    async def on_group_missing(self) -> None:
        """Prepare for the creation of the group: Redis may have lost messages."""

    async def on_poison(self, message: Message) -> None:
        """Note that a poison message is about to be dead-lettered.

        Not called for a message that failed too often: it may succeed once a bug is fixed.
        """

    async def serve(self, message: Message, release: Callable[[], None]) -> None:
        """Handle a message, then acknowledge or dead-letter it, as a span of its trace.

        Calls `release` in between: the next message can start. Raises nothing but a cancellation.
        """
        written = message.fields.get(b"traceparent", b"").decode(errors="replace")
        name = message.entry.decode()
        with tracing.handling("redis", self.group.name, name, written, self.group.group):
            try:
                outcome, error = await self._attempt(message)
            finally:
                release()
            await self._conclude(message, outcome, error)

    async def _conclude(self, message: Message, outcome: Outcome, error: Exception | None) -> None:
        if error:
            tracing.mark_failed(error)
        try:
            match outcome:
                case Outcome.DONE:
                    await self.group.acknowledge(message)
                case Outcome.DEAD_LETTERED:
                    await self._dead_letter(message, error)
        except (UnavailableError, RedisError, OSError):
            outcome = Outcome.LATER  # it is redelivered, and found done
        except Exception:
            outcome = Outcome.FAILED
            text = "message %s cannot be concluded, will retry"
            logger.exception(text, message.entry.decode())
        if outcome in {Outcome.DONE, Outcome.DEAD_LETTERED}:
            self.failures.pop(message.entry, None)
        _HANDLED.labels(self.group.name, outcome).inc()

    async def _attempt(self, message: Message) -> tuple[Outcome, Exception | None]:
        """Handle a message once; return the outcome, and the error if there was one."""
        try:
            await self.handle(message)
        except PoisonError as error:
            return Outcome.DEAD_LETTERED, error
        except (RetryLaterError, UnavailableError, RedisError) as error:
            await asyncio.sleep(LATER_SECONDS)
            return Outcome.LATER, error
        except Exception as error:
            logger.warning("message %s failed", message.entry.decode(), exc_info=error)
            is_last = self._count_failure(message) >= MAX_FAILURES
            return Outcome.DEAD_LETTERED if is_last else Outcome.FAILED, error
        return Outcome.DONE, None

    def _count_failure(self, message: Message) -> int:
        # Messages that other consumers have finished stay counted here, hence the limit.
        if len(self.failures) > MAX_REMEMBERED:
            self.failures.clear()
        self.failures[message.entry] += 1
        return self.failures[message.entry]

    async def _dead_letter(self, message: Message, error: Exception | None) -> None:
        if isinstance(error, PoisonError):
            reason = str(error)
            await self.on_poison(message)
        else:
            reason = f"failed {MAX_FAILURES} times, most recently with {type(error).__name__}"
        await self.group.dead_letter(message, reason)
        logger.error("message %s dead-lettered: %s", message.entry.decode(), reason)
