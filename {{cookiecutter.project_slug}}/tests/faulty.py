"""The service with routes that tests need: a bug, a slow answer, a stream that breaks, and traces of a clean end."""

import asyncio
import atexit
import logging
from collections.abc import AsyncIterator

from fastapi import Response
from fastapi.responses import StreamingResponse

from app.main import create_app
from app.settings import load_settings

app = create_app(load_settings())
atexit.register(lambda: logging.getLogger("tests").info("atexit ran"))


@app.get("/bug")
async def bug() -> None:
    """Raise."""
    raise RuntimeError("4111111111111111")


@app.get("/slow")
async def slow(seconds: float) -> str:
    """Answer late."""
    await asyncio.sleep(seconds)
    return "done"


@app.get("/broken-stream")
async def broken_stream() -> Response:
    """Raise after the first bytes."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"half"
        raise RuntimeError("4111111111111111")

    return StreamingResponse(parts(), headers={"Content-Length": "8"})
