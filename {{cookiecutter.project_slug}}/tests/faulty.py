"""The service with routes that tests need: a bug, a slow answer, a stream that breaks, and traces of a clean end."""

import asyncio
import atexit
import logging
import time
from collections.abc import AsyncIterator

from fastapi import Request, Response
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


@app.get("/slow-thread")
def slow_thread(seconds: float) -> str:
    """Answer late, from a thread, which nothing can cancel."""
    time.sleep(seconds)
    return "done"


@app.post("/length")
async def length(request: Request) -> int:
    """Say how many bytes came."""
    return len(await request.body())


@app.get("/events")
async def events(seconds: float) -> Response:
    """Send an event ten times a second."""

    async def parts() -> AsyncIterator[str]:
        for number in range(round(seconds * 10)):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(parts(), media_type="text/event-stream")
