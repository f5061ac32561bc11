"""The service with routes that tests need: errors, slow responses, streams, tasks.

It also logs when `atexit` runs, which shows a clean exit.
"""

import asyncio
import atexit
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextvars import ContextVar

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.main import create_app
from app.settings import load_settings
from app.tasks import BackgroundDependency

#: A card number, which no response may contain.
SENSITIVE_TEXT = "4111111111111111"

app = create_app(load_settings())
logger = logging.getLogger("tests")
atexit.register(logger.info, "atexit ran")


@app.get("/bug")
async def bug() -> None:
    """Raise."""
    raise RuntimeError(SENSITIVE_TEXT)


@app.get("/slow")
async def slow(seconds: float) -> str:
    """Respond late."""
    await asyncio.sleep(seconds)
    return "done"


@app.get("/slow-thread")
def slow_thread(seconds: float) -> str:
    """Respond late, from a thread, which nothing can cancel."""
    time.sleep(seconds)
    return "done"


@app.get("/stuck")
async def stuck() -> None:
    """Block the event loop forever, in C code."""
    re.fullmatch(r"(a+)+b", "a" * 60)


@app.post("/length")
async def length(request: Request) -> int:
    """Return the size of the request body in bytes."""
    return len(await request.body())


@app.get("/large")
async def large(megabytes: int) -> Response:
    """Respond with a large body at once."""
    return Response(bytes(megabytes << 20))


@app.get("/broken-stream")
async def broken_stream() -> Response:
    """Raise after the first bytes of the body."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"half"
        raise RuntimeError(SENSITIVE_TEXT)

    return StreamingResponse(parts(), headers={"Content-Length": "8"})


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
    """Send every text back."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


@app.get("/background")
async def start_background(seconds: float, background: BackgroundDependency) -> None:
    """Start a background task of the service."""
    background.start(work("background", seconds))


@app.get("/background-task")
async def add_background_task(seconds: float, tasks: BackgroundTasks) -> None:
    """Start a background task of FastAPI's."""
    tasks.add_task(work, "task", seconds)


async def work(name: str, seconds: float) -> None:
    """Work for a while, then log it."""
    await asyncio.sleep(seconds)
    logger.info("%s done", name)


@app.websocket("/websocket/bug")
async def websocket_bug(websocket: WebSocket) -> None:
    """Raise after the first message."""
    await websocket.accept()
    await websocket.receive_text()
    raise RuntimeError(SENSITIVE_TEXT)


@app.websocket("/websocket/careless")
async def websocket_careless(websocket: WebSocket) -> None:
    """Receive without a thought for the disconnection, as most handlers do."""
    await websocket.accept()
    while True:
        await websocket.receive_text()


@app.websocket("/websocket/late")
async def websocket_late(websocket: WebSocket) -> None:
    """Accept too late."""
    await asyncio.sleep(60)
    await websocket.accept()


@app.websocket("/websocket/denied")
async def websocket_denied(websocket: WebSocket) -> None:
    """Close before the connection is accepted."""
    await websocket.close()


@app.websocket("/websocket/forbidden")
async def websocket_forbidden() -> None:
    """Raise an HTTP error before the connection is accepted."""
    raise HTTPException(401, "Sign in first.")


@app.websocket("/websocket/broken")
async def websocket_broken() -> None:
    """Raise before the connection is accepted."""
    raise RuntimeError(SENSITIVE_TEXT)


@app.websocket("/websocket/headers")
async def websocket_headers(websocket: WebSocket) -> None:
    """Send the number and size of the headers, the query, and a non-ASCII header back."""
    await websocket.accept(headers=[(b"x-own", b"1")])
    size = sum(len(value) for _, value in websocket.scope["headers"])
    own = websocket.headers.get("x-own", "")
    await websocket.send_json([len(websocket.scope["headers"]), size, websocket.url.query, own])
    await websocket.close()


@app.get("/large-stream")
async def large_stream(megabytes: int) -> Response:
    """Stream a large body in parts of 64 KiB."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(megabytes << 4):
            yield bytes(1 << 16)

    return StreamingResponse(parts())


@app.get("/raise")
async def raise_error(kind: str) -> None:
    """Raise an error that is not an `Exception`, or cancel this request."""
    if kind == "cancel":
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await asyncio.sleep(0)
    errors = {
        "exit": SystemExit(1),
        "interrupt": KeyboardInterrupt(),
        "generator-exit": GeneratorExit(),
        "cancelled": asyncio.CancelledError(),
        "group": BaseExceptionGroup("several", [SystemExit(1), ValueError(SENSITIVE_TEXT)]),
    }
    raise errors[kind]


@app.get("/raise-in-thread")
def raise_in_thread() -> None:
    """Exit, as a library for the command line does."""
    sys.exit("no such option")


@app.get("/exit-stream")
async def exit_stream() -> Response:
    """Exit after the first bytes of the body, in the task of the stream."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"half"
        sys.exit(1)

    return StreamingResponse(parts())


@app.websocket("/websocket/flood")
async def websocket_flood(websocket: WebSocket) -> None:
    """Send without end."""
    await websocket.accept()
    while True:
        await websocket.send_bytes(bytes(1 << 16))


@app.get("/header")
async def set_header(name: str, value: str) -> Response:
    """Respond with any header."""
    return Response("body", headers={name: value})


@app.get("/status")
async def set_status(status: int) -> Response:
    """Respond with any status."""
    return Response(status_code=status)


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with some of the messages of a response, given by the path: an ASGI application."""
    start = {"type": "http.response.start", "status": 200, "headers": []}
    body = {"type": "http.response.body", "body": b"half", "more_body": True}
    messages = {"nothing": [], "start": [start], "half": [start, body], "body": [body]}
    for message in messages[scope["path"].rpartition("/")[2]]:
        await send(message)


app.mount("/silent", silent)


class Wrapper:
    """An application around the service, without its attributes, such as `socketio.ASGIApp`."""

    def __init__(self, other: ASGIApp) -> None:
        self.other = other

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass everything on. Not a coroutine function."""
        return self.other(scope, receive, send)


wrapped = Wrapper(app)


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    """Raise for every scope, the lifespan included."""
    raise RuntimeError(SENSITIVE_TEXT)


#: Set by a request; visible to another if a context leaks.
context_marker: ContextVar[str] = ContextVar("context_marker", default="nothing")


@app.get("/context")
async def context(value: str) -> str:
    """Set a context variable; return its value before."""
    before = context_marker.get()
    context_marker.set(value)
    return before


@app.get("/own-headers")
async def own_headers() -> Response:
    """Respond with headers that the service and the server set too."""
    headers = {"Date": "Mon, 01 Jan 2001 00:00:00 GMT", "X-Request-ID": "own"}
    return Response("body", headers=headers)


@app.get("/head-and-get")
async def get_of_both() -> str:
    """Respond to GET, next to a route of HEAD."""
    return "get"


@app.head("/head-and-get")
async def head_of_both() -> Response:
    """Respond to HEAD."""
    return Response(headers={"X-Route": "head"})


mounted = FastAPI()


@mounted.get("/item/{number}")
async def get_item(number: int) -> int:
    """Respond from a mounted application."""
    return number


app.mount("/mounted", mounted)


@app.get("/chunked")
async def chunked() -> Response:
    """Respond in parts, with the header of their coding."""

    async def parts() -> AsyncIterator[str]:
        yield "one "
        yield "two"

    return StreamingResponse(parts(), headers={"Transfer-Encoding": "chunked"})


async def separate(scope: Scope, receive: Receive, send: Send) -> None:
    """Handle the lifespan itself, as `socketio.ASGIApp` does with `on_startup`."""
    if scope["type"] != "lifespan":
        await app(scope, receive, send)
        return
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})
