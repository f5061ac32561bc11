"""A process without routes, and without work. The argument is the time limit of a connection."""

import contextlib
import sys
from collections.abc import AsyncIterator

from app import process
from app.settings import Settings, load_settings
from app.storage import Storage
from app.telemetry import logs
from app.web.health import Health


@contextlib.asynccontextmanager
async def idle(settings: Settings, storage: Storage, health: Health) -> AsyncIterator[None]:
    yield


if __name__ == "__main__":
    settings = load_settings()
    logs.configure(settings)
    if len(sys.argv) > 1:
        process.CONNECTION_SECONDS = float(sys.argv[1])
    process.run(settings, idle)
