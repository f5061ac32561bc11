"""The app of tests/fault_routes.py with an endless WebSocket and a long download."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import Response, WebSocket
from fastapi.responses import StreamingResponse
from starlette.websockets import WebSocketDisconnect
from tests.fault_routes import app

MEGABYTE = 1 << 20
DOWNLOAD_MEGABYTES = 200


@app.websocket("/flood")
async def flood(websocket: WebSocket) -> None:
    """Send without end."""
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            await websocket.send_bytes(bytes(1 << 16))
            # While the client reads fast, sending alone never yields to other tasks.
            await asyncio.sleep(0)


@app.get("/download")
async def download() -> Response:
    """Send 200 MB, as fast as the client reads."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(DOWNLOAD_MEGABYTES):
            yield bytes(MEGABYTE)

    length = str(DOWNLOAD_MEGABYTES * MEGABYTE)
    return StreamingResponse(chunks(), headers={"Content-Length": length})
