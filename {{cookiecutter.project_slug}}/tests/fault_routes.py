"""The service with routes that tests need: a bug, a slow answer, a stream that breaks, and traces of a clean end."""

import asyncio
import atexit
import logging
import re
import time
from collections.abc import AsyncIterator

from fastapi import BackgroundTasks, Request, Response, WebSocket
from fastapi.responses import StreamingResponse

from app.main import create_app
from app.settings import load_settings
from app.tasks import BackgroundDependency

app = create_app(load_settings())
logger = logging.getLogger("tests")
atexit.register(lambda: logger.info("atexit ran"))


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


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    """Send back what comes."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@app.get("/background")
async def start_background(seconds: float, background: BackgroundDependency) -> None:
    """Start work behind the answer."""
    background.start(behind("background", seconds))


@app.get("/background-task")
async def add_background_task(seconds: float, tasks: BackgroundTasks) -> None:
    """Start work behind the answer, as FastAPI does."""
    tasks.add_task(behind, "task", seconds)


async def behind(name: str, seconds: float) -> None:
    """Work for a while, and say so."""
    await asyncio.sleep(seconds)
    logger.info("%s done", name)


@app.get("/stuck")
async def stuck() -> None:
    """Block the loop for ever, outside of Python."""
    re.fullmatch(r"(a+)+b", "a" * 60)


@app.get("/large")
async def large(megabytes: int) -> Response:
    """Send much at once."""
    return Response(bytes(megabytes << 20))
