"""The app of tests/faulty.py with what can last longer than its process: a WebSocket, a download, work behind answers.

And with two ways to block the loop of a worker.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from app.background import BackgroundDependency
from fastapi import BackgroundTasks, Response, WebSocket
from fastapi.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect
from tests.faulty import app

logger = logging.getLogger("streams")


@app.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    """Send back what comes."""
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            await websocket.send_text(await websocket.receive_text())


@app.websocket("/flood")
async def flood(websocket: WebSocket) -> None:
    """Send without end."""
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            await websocket.send_bytes(bytes(1 << 16))
            await asyncio.sleep(0)  # sending alone lets nobody else run while the client takes all


@app.get("/download")
async def download() -> Response:
    """Send 200 MB, as fast as they are taken."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield bytes(1 << 20)

    return StreamingResponse(parts(), headers={"Content-Length": str(200 << 20)})


async def work(seconds: float) -> None:
    """Take a while, and say how it ended."""
    try:
        await asyncio.sleep(seconds)
        logger.info("the work is done")
    except asyncio.CancelledError:
        logger.info("the work was cancelled")
        raise


@app.post("/background")
async def start_background(seconds: float, background: BackgroundDependency) -> None:
    """Start work with the service's own means."""
    background.start(work(seconds))


@app.post("/background-task")
async def start_background_task(seconds: float, tasks: BackgroundTasks) -> None:
    """Start work with FastAPI's."""
    tasks.add_task(work, seconds)


@app.get("/asleep")
async def asleep() -> None:
    """Block the loop in a call."""
    time.sleep(60)


@app.get("/spinning")
async def spinning() -> None:
    """Block the loop in Python."""
    while True:
        pass
