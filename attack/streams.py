"""The app of tests/fault_routes.py with what never ends by itself: a WebSocket that floods, and a long download."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import Response, WebSocket
from fastapi.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect
from tests.fault_routes import app


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
