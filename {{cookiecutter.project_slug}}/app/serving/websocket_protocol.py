"""WebSocket connections: uvicorn's, behind the HTTP protocol's limits, and safe to shut down."""

import asyncio
import logging
import math
from asyncio import BaseTransport
from typing import Any

import httptools
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent, HTTPScope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request

from app.serving.state import ServiceState
from app.web.middleware import ABNORMAL_CLOSURE
from app.web.proxies import client_address
from app.web.threads import cancel_after_thread

#: Seconds for which a closing connection may wait for a client that does not read.
CLOSING_SECONDS = 10
#: Seconds that a handler has to notice that its client has disconnected. Then it is cancelled.
DISCONNECT_SECONDS = 1.0
#: The fields that take part in the handshake (RFC 6455, section 4.2.1).
_HANDSHAKE_FIELDS = {
    b"connection",
    b"sec-websocket-key",
    b"sec-websocket-version",
    b"sec-websocket-protocol",
    b"sec-websocket-extensions",
}

# uvicorn logs each handshake with its query string. app/web/middleware.py writes an access line.
logger = logging.getLogger("uvicorn.error.websocket")
logger.setLevel(logging.WARNING)


def requests_websocket(scope: HTTPScope) -> bool:
    """Return whether `Upgrade` lists `websocket`; HTTP/1.0 has no upgrade (RFC 9110, 7.8)."""
    values = [value.lower() for name, value in scope["headers"] if name == b"upgrade"]
    protocols = [each.strip() for each in b",".join(values).split(b",")]
    return scope["http_version"] == "1.1" and b"websocket" in protocols


def _has_body(scope: HTTPScope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )


class ServiceWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket connection.

    uvicorn has the library parse the handshake again, with limits of its own: a cookie of 9 kB or
    129 fields would never get a response. Here the HTTP protocol has parsed and limited it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = logger
        self.conn.logger = logger
        self.closing_seconds = 0
        self.state: ServiceState = args[1]
        self.received_bytes = 0
        #: When the handler has received its last message, by the time of the event loop.
        self.received_at = -math.inf
        #: Whether the handler knows that the connection is closed.
        self.has_received_end = False
        self.handler: asyncio.Task[Any] | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Accept a connection; a client of IPv4 has an IPv4 address, also on a socket of IPv6."""
        super().connection_made(transport)
        self.client = client_address(self.client)

    def negotiate(self, scope: HTTPScope) -> int:
        """Return the status of the handshake: 101, or 400 or 426 for one that is not valid."""
        if scope["method"] != "GET" or _has_body(scope):
            return 400
        self.handshake = Request("/", _handshake_headers(scope))
        versions = self.handshake.headers.get_all("Sec-WebSocket-Version")
        if versions and versions != ["13"]:
            return 426
        is_valid = self.conn.accept(self.handshake).status_code == 101
        return 101 if is_valid else 400

    def start(self, scope: HTTPScope, target: bytes) -> None:
        """Run the application for a handshake that was negotiated."""
        # The library reads frames only after it has parsed a request: a constant one.
        self.conn.receive_data(b"GET / HTTP/1.1\r\n\r\n")
        self.conn.events_received()
        url = httptools.parse_url(target)
        path = (url.path or b"/") + b"?" + (url.query or b"")
        self.handle_connect(
            Request(path.decode("ascii", "backslashreplace"), self.handshake.headers)
        )
        self.scope["headers"] = scope["headers"]

    async def run_asgi(self) -> None:
        """Run the application, in a task that can be cancelled."""
        self.handler = asyncio.current_task()
        try:
            await super().run_asgi()
        finally:
            self.handler = None
            self.state.cancel_left_handlers.discard(self.cancel_handler)

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message: ASGI. A rejection completes the handshake, or uvicorn logs an error."""
        await super().send(message)
        is_rejection = message["type"] == "websocket.http.response.body"
        if is_rejection and not message.get("more_body", False):
            self.handshake_complete = True

    async def receive(self) -> ASGIReceiveEvent:
        """Return the next message: ASGI."""
        message = await super().receive()
        if message["type"] == "websocket.receive":
            self.received_at = self.loop.time()
            text = message.get("text")
            data = message.get("bytes") if text is None else text.encode()
            self.received_bytes += len(data or b"")
        elif message["type"] == "websocket.disconnect":
            self.has_received_end = True
        return message

    @property
    def close_code(self) -> int:
        """The code with which the connection was closed by the first side that did so.

        1006 if it was lost (RFC 6455, section 7.1.5).
        """
        by_client = self.conn.close_rcvd
        by_service = self.conn.close_sent
        first = by_client if self.conn.close_rcvd_then_sent else by_service or by_client
        return first.code if first else ABNORMAL_CLOSURE

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the handler; cancel it if it does not receive, such as one that only sends."""
        super().connection_lost(exc)
        if self.handler is not None:
            self.state.cancel_left_handlers.add(self.cancel_handler)
            self.loop.call_later(DISCONNECT_SECONDS, self._cancel_when_due)

    def _cancel_when_due(self) -> None:
        """Cancel the handler, or wait: it has the time of a request for its last message."""
        due = self.received_at + self.state.settings.request_timeout_seconds
        if self.loop.time() < due:
            self.loop.call_at(due, self._cancel_when_due)
        else:
            self.cancel_handler()

    def cancel_handler(self) -> None:
        """Cancel a handler that does not know that its connection is closed."""
        if self.handler is not None and not self.has_received_end:
            cancel_after_thread(self.handler)

    def handle_parser_exception(self) -> None:
        """Close; without a close frame if the handshake has no response yet."""
        if self.conn.close_sent is None:
            self.transport.close()
        else:
            super().handle_parser_exception()

    def enforce_timeouts(self) -> None:
        """Abort a closing connection whose client does not read. To be called once a second."""
        if self.transport.is_closing():
            self.closing_seconds += 1
            if self.closing_seconds > CLOSING_SECONDS:
                self.transport.abort()

    def shutdown(self) -> None:
        """Close with 1012, service restart, unless the connection is closing already.

        uvicorn's raises, and so stops the worker, if the client has closed but does not read on.
        """
        if not self.transport.is_closing():
            super().shutdown()


def _handshake_headers(scope: HTTPScope) -> Headers:
    """Return the fields of the handshake. The library accepts no other protocol in `Upgrade`."""
    headers = Headers({"Upgrade": "websocket"})
    for name, value in scope["headers"]:
        if name in _HANDSHAKE_FIELDS:
            headers[name.decode("ascii")] = value.decode("ascii", "backslashreplace")
    return headers
