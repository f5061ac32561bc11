"""What becomes of a message: acknowledged when it is done, tried again when it failed, parked when it is poison."""

import asyncio
import logging
from collections import Counter

from prometheus_client import Counter as Total
from redis.exceptions import RedisError

from app.errors import UnavailableError
from app.patterns.stream_group import Message, StreamGroup

MAX_FAULTS, MAX_REMEMBERED, LATER_SECONDS = 5, 10_000, 0.5
_HANDLED = Total(
    "stream_messages_handled",
    "Messages by outcome: done, later, failed, parked.",
    ["stream", "outcome"],
)
logger = logging.getLogger("app.stream")


class PoisonError(Exception):
    """This message can never be handled. The text says why, and goes to the dead-letter stream with it."""


class RetryLaterError(Exception):
    """What the message needs is away, which is no fault of the message, however often it happens."""


class StreamHandler:
    """Handles messages of a group. A subclass says how."""

    def __init__(self, group: StreamGroup) -> None:
        self.group = group
        self.faults = Counter[bytes]()  # of messages that failed here

    async def handle(self, message: Message) -> None:
        """Do what the message asks for; it may come twice. After an error it comes again, some seconds later."""
        raise NotImplementedError

    async def on_group_created(self) -> None:
        """Prepare for a group that is made anew: what was in the stream before may be lost."""

    async def on_dead_letter(self, message: Message) -> None:
        """Note that a message goes to the dead-letter stream."""

    async def serve(self, message: Message) -> None:
        """Handle a message, and acknowledge or park it; whatever is wrong, nothing is raised but a cancellation."""
        name, reason, outcome = message.entry.decode(), "", "done"
        try:
            try:
                await self.handle(message)
            except PoisonError as error:
                reason = str(error)
                await self.on_dead_letter(message)
            except (RetryLaterError, UnavailableError, RedisError):
                outcome = "later"
                await asyncio.sleep(
                    LATER_SECONDS
                )  # or all that waits would be tried as fast as it fails
            except Exception as error:
                outcome = "failed"
                if len(self.faults) > MAX_REMEMBERED:
                    self.faults.clear()  # what other consumers have finished stays among them
                self.faults[message.entry] += 1
                logger.warning("message %s failed", name, exc_info=error)
                if self.faults[message.entry] >= MAX_FAULTS:
                    reason = f"failed {MAX_FAULTS} times, at last with {type(error).__name__}"
            if reason:
                await self.group.dead_letter(message, reason)
                outcome = "dead_lettered"
                logger.error("message %s is parked: %s", name, reason)
            elif outcome == "done":
                await self.group.acknowledge(message)
        except (UnavailableError, RedisError, OSError):
            outcome = "later"  # it comes again, and is found done
        except Exception:
            outcome = "failed"
            logger.exception("message %s cannot be parked", name)
        if outcome in {"done", "dead_lettered"}:
            self.faults.pop(message.entry, None)
        _HANDLED.labels(self.group.stream, outcome).inc()
