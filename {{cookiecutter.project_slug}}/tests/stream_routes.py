"""The service with streams: server-sent events, WebSockets that only send, streams that fail."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import WebSocket
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from app.web.sse import LastEventId, event_stream
from tests.fault_routes import SENSITIVE_TEXT, app

logger = logging.getLogger("tests")


async def numbers(start: int, seconds: float, size: int) -> AsyncGenerator[ServerSentEvent]:
    """Yield numbered events; log when the client or the service ends them."""
    try:
        number = start
        while True:
            number += 1
            yield ServerSentEvent(data=f"{number}{'.' * size}", id=str(number))
            await asyncio.sleep(seconds)
    finally:
        logger.info("events ended")


@app.get("/numbers", response_class=EventSourceResponse)
async def count(
    last_event_id: LastEventId = None, seconds: float = 60, size: int = 0
) -> AsyncIterator[ServerSentEvent]:
    """Count on from the last event that the client has received."""
    async for event in event_stream(numbers(int(last_event_id or 0), seconds, size)):
        yield event


@app.get("/silent-events", response_class=EventSourceResponse)
async def be_silent() -> AsyncIterator[ServerSentEvent]:
    """Send headers, and no event."""
    await asyncio.sleep(60)
    yield ServerSentEvent(data="late")


@app.get("/failing-events", response_class=EventSourceResponse)
async def fail() -> AsyncIterator[ServerSentEvent]:
    """Raise after the first event."""
    yield ServerSentEvent(data="first")
    await asyncio.sleep(0.1)
    raise RuntimeError(SENSITIVE_TEXT)


@app.websocket("/push")
async def push(websocket: WebSocket) -> None:
    """Send once, then wait for an event that never comes, and never receive."""
    await websocket.accept()
    await websocket.send_text("hello")
    try:
        await asyncio.Event().wait()
    finally:
        logger.info("push ended")


@app.websocket("/work")
async def work(websocket: WebSocket) -> None:
    """Work for a while on each message."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await asyncio.sleep(float(text))
        logger.info("worked")


@app.websocket("/return")
async def return_early(websocket: WebSocket) -> None:
    """Send, and return without closing."""
    await websocket.accept()
    await websocket.send_text("ä")


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Stream forever, without receiving: an ASGI application."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    try:
        while True:
            await send({"type": "http.response.body", "body": b"more", "more_body": True})
            await asyncio.sleep(0.1)
    finally:
        logger.info("endless ended")


app.mount("/endless", endless)
