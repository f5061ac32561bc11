"""Clients of WebSockets and of server-sent events, for an application in this process.

httpx collects a whole response before it returns it, and has no WebSockets. A test of the real
process has both: `Service.events` and `Service.websocket`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from starlette.types import ASGIApp, Message, Scope

from tests import default_token
from tests.patience import patience, slowness

#: Time limit for the application to send, or to end once its client has left.
SECONDS = 10.0


class Event(NamedTuple):
    """A server-sent event (HTML, section 9.2)."""

    data: str
    event: str = "message"
    id: str | None = None


class RejectedError(Exception):
    """The application has closed a WebSocket: `code`, which is 1006 for a rejected handshake."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def parse_events(lines: Iterable[str]) -> Iterator[Event]:
    """Yield the events of a stream, without its comments and reconnection times."""
    fields: dict[str, str] = {}
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif line:
            fields[name] = value
        else:
            if data:
                text = "\n".join(data)
                yield Event(text, fields.get("event", "message"), fields.get("id"))
            fields = {}
            data = []


class Connection:
    """A request or WebSocket of an application, message by message."""

    def __init__(self, app: ASGIApp, scope: Scope, first: Message) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.outgoing: asyncio.Queue[Message] = asyncio.Queue()
        self.incoming.put_nowait(first)
        serving: Any = app(scope, self.incoming.get, self._send)
        self.task: asyncio.Task[None] = asyncio.create_task(serving)

    async def _send(self, message: Message) -> None:
        self.outgoing.put_nowait(message)
        # As on a socket, other tasks run meanwhile.
        await asyncio.sleep(0)

    async def receive(self) -> Message:
        """Return the next message. Raises the error of the application, or `TimeoutError`."""
        getting = asyncio.create_task(self.outgoing.get())
        waiting = {getting, self.task}
        await asyncio.wait(
            waiting, timeout=SECONDS * slowness(), return_when=asyncio.FIRST_COMPLETED
        )
        await asyncio.sleep(0)
        if getting.done():
            return getting.result()
        getting.cancel()
        if self.task.done():
            self.task.result()
            raise EOFError("the application has ended")
        raise TimeoutError

    async def leave(self, message: Message) -> None:
        """Disconnect, and wait until the application has ended."""
        self.incoming.put_nowait(message)
        async with patience(SECONDS):
            await self.task


class WebSocket:
    """An accepted WebSocket."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def send(self, text: str) -> None:
        """Send a text message."""
        self.connection.incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def receive(self) -> str:
        """Return the next text message. Raises `RejectedError` if the application closes it."""
        message = await self.connection.receive()
        if message["type"] == "websocket.close":
            raise RejectedError(message.get("code", 1000))
        return str(message["text"])


class Client(httpx.AsyncClient):
    """A client of an application in this process, with its event streams and WebSockets."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            transport=httpx.ASGITransport(app),
            base_url="http://test",
            headers=default_token.headers,
        )
        self.application = app

    @contextlib.asynccontextmanager
    async def events(
        self, path: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Open a stream; yield its events, and disconnect after the block."""
        scope = {**self._scope("http", path, headers), "method": "GET", "scheme": "http"}
        connection = Connection(self.application, scope, {"type": "http.request", "body": b""})
        try:
            start = await connection.receive()
            assert start["status"] == 200, start
            yield _events(connection)
        finally:
            await connection.leave({"type": "http.disconnect"})

    @contextlib.asynccontextmanager
    async def websocket(
        self, path: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[WebSocket]:
        """Open a WebSocket, and close it after the block. Raises `RejectedError`."""
        scope = {**self._scope("websocket", path, headers), "scheme": "ws", "subprotocols": []}
        connection = Connection(self.application, scope, {"type": "websocket.connect"})
        try:
            accepted = await connection.receive()
            if accepted["type"] != "websocket.accept":
                raise RejectedError(1006)
            yield WebSocket(connection)
        finally:
            await connection.leave({"type": "websocket.disconnect", "code": 1000})

    def _scope(self, kind: str, path: str, headers: Mapping[str, str] | None) -> Scope:
        url = urlsplit(path)
        request = self.build_request("GET", path, headers=headers)
        return {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "path": url.path,
            "raw_path": url.path.encode(),
            "query_string": url.query.encode(),
            "root_path": "",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("127.0.0.1", 123),
            "server": ("test", 80),
            "extensions": {},
        }


async def _events(connection: Connection) -> AsyncIterator[Event]:
    """Yield the events of a response. It ends with the response."""
    text = ""
    is_open = True
    while is_open:
        message = await connection.receive()
        is_open = message.get("more_body", False)
        text += message.get("body", b"").decode()
        complete, separator, text = text.rpartition("\n\n")
        for event in parse_events((complete + separator).split("\n")):
            yield event
