"""WebSocket connections: uvicorn's, behind the HTTP protocol's limits, and safe to shut down."""

import logging
from asyncio import BaseTransport
from typing import Any

import httptools
from uvicorn._types import HTTPScope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.datastructures import Headers
from websockets.http11 import Request

from app.web.proxies import client_address

#: Seconds for which a closing connection may wait for a client that does not read.
CLOSING_SECONDS = 10
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
