"""Commands and pipelines of Redis with a span each, used while traces are on."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from redis.asyncio import ConnectionPool
from redis.asyncio.client import Pipeline

from app.telemetry import tracing

_NO_SPAN = contextlib.nullcontext()


class TracedPipeline(Pipeline):
    """A pipeline that is one span."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send the commands; return the responses."""
        with command_span(self.connection_pool, "PIPELINE", len(self.command_stack)):
            return await super().execute(raise_on_error)


class TracedCommands:
    """A part of a client: its commands are spans of the active one, without keys and values."""

    connection_pool: ConnectionPool
    response_callbacks: Any

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command; return the response."""
        with command_span(self.connection_pool, str(args[0])):
            return await super().execute_command(*args, **options)  # type: ignore[misc]

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """Return a pipeline."""
        return TracedPipeline(
            self.connection_pool, self.response_callbacks, transaction, shard_hint
        )


def command_span(
    pool: ConnectionPool, name: str, commands: int = 0
) -> AbstractContextManager[None]:
    """Return a span for a command or a pipeline, if the active one is recorded."""
    if not tracing.is_recording():
        return _NO_SPAN
    attributes: dict[str, Any] = {"db.system.name": "redis", "db.operation.name": name}
    if commands:
        attributes["db.operation.batch.size"] = commands
    options = pool.connection_kwargs
    if "host" in options:
        attributes["server.address"] = options["host"]
        attributes["server.port"] = options.get("port", 6379)
    return tracing.ClientSpan(name, attributes)
