"""Turns traces on for a process, if an endpoint is set: OTEL_EXPORTER_OTLP_ENDPOINT.

Otherwise neither the SDK nor the exporter is imported.
"""

import contextlib
from collections.abc import AsyncIterator

from app.settings import Settings
from app.telemetry import context, tracing


def preload(settings: Settings) -> None:
    """Import the SDK if it will be used: in the master, whose memory the workers share."""
    if settings.has_traces:
        import app.telemetry.trace_export  # noqa: F401


@contextlib.asynccontextmanager
async def open_tracing(settings: Settings) -> AsyncIterator[None]:
    """Trace during the block, then send the last spans, within `trace_export.FLUSH_SECONDS`.

    For a process that has been forked, since the exporter is a thread.
    """
    if not settings.has_traces:
        yield
        return
    from app.telemetry.trace_export import Export

    export = Export(settings)
    tracing.current = tracing.Tracing(export)
    context.span_keys = tracing.active_keys
    try:
        yield
    finally:
        tracing.current = None
        await export.close()
